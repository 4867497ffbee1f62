"""The rules that are lossless on chains: their output has the target's law, summed exactly."""

import numpy as np
import pytest

from decodax import verifiers
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import outcome_of
from tests.enumeration import output_law
from tests.table_model import sequence_law

RULES = [
  verifiers.speculative, verifiers.block, verifiers.sample_and_match, verifiers.coupled,
]  # fmt: skip
pytestmark = pytest.mark.usefixtures('float64')


def _assert_exact(rule, tables, chains, num_drafts):
  outcome = outcome_of(rule, chains.proposal, chains.logits)
  totals = np.bincount(outcome.row, outcome.weight)
  np.testing.assert_allclose(totals, 1, atol=1e-12)
  law = output_law(outcome, chains.weight, tables.p, CONTEXT, num_drafts + 1)
  expected = sequence_law(tables.p, CONTEXT, num_drafts + 1)
  np.testing.assert_allclose(law, expected, atol=1e-12)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.name)
def test_the_output_has_the_target_s_law(rule, case):
  num_drafts = 2 if rule in RULES[2:] else 3  # these two decide more often, for nothing
  chains = every_chain(CASES[case], num_drafts)
  _assert_exact(rule, CASES[case], chains, num_drafts)


@pytest.mark.parametrize('case', ['random', 'each misses one', 'equal'])
@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.name)
def test_drafts_may_end_early(rule, case):
  # How many there are may depend on the drafts before, here: none after a token 1.
  def submitted(drafts):
    return drafts.index(1) + 1 if 1 in drafts else len(drafts)

  chains = every_chain(CASES[case], 2, length_fn=submitted)
  _assert_exact(rule, CASES[case], chains, 2)
  nothing = every_chain(CASES[case], 2, length_fn=lambda drafts: 0)
  _assert_exact(rule, CASES[case], nothing, 2)

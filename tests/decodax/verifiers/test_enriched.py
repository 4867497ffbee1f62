"""Enriched targets: the law that comes out is the enriched one."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from decodax.verifiers import enriched
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import V
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import evidence_of
from tests.decodax.verifiers.chains import laws_after
from tests.decodax.verifiers.chains import outcome_of
from tests.decodax.verifiers.chains import position_laws
from tests.enumeration import output_law
from tests.table_model import sequence_law

NUM_DRAFTS = 2
pytestmark = pytest.mark.usefixtures('float64')


def _by_hand(p, q, step, plausibility):
  with np.errstate(divide='ignore'):
    logits = np.log(p) - step * np.where(q >= plausibility * q.max(), p - q, 0)
  return scipy.special.softmax(logits)


@pytest.mark.parametrize('case', CASES)
def test_each_position_emits_the_enriched_law(case):
  tables, step, plausibility = CASES[case], 1.5, 0.4
  chains = every_chain(tables, NUM_DRAFTS, length_fn=lambda drafts: 1 if drafts[0] == 0 else 2)
  rule = enriched(step, plausibility)
  outcome = outcome_of(rule, chains.proposal, chains.logits)
  for prefix, law in position_laws(outcome, chains.weight).items():
    p, q = laws_after(tables, prefix)
    ended = len(prefix) == NUM_DRAFTS or prefix == (0,)
    np.testing.assert_allclose(law, p if ended else _by_hand(p, q, step, plausibility), atol=1e-12)


def test_step_0_is_lossless():
  tables = CASES['each misses one']
  chains = every_chain(tables, NUM_DRAFTS)
  outcome = outcome_of(enriched(0.0), chains.proposal, chains.logits)
  law = output_law(outcome, chains.weight, tables.p, CONTEXT, NUM_DRAFTS + 1)
  np.testing.assert_allclose(law, sequence_law(tables.p, CONTEXT, NUM_DRAFTS + 1), atol=1e-12)


def test_at_temperature_0_it_takes_the_argmax_of_that_law():
  tables = CASES['random']
  chains = every_chain(tables, 1)
  p, q = laws_after(tables, ())
  warped = jnp.where(np.arange(V) == p.argmax(), 0, -jnp.inf)
  warped = jnp.broadcast_to(warped, chains.logits.shape)
  evidence = evidence_of(chains.logits, temperature=0.0)
  winners = []
  for step in (0.0, 10.0):
    outcome = outcome_of(enriched(step, 0.0), chains.proposal, warped, evidence=evidence)
    best = _by_hand(p, q, step, 0.0).argmax()
    drafted = outcome.row == q.argmax()  # what a drafter proposes at temperature 0
    assert np.all(outcome.tokens[drafted, 0] == best)
    winners.append(best)
  assert winners[0] == p.argmax() and winners[1] == q.argmax()

"""Block verification: never worse than speculative sampling, and exact over several rounds.

That a single round is exact is shown, with the other lossless rules, in test_lossless_chains.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decodax import Params
from decodax import decode
from decodax import make_request
from decodax.drafters.draft_model import draft_model
from decodax.noise import RoundKeys
from decodax.verifiers import block
from decodax.verifiers import speculative
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import V
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import outcome_of
from tests.enumeration import expected_accepted
from tests.table_model import random_table
from tests.table_model import sequence_law
from tests.table_model import table_model


def _accepted(rule, tables, num_drafts):
  chains = every_chain(tables, num_drafts)
  return expected_accepted(outcome_of(rule, chains.proposal, chains.logits), chains.weight)


@pytest.mark.usefixtures('float64')
def test_accepts_at_least_as_much_as_speculative_sampling():
  gains = {}
  for name, tables in CASES.items():
    gains[name] = _accepted(block, tables, 3) - _accepted(speculative, tables, 3)
    assert gains[name] >= -1e-12, name
    single = _accepted(block, tables, 1) - _accepted(speculative, tables, 1)
    assert abs(single) < 1e-12, name
  assert gains['random'] > 0.01


@pytest.mark.usefixtures('float64')
def test_accepts_every_draft_of_a_perfect_drafter():
  assert abs(_accepted(block, CASES['equal'], 3) - 3) < 1e-12
  assert _accepted(block, CASES['disjoint'], 3) < 1e-12


# --- The jitted loop, with its real random numbers, over several rounds --------------------------

NUM_RUNS = 1 << 17
NUM_TOKENS = 5  # at most 4 come from one round
FREEDOM = V**NUM_TOKENS - 1
REJECT_AT = scipy.stats.chi2.isf(1e-4, FREEDOM)
PROMPT = (1, 0)


class _PositionKeys:
  """Takes fresh decisions with noise that is keyed by position and not by round: wrong."""

  def __init__(self, keys: RoundKeys):
    self.keys = keys

  def _at(self, depth):
    return self.keys._replace(round=self.keys.position + depth)

  def accepts(self, probability, depth, index=0):
    return self._at(depth).accepts(probability, 0, index)

  def pick(self, law, depth, index=0):
    return self._at(depth).pick(law, 0, index)

  def draft_gumbel(self, vocab_size, depth, node=0):
    return self._at(depth).draft_gumbel(vocab_size, 0, node)


def _with_position_keys(rule):
  def verify(keys, *args, **kwargs):
    return rule.verify(_PositionKeys(keys), *args, **kwargs)

  def draft_noise(keys, *args, **kwargs):
    return _PositionKeys(keys).draft_gumbel(*args, **kwargs)

  return rule._replace(verify=verify, draft_noise=draft_noise)


def _chi_square(rule):
  """Returns the statistic of what NUM_RUNS rows emit against the target's exact law."""
  tables = Params(*(random_table(seed, V, sharpness=1.5) for seed in (5, 6)))
  request = make_request(
    np.tile(PROMPT, (NUM_RUNS, 1)), max_new_tokens=NUM_TOKENS, vocab_size=V, temperature=1.0,
    seed=11, capacity=8,
  )  # fmt: skip
  model = table_model(V)
  run = jax.jit(
    functools.partial(decode, model=model, drafter=draft_model(model, num_drafts=3), verifier=rule)
  )
  result = run(jax.tree.map(lambda table: jnp.asarray(table, jnp.float32), tables), request)
  assert float(np.mean(result.stats.num_target_calls)) > 2  # several rounds
  start = len(PROMPT)
  emitted = np.asarray(result.tokens)[:, start : start + NUM_TOKENS]
  counts = np.bincount(emitted @ V ** np.arange(NUM_TOKENS)[::-1], minlength=FREEDOM + 1)
  expected = NUM_RUNS * sequence_law(tables.target, PROMPT, NUM_TOKENS).ravel()
  return float(np.sum((counts - expected) ** 2 / expected))


def test_the_loop_has_the_target_s_law_over_several_rounds():
  # 131,072 runs of 5 tokens. Rejects a correct rule for one seed in 10,000. Power: a law whose
  # cells are off by 4 % (root mean square, weighted by the law) is rejected for 9,998 seeds in
  # 10,000, one off by 3 % for 81 in 100.
  power = [scipy.stats.ncx2.sf(REJECT_AT, FREEDOM, NUM_RUNS * error**2) for error in (0.03, 0.04)]
  assert power[0] > 0.81 and power[1] > 0.9998
  assert _chi_square(block) < REJECT_AT


def test_noise_reused_at_a_position_is_seen():
  # The decisions of a round look at tokens it then drops: their noise must not come back.
  assert _chi_square(_with_position_keys(block)) > 1.5 * REJECT_AT

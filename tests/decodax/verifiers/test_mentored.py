"""Mentored decoding: its law is the best within the budget, and what comes out follows it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from decodax.verifiers import mentored
from decodax.verifiers.mentored import mentored_logits
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import evidence_of
from tests.decodax.verifiers.chains import laws_after
from tests.decodax.verifiers.chains import log
from tests.decodax.verifiers.chains import outcome_of
from tests.decodax.verifiers.chains import position_laws
from tests.enumeration import expected_accepted
from tests.enumeration import output_law
from tests.table_model import sequence_law

NUM_DRAFTS = 2
pytestmark = pytest.mark.usefixtures('float64')


_compiled = jax.jit(mentored_logits)


@pytest.fixture(autouse=True)
def _compile_the_bisection(monkeypatch):
  """The enumerator runs rules uncompiled, which is slow for loops."""

  def call(*args):
    with jax.disable_jit(False):
      return _compiled(*args)

  monkeypatch.setitem(mentored.__globals__, 'mentored_logits', call)


def _law(p, q, budget):
  budget = jnp.broadcast_to(jnp.asarray(budget, jnp.float64), p.shape[:-1])
  return np.exp(np.asarray(_compiled(log(p), log(q), budget)))


def _limit(p, q):
  """The law for an unlimited budget: max(q, a p) where p allows a token, for the right a."""
  allowed = np.where(p > 0, q, 0)
  low, high = np.zeros_like(p[..., :1]), np.ones_like(p[..., :1])
  for _ in range(60):
    middle = (low + high) / 2
    above = np.maximum(allowed, middle * p).sum(-1, keepdims=True) > 1
    low, high = np.where(above, low, middle), np.where(above, middle, high)
  return np.maximum(allowed, low * p)


@pytest.mark.parametrize('budget', [0.0, 1e-3, 0.05, 0.5, np.inf])
@pytest.mark.parametrize('case', CASES)
def test_the_law_sums_to_one_and_spends_the_budget(case, budget):
  p, q = CASES[case]
  r, limit = _law(p, q, budget), _limit(p, q)
  np.testing.assert_allclose(r.sum(-1), 1, atol=1e-12)
  spent = scipy.special.rel_entr(p, r).sum(-1)
  whole = scipy.special.rel_entr(p, limit).sum(-1)
  assert np.all(spent <= budget + 1e-9)
  if np.isfinite(budget):
    np.testing.assert_allclose(spent, np.minimum(whole, budget), atol=1e-6)
  else:
    np.testing.assert_allclose(r, limit, atol=1e-12)
  if budget == 0:
    np.testing.assert_allclose(r, p, atol=1e-7)


def _best_overlap(p, q, budget):
  """The largest sum of s <= min(q, r) over laws r within the budget, by a general solver."""
  size = len(p)
  best = scipy.optimize.minimize(
    lambda x: -x[size:].sum(), np.concatenate([p, np.minimum(p, q)]), method='SLSQP',
    bounds=[(1e-9 * (v > 0), v > 0) for v in p] + [(0, v) for v in q],
    constraints=[
      {'type': 'eq', 'fun': lambda x: x[:size].sum() - 1},
      {'type': 'ineq', 'fun': lambda x: x[:size] - x[size:]},
      {'type': 'ineq', 'fun': lambda x: budget - scipy.special.rel_entr(p, x[:size]).sum()},
    ],
    options={'maxiter': 500, 'ftol': 1e-12},
  )  # fmt: skip
  assert best.success
  return -best.fun


def test_no_other_law_within_the_budget_overlaps_more():
  rng = np.random.default_rng(0)
  for zeros in ((), 'p', 'q', 'pq'):
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    p = np.where(('p' in zeros) & (np.arange(5) == 0), 0, p)
    q = np.where(('q' in zeros) & (np.arange(5) == 1), 0, q)
    p, q = p / p.sum(), q / q.sum()
    r = _law(p, q, 0.1)
    assert abs(np.minimum(q, r).sum() - _best_overlap(p, q, 0.1)) < 1e-6


@pytest.mark.parametrize('case', ['random', 'each misses one', 'disjoint', 'equal'])
def test_each_position_emits_that_law(case):
  tables = CASES[case]
  chains = every_chain(tables, NUM_DRAFTS, length_fn=lambda drafts: 1 if drafts[0] == 0 else 2)
  outcome = outcome_of(mentored(0.1), chains.proposal, chains.logits)
  for prefix, law in position_laws(outcome, chains.weight).items():
    p, q = laws_after(tables, prefix)
    ended = len(prefix) == NUM_DRAFTS or prefix == (0,)
    np.testing.assert_allclose(law, p if ended else _law(p, q, 0.1), atol=1e-12)


def test_budget_0_is_lossless_and_a_budget_raises_acceptance():
  tables = CASES['random']
  chains = every_chain(tables, NUM_DRAFTS)
  accepted = []
  for budget in (0.0, 0.05, 0.2, 5.0):
    outcome = outcome_of(mentored(budget), chains.proposal, chains.logits)
    accepted.append(expected_accepted(outcome, chains.weight))
    if budget == 0:
      law = output_law(outcome, chains.weight, tables.p, CONTEXT, NUM_DRAFTS + 1)
      # the bisection stops one step short of b = 1
      np.testing.assert_allclose(law, sequence_law(tables.p, CONTEXT, 3), atol=1e-12)
  assert np.all(np.diff(accepted) > 0)
  assert abs(accepted[-1] - NUM_DRAFTS) < 1e-9


def test_at_temperature_0_it_takes_the_argmax_of_that_law():
  tables = CASES['random']
  chains = every_chain(tables, 1)
  p, q = laws_after(tables, ())
  warped = jnp.where(np.arange(3) == p.argmax(), 0, -jnp.inf)
  warped = jnp.broadcast_to(warped, chains.logits.shape)
  evidence = evidence_of(chains.logits, temperature=0.0)
  winners = []
  for budget in (0.0, 0.05, 5.0):
    outcome = outcome_of(mentored(budget), chains.proposal, warped, evidence=evidence)
    best = _law(p, q, budget).argmax()
    first = outcome.tokens[:, 0]
    # The draft is the argmax of q, that is what a drafter at temperature 0 proposes.
    drafted = outcome.row == q.argmax()
    assert np.all(first[drafted] == best)
    winners.append(best)
  assert winners[0] == p.argmax() and winners[-1] == q.argmax()


def test_refuses_a_negative_budget():
  with pytest.raises(ValueError, match='budget'):
    mentored(-0.1)

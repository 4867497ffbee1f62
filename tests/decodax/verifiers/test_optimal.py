"""The optimal choice among independent drafts: as much as a linear program allows, and no bias.

That a whole round is exact is shown, with the other lossless rules, in test_lossless_trees.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from decodax import theory
from decodax import verifiers
from decodax.types import Candidates
from decodax.verifiers.optimal import choice_probabilities
from decodax.verifiers.optimal import optimal_acceptance
from decodax.verifiers.optimal import plan_choice
from tests.decodax.verifiers.draft_trees import every_tree
from tests.decodax.verifiers.draft_trees import laws_after_context
from tests.decodax.verifiers.draft_trees import mean_accepted
from tests.decodax.verifiers.draft_trees import star
from tests.table_model import random_table

NUM_BINS = 512


def _laws(seed, vocab_size):
  rng = np.random.default_rng(seed)
  p, q = (rng.dirichlet(np.full(vocab_size, rng.choice([0.2, 1.0, 5.0]))) for _ in range(2))
  order = np.argsort(p / q)
  return p[order], q[order]


@jax.jit
def _choice(p, q, drafts):
  p, q = (jnp.broadcast_to(law[None], (len(drafts), len(law))) for law in (p, q))
  plan = plan_choice(p, q, jnp.full((len(drafts),), drafts.shape[1]))
  return choice_probabilities(plan, drafts, jnp.ones(drafts.shape, bool)), plan.ratio


def _chosen(p, q, num_drafts):
  """Returns f64[V], the law of the chosen draft, summed over all drafts; a bin is a token."""
  drafts = np.asarray(list(itertools.product(range(len(p)), repeat=num_drafts)))
  chance, ratio = _choice(p, q, drafts)
  np.testing.assert_allclose(chance.sum(-1), 1, atol=1e-12)
  assert np.all(chance >= 0)
  weight = chance * q[drafts].prod(-1, keepdims=True)
  law = np.bincount(drafts.ravel(), weight.ravel(), minlength=len(p))
  np.testing.assert_allclose(law, q * ratio[0], atol=1e-12)
  return law


def _linear_program(p, q, num_drafts):
  """Returns the largest acceptance: how much of p can be carried by drafts that have the token."""
  drafts = list(itertools.product(range(len(p)), repeat=num_drafts))
  edges = [(i, token) for i, draft in enumerate(drafts) for token in sorted(set(draft))]
  limits = np.concatenate([[np.prod(q[list(draft)]) for draft in drafts], p])
  rows = [[i, len(drafts) + token] for i, token in edges]
  matrix = np.zeros((len(limits), len(edges)))
  for column, row in enumerate(rows):
    matrix[row, column] = 1
  result = scipy.optimize.linprog(-np.ones(len(edges)), A_ub=matrix, b_ub=limits, bounds=(0, None))
  assert result.success
  return -result.fun


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('vocab_size', 'num_drafts'), [(2, 2), (4, 3), (6, 2), (5, 4)])
def test_a_plan_over_tokens_attains_the_optimum(vocab_size, num_drafts):
  for seed in range(12):
    p, q = _laws(seed, vocab_size)
    attained = np.minimum(p, _chosen(p, q, num_drafts)).sum()
    optimum = theory.optimal_acceptance_with_replacement(p, q, num_drafts)
    assert abs(attained - float(optimum)) < 1e-12
    if seed < 3 and vocab_size**num_drafts <= 64:
      assert abs(attained - _linear_program(p, q, num_drafts)) < 1e-9


@pytest.mark.usefixtures('float64')
def test_awkward_laws():
  one_hot, even = np.asarray([0.0, 0.0, 1.0]), np.full(3, 1 / 3)
  half, rest = np.asarray([0.0, 0.5, 0.5]), np.asarray([1.0, 0.0, 0.0])
  for p, q in [(even, even), (one_hot, even), (half, rest), (one_hot, one_hot), (half, even)]:
    for num_drafts in (1, 2, 3):
      attained = np.minimum(p, _chosen(p, q, num_drafts)).sum()
      optimum = theory.optimal_acceptance_with_replacement(p, q, num_drafts)
      assert abs(attained - float(optimum)) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('num_bins', [4, 256])
def test_acceptance_in_a_tree_is_within_the_tolerance(num_bins):
  p, q = random_table(0, 4, sharpness=1.5), random_table(10, 4)
  laws = laws_after_context(p), laws_after_context(q)
  for num_drafts in (1, 2, 3) if num_bins == 4 else (2,):
    tree = every_tree(p, q, star(num_drafts), Candidates.IID)
    optimum = float(theory.optimal_acceptance_with_replacement(*laws, num_drafts))
    accepted = mean_accepted(verifiers.optimal(num_bins=num_bins), tree)
    assert optimum - (num_drafts + 1) / (2 * num_bins) <= accepted <= optimum + 1e-12
    p_row, q_row = (jnp.asarray(law)[None] for law in laws)
    expected = optimal_acceptance(p_row, q_row, num_drafts, num_bins=num_bins)
    assert abs(accepted - float(expected[0])) < 1e-12
    if num_drafts > 1 and num_bins > 4:
      assert accepted > float(theory.kseq_acceptance(*laws, num_drafts)) + 1e-3


@pytest.mark.parametrize('num_drafts', [1, 2, 4, 8])
@pytest.mark.parametrize(('scale', 'spread'), [(1, 1), (4, 1), (3, 0.1), (8, 2)])
def test_bins_cost_little_at_a_large_vocabulary(scale, spread, num_drafts):
  rng = np.random.default_rng(0)
  base = scale * rng.standard_normal((2, 50_000))
  p, q = (
    jax.nn.softmax(jnp.asarray(base + spread * rng.standard_normal(base.shape), jnp.float32))
    for _ in range(2)
  )
  plan, bins = _binned_plan(p, q, num_drafts)
  chosen = q * jnp.take_along_axis(plan.ratio, bins, axis=1)
  np.testing.assert_allclose(chosen.sum(-1), 1, atol=2e-5)  # what single precision costs
  attained = jnp.minimum(p, chosen).sum(-1)
  optimum = theory.optimal_acceptance_with_replacement(p, q, num_drafts)
  assert jnp.all(attained >= optimum - 0.0015), (attained, optimum)


@jax.jit
def _binned_plan(p, q, num_drafts):
  bins = jnp.minimum((p / (p + q) * NUM_BINS).astype(jnp.int32), NUM_BINS - 1)
  rows, empty = jnp.arange(p.shape[0])[:, None], jnp.zeros((p.shape[0], NUM_BINS))
  p_mass, q_mass = (empty.at[rows, bins].add(law) for law in (p, q))
  return plan_choice(p_mass, q_mass, jnp.full(p.shape[:1], num_drafts)), bins


def test_there_must_be_bins():
  with pytest.raises(ValueError, match='num_bins'):
    verifiers.optimal(num_bins=0)

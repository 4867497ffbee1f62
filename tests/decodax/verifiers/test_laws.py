"""The pieces of the chain rules at the edges: equal laws, nothing left, ids that do not exist."""

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.trees import chain_proposal
from decodax.verifiers.laws import accept_probabilities
from decodax.verifiers.laws import draft_law_at
from decodax.verifiers.laws import probability_of
from decodax.verifiers.laws import residual

V = 50


def _chain(logits, tokens, laws=None):
  tokens = jnp.asarray(tokens, jnp.int32)
  count = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
  return chain_proposal(jnp.zeros_like(count), tokens, count, laws), logits


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_equal_laws_accept_surely_in_any_precision(dtype):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(3 * rng.standard_normal((4, 3, V)), dtype)
  proposal, logits = _chain(logits, rng.integers(0, V, (4, 2)), logits[:, :-1])
  np.testing.assert_array_equal(accept_probabilities(proposal, logits), 1)


def test_the_residual_always_is_a_law():
  rng = np.random.default_rng(0)
  p, q = (rng.dirichlet(np.ones(V), 3).astype(np.float32) for _ in range(2))
  one_hot = np.eye(V, dtype=np.float32)[:3]
  tiny = (1e-30 * p).astype(np.float32)  # of any mass, as in block verification
  for law, other in [(p, q), (p, p), (one_hot, one_hot), (p, 0 * q), (tiny, q), (tiny, 0 * q)]:
    left = np.asarray(residual(jnp.asarray(law), jnp.asarray(other)))
    assert np.all(left >= 0)
    np.testing.assert_allclose(left.sum(-1), 1, rtol=1e-5)
    if not np.any(law > other):
      np.testing.assert_allclose(left, law / law.sum(-1, keepdims=True), rtol=1e-5)


def test_ids_outside_the_vocabulary_are_impossible():
  logits = jnp.zeros((1, 4, V))
  tokens = jnp.asarray([[-1, V, 2**31 - 1, 3]], jnp.int32)
  np.testing.assert_allclose(probability_of(logits, tokens), [[0, 0, 0, 1 / V]], rtol=1e-6)


def test_the_law_of_a_certain_draft_is_a_point_mass():
  proposal, logits = _chain(jnp.zeros((1, 3, V)), [[7, 9]])
  for node, token in [(0, 7), (1, 9)]:
    law = draft_law_at(proposal, jnp.asarray([node]), logits[:, 0])
    assert law[0, token] == 1 and law.sum() == 1
  assert draft_law_at(proposal, jnp.asarray([2]), logits[:, 0]).sum() == 0

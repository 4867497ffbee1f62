"""Few random numbers give the law that noise for every token gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.drafters import draws

_V = 700  # three blocks, the last one ragged


def _uniforms(seed, num_nodes, num_draws, batch_size=1):
  shape = (batch_size, num_nodes, draws.num_uniforms(num_draws))
  return jax.random.uniform(jax.random.key(seed), shape)


def _law(weights):
  """Returns f32[V] logits, not normalised, with these weights by token and none elsewhere."""
  law = np.full(_V, -np.inf, np.float32)
  for token, weight in weights.items():
    law[token] = np.log(weight) + 3
  return law


_WEIGHTS = {0: 0.1, 255: 0.3, 256: 0.05, 511: 0.25, 640: 0.2, 699: 0.1}


def _many(draw, law, num_draws, count, seed=0):
  laws = jnp.broadcast_to(jnp.asarray(law), (1, count, law.shape[0]))
  return jax.jit(draw)(laws, _uniforms(seed, count, num_draws))


def _chi_square(counts, probabilities):
  expected = counts.sum() * probabilities
  return ((counts - expected) ** 2 / expected).sum()


def test_ordered_draws_without_replacement_have_their_law():
  count = 60_000
  tokens = np.asarray(_many(draws.without_replacement, _law(_WEIGHTS), 2, count).tokens[0])
  pairs = list(itertools.permutations(_WEIGHTS, 2))
  law = np.array([_WEIGHTS[a] * _WEIGHTS[b] / (1 - _WEIGHTS[a]) for a, b in pairs])
  counts = np.array([(tokens == pair).all(-1).sum() for pair in pairs])
  assert counts.sum() == count
  assert _chi_square(counts, law) < 58.3  # 29 degrees of freedom, one in a thousand


def test_independent_draws_have_their_law():
  count = 60_000
  tokens = np.asarray(_many(draws.independent, _law(_WEIGHTS), 2, count).tokens[0])
  pairs = list(itertools.product(_WEIGHTS, repeat=2))
  law = np.array([_WEIGHTS[a] * _WEIGHTS[b] for a, b in pairs])
  counts = np.array([(tokens == pair).all(-1).sum() for pair in pairs])
  assert _chi_square(counts, law) < 66.6  # 35 degrees of freedom, one in a thousand


def test_scores_are_distributed_like_perturbed_log_probabilities():
  """Sorted, they agree with the K largest of log-probability plus Gumbel noise (two samples)."""
  count, num_draws = 20_000, 3
  law = _law(_WEIGHTS)
  found = np.asarray(_many(draws.without_replacement, law, num_draws, count).scores[0])
  noise = jax.random.gumbel(jax.random.key(1), (count, _V))
  expected = np.asarray(jax.lax.top_k(jax.nn.log_softmax(law)[None] + noise, num_draws)[0])
  assert (np.diff(found, axis=-1) <= 0).all()
  for index in range(num_draws):
    both = np.concatenate([found[:, index], expected[:, index]])
    order = np.argsort(both, kind='stable')
    steps = np.where(order < count, 1, -1) / count
    assert np.abs(np.cumsum(steps)).max() < 1.95 * np.sqrt(2 / count)  # Kolmogorov, 0.001


def test_score_and_token_of_the_first_draw_are_independent():
  found = _many(draws.without_replacement, _law(_WEIGHTS), 1, 60_000)
  tokens, scores = np.asarray(found.tokens[0, :, 0]), np.asarray(found.scores[0, :, 0])
  means = [scores[tokens == token].mean() for token in _WEIGHTS]
  np.testing.assert_allclose(means, np.euler_gamma, atol=0.08)  # 5000 of deviation 1.28 at least


def test_log_q_is_the_laws():
  law = np.random.default_rng(0).normal(size=(2, 3, _V)).astype(np.float32) * 2
  for draw in (draws.without_replacement, draws.independent):
    found = draw(jnp.asarray(law), _uniforms(3, 3, 5, batch_size=2))
    expected = np.take_along_axis(
      np.asarray(jax.nn.log_softmax(law)), np.asarray(found.tokens), axis=-1
    )
    np.testing.assert_allclose(found.log_q, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('uniform', [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_tokens_outside_the_support_are_never_drawn(uniform):
  """Also where the numbers are the smallest and largest there are."""
  uniforms = jnp.full((1, 1, draws.num_uniforms(8)), uniform, jnp.float32)
  found = draws.without_replacement(jnp.asarray(_law(_WEIGHTS))[None, None], uniforms)
  drawn = np.asarray(found.scores[0, 0]) > -np.inf
  np.testing.assert_array_equal(drawn, [True] * len(_WEIGHTS) + [False] * 2)
  assert sorted(np.asarray(found.tokens[0, 0])[drawn]) == sorted(_WEIGHTS)
  assert np.isfinite(np.asarray(found.scores[0, 0])[drawn]).all()
  assert (np.asarray(found.log_q[0, 0])[~drawn] == -np.inf).all()


def test_one_certain_token_and_small_vocabularies():
  law = jnp.asarray([[[-jnp.inf, 7.0, -jnp.inf]]])
  found = draws.without_replacement(law, _uniforms(0, 1, 2))
  assert found.tokens[0, 0, 0] == 1
  np.testing.assert_array_equal(found.log_q[0, 0], [0, -np.inf])
  again = draws.independent(law, _uniforms(0, 1, 4))
  assert (np.asarray(again.tokens) == 1).all()

"""Few random numbers give the law that noise for every token gives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.drafters import draws

_V = 700  # three blocks, the last one ragged
_WEIGHTS = {0: 0.1, 255: 0.3, 256: 0.05, 511: 0.25, 640: 0.2, 699: 0.1}


def _law(weights):
  """Returns f32[V] logits, not normalised, with these weights by token and none elsewhere."""
  law = np.full(_V, -np.inf, np.float32)
  for token, weight in weights.items():
    law[token] = np.log(weight) + 3
  return law


def _noise(seed, shape):
  return lambda size: jax.random.gumbel(jax.random.key(seed), (*shape, size))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _many(law, num_draws, count):
  """Returns draws from a law, `count` times."""
  laws = jnp.broadcast_to(law, (1, count, law.shape[0]))
  return draws.without_replacement(laws, _noise(0, (1, count)), num_draws)


def _chi_square(counts, probabilities):
  expected = counts.sum() * probabilities
  return ((counts - expected) ** 2 / expected).sum()


def test_ordered_draws_have_their_law():
  count = 60_000
  tokens = np.asarray(_many(_law(_WEIGHTS), 2, count).tokens[0])
  pairs = list(itertools.permutations(_WEIGHTS, 2))
  law = np.array([_WEIGHTS[a] * _WEIGHTS[b] / (1 - _WEIGHTS[a]) for a, b in pairs])
  counts = np.array([(tokens == pair).all(-1).sum() for pair in pairs])
  assert counts.sum() == count
  assert _chi_square(counts, law) < 58.3  # 29 degrees of freedom, one in a thousand


@pytest.mark.parametrize('num_draws', [3, 5])  # as many as there are blocks, and more
def test_scores_are_distributed_like_perturbed_log_probabilities(num_draws):
  """Each agrees with the largest of log-probability plus Gumbel noise of its rank (two samples)."""
  count = 20_000
  law = _law(_WEIGHTS)
  found = np.asarray(_many(law, num_draws, count).scores[0])
  noise = jax.random.gumbel(jax.random.key(1), (count, _V))
  expected = np.asarray(jax.lax.top_k(jax.nn.log_softmax(law)[None] + noise, num_draws)[0])
  assert (np.diff(found, axis=-1) <= 0).all()
  for index in range(num_draws):
    both = np.concatenate([found[:, index], expected[:, index]])
    order = np.argsort(both, kind='stable')
    steps = np.where(order < count, 1, -1) / count
    assert np.abs(np.cumsum(steps)).max() < 1.95 * np.sqrt(2 / count)  # Kolmogorov, 0.001


def test_score_and_token_of_the_first_draw_are_independent():
  found = _many(_law(_WEIGHTS), 1, 60_000)
  tokens, scores = np.asarray(found.tokens[0, :, 0]), np.asarray(found.scores[0, :, 0])
  means = [scores[tokens == token].mean() for token in _WEIGHTS]
  np.testing.assert_allclose(means, np.euler_gamma, atol=0.08)  # 3000 of deviation 1.28 at least


def test_log_q_is_the_laws():
  law = np.random.default_rng(0).normal(size=(2, 3, _V)).astype(np.float32) * 2
  found = draws.without_replacement(jnp.asarray(law), _noise(3, (2, 3)), 5)
  expected = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(law)), np.asarray(found.tokens), axis=-1
  )
  np.testing.assert_allclose(found.log_q, expected, rtol=1e-5, atol=1e-5)
  assert all(len(set(row)) == 5 for row in np.asarray(found.tokens).reshape(-1, 5))


@pytest.mark.parametrize('seed', range(4))
def test_tokens_outside_the_support_are_never_drawn(seed):
  law = jnp.asarray(_law(_WEIGHTS))[None, None]
  found = draws.without_replacement(law, _noise(seed, (1, 1)), 8)
  drawn = np.asarray(found.scores[0, 0]) > -np.inf
  np.testing.assert_array_equal(drawn, [True] * len(_WEIGHTS) + [False] * 2)
  assert sorted(np.asarray(found.tokens[0, 0])[drawn]) == sorted(_WEIGHTS)
  assert np.isfinite(np.asarray(found.scores[0, 0])[drawn]).all()
  assert (np.asarray(found.log_q[0, 0])[~drawn] == -np.inf).all()


def test_a_certain_token_has_the_noise_of_its_draw_alone():
  found = draws.without_replacement(jnp.asarray(_law({300: 1.0}))[None, None], _noise(0, (1, 1)), 2)
  assert found.tokens[0, 0, 0] == 300 and found.scores[0, 0, 1] == -np.inf
  np.testing.assert_array_equal(found.log_q[0, 0], [0, -np.inf])


def test_conditioning_keeps_order_and_maximum():
  rng = np.random.default_rng(0)
  perturbed = jnp.asarray(-np.sort(-rng.gumbel(size=(3, 5, 7)), axis=-1), jnp.float32)
  maximum = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32).at[0, 0].set(-jnp.inf)
  out = np.asarray(draws.condition_on_maximum(perturbed, maximum))
  np.testing.assert_array_equal(out[..., 0], maximum)
  assert (np.diff(out[1:], axis=-1) <= 0).all() and not np.isnan(out).any()
  assert (out[0, 0] == -np.inf).all()
  none = draws.condition_on_maximum(jnp.full((2, 3), -jnp.inf), jnp.asarray([1.0, -jnp.inf]))
  assert (np.asarray(none) == -np.inf).all()
  # Where the given maximum is the one there is, nothing changes.
  same = draws.condition_on_maximum(perturbed, perturbed[..., 0])
  np.testing.assert_allclose(same, perturbed, atol=1e-5)

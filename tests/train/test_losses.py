"""Losses against the formulas written out, chunked ones against dense ones, sums over parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import losses

_RNG = np.random.default_rng(0)
_P, _Q = (_RNG.normal(size=(3, 5, 11)).astype(np.float32) * 2 for _ in range(2))


def _law(logits):
  e = np.exp(np.asarray(logits, np.float64) - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


_p, _q = _law(_P), _law(_Q)
_m = 0.3 * _p + 0.7 * _q
_alpha = np.minimum(_p, _q).sum(-1)
_top = np.argsort(-_P, axis=-1)[..., :4]


def _list_mle(scores):
  return sum(
    np.log(np.exp(scores[..., i:]).sum(-1)) - scores[..., i] for i in range(scores.shape[-1])
  )


_EXPECTED = {
  'forward_kl': (losses.forward_kl, (_p * np.log(_p / _q)).sum(-1)),
  'soft_cross_entropy': (losses.soft_cross_entropy, -(_p * np.log(_q)).sum(-1)),
  'reverse_kl': (losses.reverse_kl, (_q * np.log(_q / _p)).sum(-1)),
  'jensen_shannon': (
    lambda p, q: losses.jensen_shannon(p, q, beta=0.3),
    0.3 * (_p * np.log(_p / _m)).sum(-1) + 0.7 * (_q * np.log(_q / _m)).sum(-1),
  ),
  'total_variation': (losses.total_variation, 0.5 * np.abs(_p - _q).sum(-1)),
  'acceptance': (losses.acceptance, 1 - 0.5 * np.abs(_p - _q).sum(-1)),
  'negative_log_acceptance': (losses.negative_log_acceptance, -np.log(_alpha)),
  'lk_hybrid': (
    lambda p, q: losses.lk_hybrid(p, q, eta=3.0),
    np.exp(-3 * _alpha) * (_p * np.log(_p / _q)).sum(-1) + (1 - np.exp(-3 * _alpha)) * (1 - _alpha),
  ),
  'top_k_cross_entropy': (
    lambda p, q: losses.top_k_cross_entropy(p, q, k=4),
    -(np.take_along_axis(_p, _top, -1) * np.log(np.take_along_axis(_q, _top, -1))).sum(-1),
  ),
  'list_mle': (
    lambda p, q: losses.list_mle(p, q, k=4),
    _list_mle(np.take_along_axis(_Q, _top, -1).astype(np.float64)),
  ),
}


@pytest.mark.parametrize('name', _EXPECTED)
def test_a_divergence_is_its_formula(name):
  fn, expected = _EXPECTED[name]
  np.testing.assert_allclose(fn(_P, _Q), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name', [n for n in losses.DIVERGENCES if n != 'list_mle'])
def test_a_divergence_falls_where_its_gradient_says(name):
  fn = losses.get_divergence(name)
  value = lambda q: fn(jnp.asarray(_P), q).sum()  # noqa: E731
  gradient = jax.grad(value)(jnp.asarray(_Q))
  assert np.isfinite(gradient).all()
  assert value(jnp.asarray(_Q) - 0.01 * gradient) < value(jnp.asarray(_Q))


def test_impossible_tokens_weigh_nothing():
  p = jnp.array([[0.0, 1.0, -jnp.inf]])
  q = jnp.array([[0.5, 0.2, -jnp.inf]])
  for fn in (losses.forward_kl, losses.reverse_kl, losses.total_variation):
    np.testing.assert_allclose(fn(p, q), fn(p[:, :2], q[:, :2]), rtol=1e-6)


def test_negative_log_acceptance_trains_from_far_away():
  p, q = jnp.array([[20.0, 0.0]]), jnp.array([[0.0, 20.0]])
  far = jax.grad(lambda q: losses.negative_log_acceptance(p, q).sum())(q)
  lost = jax.grad(lambda q: losses.total_variation(p, q).sum())(q)
  assert np.abs(far).max() > 0.4 > 1e-6 > np.abs(lost).max()


def test_smooth_l1_is_its_formula():
  x, y = _RNG.normal(size=(2, 4, 6)) * 2
  error = np.abs(x - y)
  expected = np.where(error < 1, 0.5 * error**2, error - 0.5).mean(-1)
  np.testing.assert_allclose(losses.smooth_l1(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-5)


def test_masked_ignores_what_has_no_weight():
  values, weights = jnp.array([[1.0, jnp.nan], [3.0, 5.0]]), jnp.array([[1.0, 0.0], [2.0, 1.0]])
  mean = losses.masked(values, weights)
  assert float(mean.value) == pytest.approx((1 + 6 + 5) / 4)
  gradient = jax.grad(lambda v: losses.masked(v, weights).total)(values)
  np.testing.assert_array_equal(gradient, weights)


_HIDDEN_P, _HIDDEN_Q = (jnp.asarray(_RNG.normal(size=(2, 13, 6)), jnp.float32) for _ in range(2))
_HEAD_P, _HEAD_Q = (jnp.asarray(_RNG.normal(size=(6, 11)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize('chunk', [4, 13, 64])
def test_chunks_change_nothing(chunk):
  def run(head, hidden, chunk):
    found = losses.compare(
      lambda h: h @ _HEAD_P, lambda h: h @ head, _HIDDEN_P, hidden, chunk=chunk
    )
    return found.loss.sum(), found

  grad = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
  (_, found), gradients = grad(_HEAD_Q, _HIDDEN_Q, chunk)
  p, q = _HIDDEN_P @ _HEAD_P, _HIDDEN_Q @ _HEAD_Q
  np.testing.assert_allclose(found.loss, losses.forward_kl(p, q), rtol=1e-5)
  np.testing.assert_allclose(found.acceptance, losses.acceptance(p, q), rtol=1e-5)
  np.testing.assert_array_equal(found.correct, p.argmax(-1) == q.argmax(-1))
  assert float(found.covered.min()) == 1

  def dense(head, hidden):
    return losses.forward_kl(p, hidden @ head).sum()

  for got, want in zip(gradients, jax.grad(dense, (0, 1))(_HEAD_Q, _HIDDEN_Q), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_array_of_all_logits_is_built():
  def run(hidden):
    found = losses.compare(lambda h: h @ _HEAD_P, lambda h: h @ _HEAD_Q, hidden, hidden, chunk=4)
    return found.loss.sum()

  text = jax.jit(jax.grad(run)).lower(jnp.zeros((2, 64, 6))).as_text()
  assert '2x4x11xf32' in text and '2x64x11xf32' not in text


def test_a_draft_vocabulary_is_judged_by_the_whole_law():
  keep = jnp.array([1, 4, 5, 9])
  p, q = _HIDDEN_P @ _HEAD_P, _HIDDEN_Q @ _HEAD_Q[:, keep]
  found = losses.compare(
    lambda h: h @ _HEAD_P, lambda h: h @ _HEAD_Q[:, keep], _HIDDEN_P, _HIDDEN_Q, keep=keep
  )
  np.testing.assert_allclose(found.loss, losses.forward_kl(p[..., keep], q), rtol=1e-5)
  whole = np.zeros(p.shape, np.float32)
  whole[..., keep] = jax.nn.softmax(q)
  overlap = np.minimum(jax.nn.softmax(p), whole).sum(-1)
  np.testing.assert_allclose(found.acceptance, overlap, rtol=1e-5)
  np.testing.assert_array_equal(found.correct, p.argmax(-1) == keep[q.argmax(-1)])
  np.testing.assert_array_equal(found.covered, np.isin(p.argmax(-1), keep))


def test_labels_outside_a_draft_vocabulary_cost_nothing():
  keep, labels = jnp.array([1, 4, 5, 9]), jnp.asarray(_RNG.integers(0, 11, (2, 13)))
  found = losses.compare(
    lambda h: h @ _HEAD_P, lambda h: h @ _HEAD_Q[:, keep], _HIDDEN_P, _HIDDEN_Q,
    keep=keep, labels=labels,
  )  # fmt: skip
  log_q = jax.nn.log_softmax(_HIDDEN_Q @ _HEAD_Q[:, keep])
  for row, column in np.ndindex(2, 13):
    index = np.flatnonzero(np.asarray(keep) == labels[row, column])
    expected = -log_q[row, column, index[0]] if len(index) else 0.0
    assert float(found.loss[row, column]) == pytest.approx(float(expected), rel=1e-5)


def test_position_weights():
  np.testing.assert_allclose(losses.geometric_weights(3, 0.8), [1, 0.8, 0.64], rtol=1e-6)
  np.testing.assert_allclose(
    losses.exponential_weights(3, 4.0), np.exp([0, -0.25, -0.5]), rtol=1e-6
  )


def test_survival_weights_are_the_sums_of_later_survival():
  ce, mask = np.array([[0.1, 0.7, 0.3, 0.9]]), np.array([[1, 1, 1, 0]])
  s = np.where(mask > 0, 0.5 * np.exp(-ce) + 0.5, 1)
  reach = np.cumprod(s, -1) * mask
  expected = [[reach[0, j:].sum() * mask[0, j] for j in range(4)]]
  found = losses.survival_weights(jnp.asarray(ce), jnp.asarray(mask))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_depth_metrics_and_simulated_tokens_per_call():
  correct = [jnp.array([[1.0, 1.0, 0.0, 1.0]]), jnp.array([[1.0, 0.0, 1.0, 1.0]])]
  weights = [jnp.array([[1.0, 1.0, 1.0, 1.0]]), jnp.array([[1.0, 1.0, 1.0, 0.0]])]
  found = {k: float(v.value) for k, v in losses.depth_metrics(correct, weights, correct).items()}
  assert found['accuracy/1'] == pytest.approx(3 / 4)
  assert found['accuracy/2'] == pytest.approx(2 / 3)
  assert found['conditional/2'] == pytest.approx(1 / 2)  # of the two whose first was right
  assert found['reach/2'] == pytest.approx(1 / 3)
  assert losses.tokens_per_call(found) == pytest.approx(1 + 3 / 4 + 1 / 3)
  assert losses.tokens_per_call({'loss': 1.0}) is None


def test_an_unknown_divergence_is_named():
  with pytest.raises(ValueError, match="unknown divergence 'kl'; there are forward_kl"):
    losses.get_divergence('kl')

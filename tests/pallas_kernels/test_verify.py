"""Verify against plain jnp: the XLA form against first principles, the kernels against it.

Axes: `B` batch, `N` nodes, `V` vocabulary, `K` tokens asked for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import sampling
from decodax.types import Sampling
from pallas_kernels.verify import core
from pallas_kernels.verify import gpu
from pallas_kernels.verify import tpu
from pallas_kernels.verify import verify
from tests.pallas_kernels.interpreter import assert_no_races
from tests.pallas_kernels.interpreter import compiled
from tests.pallas_kernels.interpreter import strict

_B, _N, _V, _K = 5, 3, 2500, 2
_SAMPLING = Sampling(
  temperature=jnp.asarray([0.0, 1.0, 0.7, 1.3, 1.0]),
  top_k=jnp.asarray([0, 0, 20, 40, 0]),
  top_p=jnp.asarray([1.0, 0.9, 1.0, 0.8, 1.0]),
  min_p=jnp.asarray([0.0, 0.0, 0.01, 0.05, 0.0]),
)
_WARP = {name: getattr(_SAMPLING, name) for name in ('temperature', 'top_k', 'top_p', 'min_p')}


def _problem(seed=0):
  """Returns (logits, tokens, laws, residual, keys); tokens are likely, any, or outside of V."""
  rng = np.random.default_rng(seed)
  logits = (rng.standard_normal((_B, _N, _V)) * 3).astype(np.float32)
  logits[4, :, ::3] = -np.inf
  laws = logits + rng.standard_normal(logits.shape).astype(np.float32)
  tokens = rng.integers(-1, _V + 1, (_B, _N, _K))
  tokens[..., 0] = logits.argmax(-1)
  tokens[0, 0], tokens[1, 1] = (-1, _V), (_V, -1)
  residual = rng.random((_B, _N)) < 0.6
  keys = jax.random.split(jax.random.key(seed), (_B, _N))
  return (
    jnp.asarray(logits), jnp.asarray(tokens, jnp.int32), jnp.asarray(laws), jnp.asarray(residual),
    keys,
  )  # fmt: skip


def test_the_reference_is_what_the_loop_samples_from():
  logits, tokens, _, _, keys = _problem()
  found = verify(logits, tokens, **_WARP, keys=keys)
  warped = sampling.warp(logits, _SAMPLING)
  law = jax.nn.log_softmax(warped, -1)
  noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (_V,))))(keys)
  np.testing.assert_array_equal(found.sample, jnp.argmax(warped + noise, -1))
  np.testing.assert_array_equal(found.argmax, jnp.argmax(logits, -1))
  np.testing.assert_allclose(found.log_normalizer, jax.nn.logsumexp(warped, -1), rtol=1e-5)
  for place in np.ndindex(_B, _N, _K):
    token = int(tokens[place])
    known = float(law[(*place[:2], token)]) if 0 <= token < _V else -np.inf
    np.testing.assert_allclose(found.log_probs[place], known, rtol=1e-5, atol=1e-6)


def test_the_reference_residual_is_what_p_has_more_than_q():
  logits, tokens, laws, _, _ = _problem()
  always = jnp.ones((_B, _N), bool)
  check = functools.partial(verify, logits, tokens, temperature=jnp.ones((_B,)))
  p, q = (np.asarray(jax.nn.softmax(a, -1), np.float64) for a in (logits, laws))
  left = np.maximum(p - q, 0)
  draws = []
  for seed in range(40):
    keys = jax.random.split(jax.random.key(seed), (_B, _N))
    found = check(laws=laws, residual=always, keys=keys)
    draws.append(np.asarray(found.sample))
  assert found.excess is not None
  np.testing.assert_allclose(found.excess, left.sum(-1), atol=1e-6)
  drawn = np.take_along_axis(left, np.stack(draws, -1), axis=-1)
  assert (drawn > 0).all()
  found = check(residual=always, keys=keys)  # q is a 1 at tokens[..., 0]
  assert (np.asarray(found.sample) != np.asarray(tokens[..., 0])).all()


@pytest.mark.parametrize('draft', ['none', 'laws', 'certain'])
@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_the_kernels_equal_the_reference(name, draft):
  logits, tokens, laws, residual, keys = _problem()
  options = dict(_WARP, keys=keys)
  if draft != 'none':
    options |= dict(residual=residual, laws=laws if draft == 'laws' else None)
  kernel = {
    'tpu': functools.partial(tpu.verify_tpu, interpret=strict()),
    'gpu': functools.partial(gpu.verify_gpu, interpret=True),
  }[name]
  found = compiled(kernel)(logits, tokens, **options)
  expected = verify(logits, tokens, **options, implementation='xla')
  for field, ours, theirs in zip(found._fields, found, expected, strict=True):
    assert (ours is None) == (theirs is None), field
    if ours is not None and theirs is not None:
      np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5, err_msg=field)
  if name == 'tpu':
    assert_no_races()


def test_the_noise_is_that_of_jax():
  key = jax.random.key(7)
  words = jax.lax.bitcast_convert_type(jax.random.key_data(key), jnp.int32).reshape(2, 1, 1)
  ours = core.gumbel((words[0], words[1]), jnp.arange(1000)[None])
  np.testing.assert_array_equal(ours[0], jax.random.gumbel(key, (1000,)))


def test_floats_map_to_ordered_integers_and_back():
  floats = jnp.asarray([-np.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 1.0, 3e38, np.inf], jnp.float32)
  bits = core.ordered_bits(floats)
  assert (np.diff(np.asarray(bits, np.int64)) > 0).all()
  np.testing.assert_array_equal(core.from_ordered_bits(bits), floats)


def test_bad_arguments_are_refused():
  logits, tokens, _, _, _ = _problem()
  ones = jnp.ones((_B,))
  with pytest.raises(ValueError, match=r'tokens must be i32\[B, N, K\]'):
    verify(logits, tokens[..., 0], temperature=ones)
  with pytest.raises(ValueError, match=r'top_k must have shape \[B\]'):
    verify(logits, tokens, temperature=ones, top_k=jnp.ones((2,), jnp.int32))
  with pytest.raises(ValueError, match='typed keys'):
    verify(logits, tokens, temperature=ones, keys=jnp.zeros((_B, _N), jnp.uint32))
  with pytest.raises(NotImplementedError, match='do not fit into vector memory'):
    huge = jax.ShapeDtypeStruct((1, 8, 2_000_000), jnp.float32)
    few = jax.ShapeDtypeStruct((1, 8, 1), jnp.int32)
    jax.eval_shape(
      functools.partial(verify, implementation='tpu'), huge, few, temperature=jnp.ones((1,))
    )

"""Block attention against a dense softmax in NumPy, float64.

Axes: `B` batch, `T` queries, `N` block tokens, `S` slots, `L` layers, `H` query heads, `Hkv` heads
of keys and values, `Dh` head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import Prefix
from pallas_kernels.block_attention import block_attention

_H, _HKV, _DH, _S, _L = 6, 2, 8, 256, 2
_LENGTHS = np.asarray([0, 1, 127, 128, 129])  # around the borders of the blocks that are read
_B = len(_LENGTHS)
_SCALE = 0.3


@functools.cache
def _jitted(**options):
  return jax.jit(functools.partial(block_attention, scale=_SCALE, **options))


def _inputs(seed=0, *, num_queries=3, num_keys=None, dtype=np.float32, dead=np.nan):
  """Returns (queries, keys, values, mask, prefix) with a random mask; dead slots hold `dead`."""
  rng = np.random.default_rng(seed)
  num_keys = num_keys or num_queries

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  mask = rng.random((_B, num_queries, num_keys)) < 0.5
  mask |= np.eye(num_queries, num_keys, dtype=bool)[None]  # a token sees itself
  live = (np.arange(_S)[None] < _LENGTHS[:, None])[None, :, None, :, None]
  keys, values = (
    jnp.where(live, normal(_L, _B, _HKV, _S, _DH), dead).astype(dtype) for _ in range(2)
  )
  # Slot order carries no meaning: positions are shuffled.
  positions = np.stack([rng.permutation(_S) for _ in range(_B)]).astype(np.int32)
  prefix = Prefix(
    keys, values, jnp.asarray(positions), jnp.asarray(_LENGTHS, jnp.int32), jnp.int32(1)
  )
  return (
    normal(_B, num_queries, _H, _DH),
    normal(_B, _HKV, num_keys, _DH),
    normal(_B, _HKV, num_keys, _DH),
    jnp.asarray(mask),
    prefix,
  )


def _dense(
  queries, keys, values, mask, prefix=None, *,
  soft_cap=None, window=None, query_positions=None, key_positions=None,
):  # fmt: skip
  """Returns f64[B, T, H, Dh], one softmax over all that a query may see."""
  queries, keys, values = (np.asarray(a, np.float64) for a in (queries, keys, values))
  out = np.zeros(queries.shape)
  for row in range(queries.shape[0]):
    length = 0 if prefix is None else int(prefix.length[row])
    for head in range(queries.shape[2]):
      kv = head // (queries.shape[2] // keys.shape[1])
      some_keys, some_values = keys[row, kv], values[row, kv]
      positions = None if key_positions is None else np.asarray(key_positions)[row]
      if prefix is not None and length:
        layer = int(prefix.layer)
        old = [np.asarray(a, np.float64)[layer, row, kv, :length] for a in prefix[:2]]
        some_keys = np.concatenate([old[0], some_keys])
        some_values = np.concatenate([old[1], some_values])
        if positions is not None:
          positions = np.concatenate([np.asarray(prefix.positions)[row, :length], positions])
      for query in range(queries.shape[1]):
        scores = some_keys @ queries[row, query, head] * _SCALE
        if soft_cap is not None:
          scores = soft_cap * np.tanh(scores / soft_cap)
        seen = np.concatenate([np.ones(length, bool), np.asarray(mask)[row, query]])
        if window is not None:
          seen &= positions > np.asarray(query_positions)[row, query] - window
        weights = np.exp(np.where(seen, scores - scores[seen].max(), -np.inf))
        out[row, query, head] = weights / weights.sum() @ some_values
  return out


@pytest.mark.parametrize('num_queries', [1, 5])
def test_prefix_and_block_share_one_softmax(num_queries):
  """Ragged rows, grouped heads, dead slots full of NaN."""
  inputs = _inputs(num_queries=num_queries)
  out = _jitted()(*inputs)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, _dense(*inputs), atol=2e-6)


def test_without_a_prefix():
  inputs = _inputs(1)[:4]
  np.testing.assert_allclose(_jitted()(*inputs), _dense(*inputs), atol=2e-6)


def test_fewer_queries_than_keys():
  """A token written into a scratch block sees the nodes before it."""
  queries, keys, values, mask, prefix = _inputs(2, num_queries=2, num_keys=7)
  inputs = (queries, keys, values, mask, prefix)
  np.testing.assert_allclose(_jitted()(*inputs), _dense(*inputs), atol=2e-6)


@pytest.mark.parametrize('num_kv_heads', [1, 3, 6])
def test_any_group_size(num_kv_heads):
  rng = np.random.default_rng(0)
  queries = jnp.asarray(rng.standard_normal((2, 3, _H, _DH)), jnp.float32)
  keys, values = (
    jnp.asarray(rng.standard_normal((2, num_kv_heads, 3, _DH)), jnp.float32) for _ in range(2)
  )
  mask = jnp.tril(jnp.ones((2, 3, 3), bool))
  inputs = (queries, keys, values, mask)
  np.testing.assert_allclose(_jitted()(*inputs), _dense(*inputs), atol=2e-6)


@pytest.mark.parametrize('soft_cap', [0.5, 20.0])
def test_soft_cap(soft_cap):
  inputs = _inputs(3)
  out = _jitted(soft_cap=soft_cap)(*inputs)
  np.testing.assert_allclose(out, _dense(*inputs, soft_cap=soft_cap), atol=2e-6)
  assert np.abs(out - _jitted()(*inputs)).max() > 1e-3


@pytest.mark.parametrize('window', [1, 40, 10_000])
def test_a_window_goes_by_position_not_by_slot(window):
  inputs = _inputs(4, num_queries=4)
  query_positions = _S + jnp.asarray([[0, 1, 1, 2]] * _B, jnp.int32)  # siblings share one
  query_positions -= jnp.asarray([[0], [150], [100], [30], [7]])
  options = dict(query_positions=query_positions, key_positions=query_positions)
  out = _jitted()(*inputs, window=jnp.int32(window), **options)
  expected = _dense(*inputs, window=window, **options)
  np.testing.assert_allclose(out, expected, atol=2e-6)
  if window == 10_000:
    np.testing.assert_allclose(out, _jitted()(*inputs), atol=2e-6)


def test_bfloat16_is_close_and_stays_bfloat16():
  inputs = _inputs(5, dtype=jnp.bfloat16)
  out = _jitted()(*inputs)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float32), _dense(*inputs), atol=0.02)


def test_dead_slots_are_never_read():
  outs = [_jitted()(*_inputs(6, dead=dead)) for dead in (0.0, np.nan, np.inf, 1e30)]
  for out in outs[1:]:
    np.testing.assert_array_equal(out, outs[0])


def test_a_row_is_the_same_to_the_bit_beside_any_neighbour_and_at_any_capacity():
  queries, keys, values, mask, prefix = _inputs(7)
  out = np.asarray(_jitted()(queries, keys, values, mask, prefix))
  longest = int(np.argmax(_LENGTHS))
  shorter = prefix._replace(length=prefix.length.at[longest].set(0))  # one block fewer to read
  others = np.arange(_B) != longest
  np.testing.assert_array_equal(
    _jitted()(queries, keys, values, mask, shorter)[others], out[others]
  )
  roomy = prefix._replace(
    keys=jnp.pad(prefix.keys, ((0, 0),) * 3 + ((0, 256), (0, 0)), constant_values=np.nan),
    values=jnp.pad(prefix.values, ((0, 0),) * 3 + ((0, 256), (0, 0)), constant_values=np.nan),
    positions=jnp.pad(prefix.positions, ((0, 0), (0, 256))),
  )
  np.testing.assert_array_equal(_jitted()(queries, keys, values, mask, roomy), out)


@pytest.mark.parametrize('size', [64, 256])
def test_any_read_size_gives_the_same(size):
  inputs = _inputs(8)
  out = _jitted(prefix_block_size=size)(*inputs)
  np.testing.assert_allclose(out, _jitted()(*inputs), atol=1e-6)


def test_large_scores_do_not_overflow():
  queries, *rest = _inputs(9)
  inputs = (queries * 1e3, *rest)
  out = _jitted()(*inputs)
  np.testing.assert_allclose(out, _dense(*inputs), atol=1e-3)


def test_only_the_layer_asked_for_is_read():
  *inputs, prefix = _inputs(10)
  poisoned = prefix._replace(
    keys=prefix.keys.at[0].set(jnp.nan), values=prefix.values.at[0].set(jnp.nan)
  )
  np.testing.assert_array_equal(_jitted()(*inputs, poisoned), _jitted()(*inputs, prefix))
  other = _jitted()(*inputs, prefix._replace(layer=jnp.int32(0)))
  assert np.any(np.asarray(other)[1:] != np.asarray(_jitted()(*inputs, prefix))[1:])


def test_a_named_implementation_works_or_says_why_not():
  inputs = _inputs(11)
  named = block_attention(*inputs, scale=_SCALE, implementation='xla')
  np.testing.assert_allclose(named, _jitted()(*inputs), atol=1e-6)
  with pytest.raises(NotImplementedError, match="no 'sundial' implementation"):
    block_attention(*inputs, scale=_SCALE, implementation='sundial')


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(values=(_B, _HKV, 4, _DH)), r'keys and values must be \[B, Hkv, N, Dh\]'),
    (dict(keys=(_B, 3, _DH), values=(_B, 3, _DH)), r'must be \[B, Hkv, N, Dh\]'),
    (dict(keys=(_B, 4, 3, _DH), values=(_B, 4, 3, _DH)), 'keys do not fit the queries'),
    (dict(keys=(_B, _HKV, 3, 4), values=(_B, _HKV, 3, 4)), 'keys do not fit the queries'),
    (dict(mask=(_B, 3, 4)), r'mask must be bool\[B, T, N\]: mask.shape=\(5, 3, 4\)'),
  ],
)
def test_shapes_that_disagree_are_refused(change, message):
  names = ('queries', 'keys', 'values', 'mask', 'prefix')
  inputs: dict[str, Any] = dict(zip(names, _inputs(12), strict=True))
  inputs |= {name: jnp.zeros(shape, inputs[name].dtype) for name, shape in change.items()}
  with pytest.raises(ValueError, match=message):
    block_attention(*inputs.values(), scale=_SCALE)


def test_a_window_without_positions_and_a_foreign_prefix_are_refused():
  *inputs, prefix = _inputs(13)
  with pytest.raises(ValueError, match='a window needs query_positions and key_positions'):
    _jitted()(*inputs, prefix, window=jnp.int32(4))
  with pytest.raises(ValueError, match=r'prefix must be \[L, B, Hkv, S, Dh\]'):
    _jitted()(*inputs, prefix._replace(keys=prefix.keys[:, :2]))

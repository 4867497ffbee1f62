"""The cache against lists of Python: ragged commits, gathered paths, scratch blocks.

Axes: `L` layers, `B` batch, `Hkv` heads, `S` slots, `N` nodes, `K` path, `Dh` head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import kv_cache
from decodax.kv_cache import KVBlock
from decodax.kv_cache import KVCache

_L, _B, _HKV, _DH, _S, _N = 2, 4, 3, 2, 256, 6
_LENGTHS = np.asarray([0, 5, 127, 200])
_commit = jax.jit(kv_cache.commit_kv)


def _block(seed, num_nodes=_N):
  rng = np.random.default_rng(seed)
  shape = (_L, _B, _HKV, num_nodes, _DH)
  return KVBlock(
    keys=jnp.asarray(rng.standard_normal(shape), jnp.float32),
    values=jnp.asarray(rng.standard_normal(shape), jnp.float32),
    positions=jnp.asarray(rng.integers(0, 1000, (_B, num_nodes)), jnp.int32),
  )


def _cache(seed, lengths=_LENGTHS, dead=np.nan):
  """Returns a cache of ragged rows whose dead slots hold `dead`."""
  rng = np.random.default_rng(seed)
  live = np.arange(_S)[None] < lengths[:, None]
  keys, values = (
    np.where(live[None, :, None, :, None], rng.standard_normal((_L, _B, _HKV, _S, _DH)), dead)
    for _ in range(2)
  )
  positions = np.where(live, rng.integers(0, 1000, (_B, _S)), -7)
  return KVCache(
    jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32),
    jnp.asarray(positions, jnp.int32), jnp.asarray(lengths, jnp.int32),
  )  # fmt: skip


def _live(cache, row):
  """Returns what the cache holds for a row: (keys, values, positions)."""
  length = int(cache.length[row])
  keys, values = (np.asarray(a)[:, row, :, :length] for a in (cache.keys, cache.values))
  return keys, values, np.asarray(cache.positions)[row, :length]


def _assert_appended(new, old, block, paths):
  """Asserts that row b of `new` is row b of `old` and then the nodes of paths[b]."""
  for row, path in enumerate(paths):
    path = np.asarray(path, int)
    added = [np.asarray(a)[:, row, :, path] for a in (block.keys, block.values)]
    added = [a.transpose(1, 2, 0, 3) for a in added]  # the index array came first
    added.append(np.asarray(block.positions)[row, path])
    for ours, before, nodes in zip(_live(new, row), _live(old, row), added, strict=True):
      axis = 2 if ours.ndim > 1 else 0
      np.testing.assert_array_equal(ours, np.concatenate([before, nodes], axis))


@pytest.mark.parametrize('counts', [[0, 1, 3, 4], [4, 4, 4, 4], [0, 0, 0, 0], [2, 0, 1, 0]])
def test_commit_appends_the_first_nodes_of_each_path(counts):
  paths = np.asarray([[0, 1, 2, 3], [0, 2, 5, 1], [0, 3, 4, 4], [5, 4, 3, 0]])
  cache, block = _cache(0), _block(1)
  new = _commit(cache, block, jnp.asarray(paths), jnp.asarray(counts))
  np.testing.assert_array_equal(new.length, _LENGTHS + counts)
  chosen = [path[:count] for path, count in zip(paths, counts, strict=True)]
  _assert_appended(new, cache, block, chosen)


def test_many_commits_append_one_after_the_other():
  rng = np.random.default_rng(0)
  cache = _cache(0, lengths=np.zeros(_B, int))
  for step in range(40):
    block, count = _block(step), rng.integers(0, 5, _B)
    path = rng.integers(0, _N, (_B, 4))
    new = _commit(cache, block, jnp.asarray(path), jnp.asarray(count))
    _assert_appended(new, cache, block, [p[:c] for p, c in zip(path, count, strict=True)])
    cache = new
  assert np.asarray(cache.length).min() > 40


def test_a_row_may_be_filled_to_its_last_slot():
  """K slots are written at a row's length, whatever its count: length + K <= S is enough."""
  cache, block = _cache(0, lengths=np.asarray([_S - 4, 0, 3, _S - 4])), _block(1)
  path = np.tile([0, 1, 2, 3], (_B, 1))
  new = _commit(cache, block, jnp.asarray(path), jnp.asarray([4, 0, 2, 0]))
  _assert_appended(new, cache, block, [path[0], [], path[2][:2], []])


def test_dead_ends_of_a_path_may_point_anywhere():
  path = np.asarray([[0, 99, -1, 7], [0, 1, -5, 2**31 - 1], [0, 0, 0, 0], [1, 2, 3, 99]])
  cache, block = _cache(0), _block(1)
  new = _commit(cache, block, jnp.asarray(path), jnp.asarray([1, 2, 0, 3]))
  _assert_appended(new, cache, block, [[0], [0, 1], [], [1, 2, 3]])


def test_nodes_off_the_path_may_be_nan():
  cache, block = _cache(0), _block(1)
  bad = np.arange(_N) % 2 == 1
  poisoned = block._replace(
    keys=jnp.where(bad[None, None, None, :, None], jnp.nan, block.keys),
    values=jnp.where(bad[None, None, None, :, None], jnp.nan, block.values),
  )
  path, count = np.tile([0, 2, 4, 1], (_B, 1)), np.asarray([3, 2, 1, 0])
  new = _commit(cache, poisoned, jnp.asarray(path), jnp.asarray(count))
  _assert_appended(new, cache, block, [p[:c] for p, c in zip(path, count, strict=True)])


@pytest.mark.parametrize('capacity, slots', [(1, 128), (128, 128), (129, 256)])
def test_a_new_cache_is_empty_and_whole_blocks_long(capacity, slots):
  cache = kv_cache.init_kv_cache(_L, _B, _HKV, capacity, _DH, jnp.bfloat16)
  assert cache.keys.shape == cache.values.shape == (_L, _B, _HKV, slots, _DH)
  assert cache.keys.dtype == jnp.bfloat16
  assert cache.positions.shape == (_B, slots)
  assert not np.any(cache.length)


@pytest.mark.parametrize('offset', [0, 1, 3])
@pytest.mark.parametrize('traced', [False, True])
def test_a_scratch_block_is_filled_piece_by_piece(offset, traced):
  write = jax.jit(kv_cache.write_kv_block) if traced else kv_cache.write_kv_block
  scratch, block = _block(0), _block(1, num_nodes=2)
  new = write(scratch, block, offset)
  for ours, before, piece in zip(new, scratch, block, strict=True):
    axis = 3 if ours.ndim > 2 else 1
    expected = np.array(before)
    np.moveaxis(expected, axis, 0)[offset : offset + 2] = np.moveaxis(np.asarray(piece), axis, 0)
    np.testing.assert_array_equal(ours, expected)


def test_a_new_block_is_as_large_as_asked():
  block = kv_cache.init_kv_block(_L, _B, _HKV, 5, _DH, jnp.float32)
  assert block.keys.shape == block.values.shape == (_L, _B, _HKV, 5, _DH)
  assert block.positions.shape == (_B, 5)

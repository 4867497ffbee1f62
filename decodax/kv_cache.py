"""A key/value cache that is appended to and never edited.

Axes: `L` layers, `B` batch, `Hkv` key/value heads, `S` slots, `N` nodes of a block, `K` nodes of a
path, `Dh` head size. Slot order carries no meaning; `positions` says where a slot's token stands.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.commit import append
from pallas_kernels.commit import commit

SLOT_BLOCK = 128  # attention reads the cache in blocks of this many slots


class KVBlock(NamedTuple):
  """Keys and values of a block of tokens that may or may not be committed."""

  keys: jax.Array  # f[L, B, Hkv, N, Dh]
  values: jax.Array  # f[L, B, Hkv, N, Dh]
  positions: jax.Array  # i32[B, N]


class KVCache(NamedTuple):
  """Committed keys and values; slots from `length` on are dead."""

  keys: jax.Array  # f[L, B, Hkv, S, Dh]
  values: jax.Array  # f[L, B, Hkv, S, Dh]
  positions: jax.Array  # i32[B, S]
  length: jax.Array  # i32[B]


def init_kv_cache(num_layers, batch_size, num_kv_heads, capacity, head_dim, dtype) -> KVCache:
  """Returns an empty cache of at least `capacity` slots, rounded up to whole blocks."""
  slots = -(-capacity // SLOT_BLOCK) * SLOT_BLOCK
  shape = (num_layers, batch_size, num_kv_heads, slots, head_dim)
  return KVCache(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    positions=jnp.zeros((batch_size, slots), jnp.int32),
    length=jnp.zeros((batch_size,), jnp.int32),
  )


def init_kv_block(num_layers, batch_size, num_kv_heads, num_nodes, head_dim, dtype) -> KVBlock:
  """Returns a block of `num_nodes` empty nodes, to be filled by `write_kv_block`."""
  shape = (num_layers, batch_size, num_kv_heads, num_nodes, head_dim)
  return KVBlock(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    positions=jnp.zeros((batch_size, num_nodes), jnp.int32),
  )


def commit_kv(cache: KVCache, block: KVBlock, path: jax.Array, count: jax.Array) -> KVCache:
  """Returns the cache with, for each row, the first `count` nodes of `path` appended.

  One write for all layers. K slots are written at each row's length, of which `count` become
  valid, so a row needs `length + K <= S`; with less room the write is shifted back and would
  damage the row, which is why callers allocate K slots of slack.

  Args:
    cache: the cache to append to.
    block: nodes as returned by a forward pass.
    path: i32[B, K], indices into the block's nodes.
    count: i32[B], how many of them are kept; 0 leaves the row as it was.
  """
  where = (path, cache.length, count)
  positions = jnp.take_along_axis(block.positions, path, axis=1, mode='clip')
  return KVCache(
    keys=commit(cache.keys, block.keys, *where),
    values=commit(cache.values, block.values, *where),
    positions=append(cache.positions, positions, cache.length, batch_axis=0, slot_axis=1),
    length=cache.length + count,
  )


def write_kv_block(scratch: KVBlock, block: KVBlock, offset: jax.Array | int) -> KVBlock:
  """Returns `scratch` with the nodes of `block` written from node `offset` i32[] on."""
  return KVBlock(
    keys=lax.dynamic_update_slice_in_dim(scratch.keys, block.keys, offset, 3),
    values=lax.dynamic_update_slice_in_dim(scratch.values, block.values, offset, 3),
    positions=lax.dynamic_update_slice_in_dim(scratch.positions, block.positions, offset, 1),
  )

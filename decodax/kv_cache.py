"""A key/value cache that is appended to and never edited.

Axes: `L` layers, `B` batch, `Hkv` key/value heads, `S` slots, `N` nodes of a block, `K` nodes of a
path, `Dh` head size. Slot order carries no meaning; `positions` says where a slot's token stands.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

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
  index = path[None, :, None, :, None]

  def kept(nodes):
    return jnp.take_along_axis(nodes, index, axis=3, mode='clip')

  positions = jnp.take_along_axis(block.positions, path, axis=1, mode='clip')
  return KVCache(
    keys=_append(cache.keys, kept(block.keys), cache.length, batch_axis=1, slot_axis=3),
    values=_append(cache.values, kept(block.values), cache.length, batch_axis=1, slot_axis=3),
    positions=_append(cache.positions, positions, cache.length, batch_axis=0, slot_axis=1),
    length=cache.length + count,
  )


def write_kv_block(scratch: KVBlock, block: KVBlock, offset: jax.Array | int) -> KVBlock:
  """Returns `scratch` with the nodes of `block` written from node `offset` i32[] on."""
  return KVBlock(
    keys=lax.dynamic_update_slice_in_dim(scratch.keys, block.keys, offset, 3),
    values=lax.dynamic_update_slice_in_dim(scratch.values, block.values, offset, 3),
    positions=lax.dynamic_update_slice_in_dim(scratch.positions, block.positions, offset, 1),
  )


def _append(slots, nodes, length, *, batch_axis, slot_axis):
  """Returns `slots` with each row's `nodes` written at its length i32[B].

  On CPU row by row: there a batched write becomes a scatter that rewrites the whole cache.
  """

  def write(row, slots, nodes, length):
    start = [0] * slots.ndim
    start[batch_axis], start[slot_axis] = row, length[row]
    own = lax.dynamic_slice_in_dim(nodes, row, 1, batch_axis)
    return lax.dynamic_update_slice(slots, own, start)

  def row_by_row(slots, nodes, length):
    return lax.fori_loop(0, len(length), lambda b, s: write(b, s, nodes, length), slots)

  def at_once(slots, nodes, length):
    update = functools.partial(lax.dynamic_update_slice_in_dim, axis=slot_axis - 1)
    axes = (batch_axis, batch_axis, 0)
    return jax.vmap(update, in_axes=axes, out_axes=batch_axis)(slots, nodes, length)

  return lax.platform_dependent(slots, nodes, length, cpu=row_by_row, default=at_once)

"""What the kernels of both kinds of device prepare outside: rows of queries, needed blocks.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `R` rows (G * T, padded), `K`
blocks of slots.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention.reference import Prefix
from pallas_kernels.masks import unpack_mask


def narrow_mask(
  mask: jax.Array,
  num_tokens: int,
  window: jax.Array,
  query_positions: jax.Array,
  key_positions: jax.Array,
) -> jax.Array:
  """Returns bool[B, T, N], the mask, bits or booleans, without what lies outside the window."""
  if mask.dtype != jnp.bool_:
    mask = unpack_mask(mask, num_tokens)
  return mask & (key_positions[:, None, :] > query_positions[:, :, None] - window)


def spread_rows(values: jax.Array, group: int, num_rows: int) -> jax.Array:
  """Returns i32[B, R, n] from i32[B, T, n]: row g * T + t has the values of query t."""
  tiled = jnp.tile(values, (1, group, 1))
  return jnp.pad(tiled, [(0, 0), (0, num_rows - tiled.shape[1]), (0, 0)])


def needed_blocks(prefix: Prefix, size: int, lowest: jax.Array | None) -> jax.Array:
  """Returns bool[B, K], the blocks of `size` slots of which a row's queries see anything.

  Args:
    prefix: the cache.
    size: slots of a block.
    lowest: i32[B], the position that all queries of the row see beyond, or None without a window.
  """
  batch, num_slots = prefix.positions.shape
  num_blocks = -(-num_slots // size)
  wanted = jnp.arange(num_blocks)[None] * size < prefix.length[:, None]
  if lowest is None:
    return wanted
  # Slots are in no order: the latest token of a block decides.
  live = jnp.arange(num_slots)[None] < prefix.length[:, None]
  live = jnp.where(live, prefix.positions, -1)
  live = jnp.pad(live, ((0, 0), (0, num_blocks * size - num_slots)), constant_values=-1)
  return wanted & (live.reshape(batch, num_blocks, size).max(-1) > lowest[:, None])


def round_up(value: int, multiple: int) -> int:
  """Returns the smallest multiple that is not below the value."""
  return -(-value // multiple) * multiple

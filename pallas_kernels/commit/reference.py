"""The XLA form of commit: gather the accepted path and append it to each row of the cache.

Axes: `L` layers, `B` batch, `Hkv` key/value heads, `S` slots, `P` pages, `N` nodes of a block, `K`
nodes of a path, `Dh` head size.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp


def commit_reference(
  slots: jax.Array,
  nodes: jax.Array,
  path: jax.Array,
  length: jax.Array,
  count: jax.Array,
  *,
  page_table: jax.Array | None = None,
  scale: jax.Array | None = None,
) -> jax.Array:
  """Returns the slots with each row's path appended; see `commit` for arguments and errors."""
  nodes = quantize(nodes, scale, slots.dtype)
  kept = jnp.take_along_axis(nodes, path[None, :, None, :, None], axis=3, mode='clip')
  if page_table is None:
    return append(slots, kept, length, batch_axis=1, slot_axis=3)
  page_size, index = slots.shape[3], jnp.arange(path.shape[1])[None]
  slot = length[:, None] + index
  entry = jnp.minimum(slot // page_size, page_table.shape[1] - 1)
  page = jnp.take_along_axis(page_table, entry, axis=1)
  page = jnp.where(index < count[:, None], page, slots.shape[1])  # dropped
  kept = kept.transpose(1, 3, 0, 2, 4)  # [B, K, L, Hkv, Dh], as indexing has it
  return slots.at[:, page, :, slot % page_size].set(kept, mode='drop')


def append(
  slots: jax.Array, nodes: jax.Array, length: jax.Array, *, batch_axis: int, slot_axis: int
) -> jax.Array:
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


def quantize(nodes: jax.Array, scale: jax.Array | None, dtype) -> jax.Array:
  """Returns nodes f[L, B, Hkv, N, Dh] in a cache's dtype: over their head's scale f32[L, Hkv]."""
  if scale is None:
    return nodes.astype(dtype)
  scaled = nodes.astype(jnp.float32) / scale[:, None, :, None, None]
  if jnp.issubdtype(dtype, jnp.integer):
    limit = jnp.iinfo(dtype)
    return jnp.clip(jnp.round(scaled), limit.min, limit.max).astype(dtype)
  limit = float(jnp.finfo(dtype).max)
  return jnp.clip(scaled, -limit, limit).astype(dtype)


def check_arguments(slots, nodes, path, length, count, page_table, scale):
  """Checks shapes and dtypes, as `commit` says.

  Raises:
    ValueError: if they do not fit.
  """
  if slots.ndim != 5 or nodes.ndim != 5:
    raise ValueError(f'slots and nodes have five axes: {slots.shape=}, {nodes.shape=}')
  batch = nodes.shape[1]
  same = [0, 2, 4] if page_table is not None else [0, 1, 2, 4]
  if any(slots.shape[axis] != nodes.shape[axis] for axis in same):
    form = '[L, P, Hkv, page, Dh]' if page_table is not None else '[L, B, Hkv, S, Dh]'
    raise ValueError(
      f'slots must be {form} and nodes [L, B, Hkv, N, Dh]: {slots.shape=}, {nodes.shape=}'
    )
  if path.ndim != 2 or path.shape[0] != batch:
    raise ValueError(f'path must be i32[B, K]: {path.shape=}, expected a batch of {batch}')
  for name, values in (('length', length), ('count', count)):
    if values.shape != (batch,):
      raise ValueError(f'{name} must be i32[B]: {values.shape=}, expected {(batch,)}')
  if (slots.dtype.itemsize == 1) != (scale is not None):
    raise ValueError(f'a cache of 8-bit numbers, and no other, needs a scale: {slots.dtype=}')
  if scale is not None and scale.shape != (slots.shape[0], slots.shape[2]):
    raise ValueError(f'scale must be f32[L, Hkv]: {scale.shape=}, {slots.shape=}')
  if page_table is None and path.shape[1] > slots.shape[3]:
    raise ValueError(f'a path of {path.shape[1]} nodes needs as many slots: {slots.shape=}')

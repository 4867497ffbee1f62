"""The TPU kernel of commit: the few tiles that a path falls into are read, mended and written.

The cache is aliased: what is not touched is neither read nor written. Rows that commit nothing are
not in the list of work items, so a page that no row owns is never touched. The path's nodes, few of
the block's, are gathered by XLA on the way into the kernel.

Axes: `L` layers, `B` batch, `Hkv` key/value heads, `S` slots, `P` pages, `N` nodes of a block, `K`
nodes of a path, `Dh` head size, `C` tiles that a path can fall into.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.commit.reference import quantize
from pallas_kernels.worklist import compact

_NODES_BUDGET = 8 * 2**20  # bytes of vector memory for one row's path of one layer


def why_not(
  slots: jax.Array, nodes: jax.Array, path: jax.Array, page_table: jax.Array | None
) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  if slots.dtype.itemsize > 4 or slots.dtype == jnp.float16:
    return f'it takes bfloat16, float32 and 8-bit numbers: {slots.dtype=}'
  if slots.shape[3] % _tile(slots.dtype):
    what = 'slots' if page_table is None else 'slots of a page'
    return f'the number of {what} must be a multiple of {_tile(slots.dtype)}: {slots.shape=}'
  heads, head_dim = -(-nodes.shape[2] // 8) * 8, -(-nodes.shape[4] // 128) * 128
  if 2 * path.shape[1] * heads * head_dim * 4 > _NODES_BUDGET:
    return f'the path is too long: {path.shape=}, {nodes.shape=}'
  return None


def commit_tpu(
  slots: jax.Array,
  nodes: jax.Array,
  path: jax.Array,
  length: jax.Array,
  count: jax.Array,
  *,
  page_table: jax.Array | None = None,
  scale: jax.Array | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns the slots with each row's path appended; see `commit`."""
  num_layers, _, heads, _, head_dim = nodes.shape
  tile, path_length = _tile(slots.dtype), path.shape[1]
  num_tiles = (path_length + tile - 2) // tile + 1
  kept = jnp.take_along_axis(nodes, path[None, :, None, :, None], axis=3, mode='clip')
  # A node is picked by an index of a leading axis, which costs nothing. Numbers of 8 and 16 bits
  # pass through float32 unchanged.
  picked = quantize(kept, scale, slots.dtype).astype(jnp.float32).transpose(0, 1, 3, 2, 4)
  items, num_items = _tiles_to_mend(length, count, tile, num_tiles)
  scalars = [items, length, count]
  if page_table is not None:
    scalars.append(page_table)

  def where(layer, step, items, length, count, *table):
    del count
    row, which = lax.div(items[step], num_tiles), lax.rem(items[step], num_tiles)
    index = lax.div(length[row], tile) + which
    if page_table is None:
      return layer, row, 0, jnp.minimum(index, slots.shape[3] // tile - 1), 0
    per_page = slots.shape[3] // tile
    entry = jnp.minimum(lax.div(index, per_page), page_table.shape[1] - 1)
    page = jnp.clip(table[0][row, entry], 0, slots.shape[1] - 1)
    return layer, page, 0, lax.rem(index, per_page), 0

  def of_row(layer, step, items, *_):
    return layer, lax.div(items[step], num_tiles), 0, 0, 0

  spec = pl.BlockSpec((None, None, heads, tile, head_dim), where)
  return pl.pallas_call(
    functools.partial(_kernel, tile, num_tiles),
    out_shape=jax.ShapeDtypeStruct(slots.shape, slots.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(num_layers, num_items),
      in_specs=[pl.BlockSpec((None, None, path_length, heads, head_dim), of_row), spec],
      out_specs=spec,
    ),
    input_output_aliases={len(scalars) + 1: 0},
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
    interpret=interpret,
    name='commit',
  )(*scalars, picked, slots)


def _tile(dtype):
  """Returns the slots of one tile of memory."""
  return {1: 32, 2: 16, 4: 8}[dtype.itemsize]


def _tiles_to_mend(length, count, tile, num_tiles):
  """Returns (items i32[B * C], their number i32[]): row * C + which of the row's tiles.

  If nothing is committed, one tile is written back as it is: a grid is never empty.
  """
  which = jnp.arange(num_tiles)[None]
  last = (length + count - 1) // tile - length // tile
  wanted = ((count > 0)[:, None] & (which <= last[:, None])).reshape(1, -1)
  wanted = wanted.at[0, 0].set(wanted[0, 0] | ~wanted.any())
  code = jnp.arange(wanted.shape[1], dtype=jnp.int32)[None]
  work = compact(code, wanted)
  return work.items[0], work.count[0]


def _kernel(tile, num_tiles, items, length, count, *refs):
  nodes, before, after = refs[-3:]
  step = pl.program_id(1)
  row, which = lax.div(items[step], num_tiles), lax.rem(items[step], num_tiles)
  start = (lax.div(length[row], tile) + which) * tile
  slot = start + lax.broadcasted_iota(jnp.int32, before.shape, 1)

  def put(index, content):
    node = nodes[index]  # f32[Hkv, Dh]
    return jnp.where(slot == length[row] + index, node[:, None, :], content)

  first = jnp.maximum(start - length[row], 0)
  last = jnp.minimum(count[row], start + tile - length[row])
  content = lax.fori_loop(first, last, put, before[...].astype(jnp.float32))
  after[...] = content.astype(after.dtype)

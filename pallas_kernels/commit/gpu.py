"""The GPU kernel of commit (Triton): one thread block copies one node of one layer.

Axes: `L` layers, `B` batch, `Hkv` key/value heads, `S` slots, `P` pages, `N` nodes of a block, `K`
nodes of a path, `Dh` head size.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from pallas_kernels.commit.reference import quantize


def why_not(slots: jax.Array, nodes: jax.Array, page_table: jax.Array | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  del nodes, page_table
  if slots.dtype.itemsize > 4:
    return f'it takes numbers of 8, 16 and 32 bits: {slots.dtype=}'
  return None


def commit_gpu(
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
  num_layers, batch = nodes.shape[:2]
  nodes, dtype = quantize(nodes, scale, slots.dtype), slots.dtype
  if dtype.itemsize == 1:  # only moved, so any number of 8 bits will do
    nodes, slots = (lax.bitcast_convert_type(a, jnp.int8) for a in (nodes, slots))
  tables = [] if page_table is None else [page_table]
  out = pl.pallas_call(
    functools.partial(_kernel, slots.shape[3]),
    out_shape=jax.ShapeDtypeStruct(slots.shape, slots.dtype),
    grid=(num_layers, batch, path.shape[1]),
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (5 + len(tables)),
    out_specs=pl.BlockSpec(memory_space=pl.ANY),
    input_output_aliases={4 + len(tables): 0},
    compiler_params=plt.CompilerParams(num_warps=4),
    interpret=interpret,
    name='commit',
  )(path, length, count, *tables, nodes, slots)
  return out if dtype.itemsize > 1 else lax.bitcast_convert_type(out, dtype)


def _kernel(page_size, path, length, count, *refs):
  *table, nodes, _, out = refs
  layer, row, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  heads, head_dim = nodes.shape[2], nodes.shape[4]
  wide = (pl.next_power_of_2(heads), pl.next_power_of_2(head_dim))
  head = lax.broadcasted_iota(jnp.int32, wide, 0)
  lane = lax.broadcasted_iota(jnp.int32, wide, 1)
  exists = (head < heads) & (lane < head_dim)
  node = plt.load(path.at[row, index])
  slot = plt.load(length.at[row]) + index
  kept = index < plt.load(count.at[row])
  block = row
  if table:
    entry = jnp.minimum(lax.div(slot, page_size), table[0].shape[1] - 1)
    block, slot = plt.load(table[0].at[row, entry]), lax.rem(slot, page_size)
  content = plt.load(
    nodes.at[layer, row, head, node, lane], mask=exists, other=jnp.zeros((), nodes.dtype)
  )
  plt.store(out.at[layer, block, head, slot, lane], content, mask=exists & kept)

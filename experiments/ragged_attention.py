"""Ragged problems for block attention, with all that is dead full of NaN. Needs jax alone.

Axes: `B` batch, `T` queries, `N` block tokens, `S` slots, `P` pages, `L` layers, `H` query heads,
`Hkv` heads of keys and values, `Dh` head size.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention import Prefix

SCALE = 0.2


class Shape(NamedTuple):
  """The size of a problem and its kind of cache."""

  num_queries: int = 3
  num_tokens: int | None = None  # N; None: as many as queries
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 64
  num_slots: int = 256
  lengths: tuple[int, ...] = (0, 1, 128, 256)
  dtype: Any = jnp.float32
  cache_dtype: Any = None  # 8-bit numbers get scales
  page_size: int | None = None


def make_problem(shape: Shape, seed: int = 0, dead: float = np.nan):
  """Returns (queries, keys, values, bool mask, prefix): random trees, or random masks if N != T."""
  rng = np.random.default_rng(seed)
  batch, num_tokens = len(shape.lengths), shape.num_tokens or shape.num_queries

  def normal(*size):
    return jnp.asarray(rng.standard_normal(size), shape.dtype)

  if num_tokens == shape.num_queries:
    mask = np.stack([random_tree(rng, num_tokens) for _ in range(batch)])
  else:
    mask = rng.random((batch, shape.num_queries, num_tokens)) < 0.5
    mask |= np.eye(shape.num_queries, num_tokens, dtype=bool)[None]
  own = (
    normal(batch, shape.num_queries, shape.num_heads, shape.head_dim),
    *(normal(batch, shape.num_kv_heads, num_tokens, shape.head_dim) for _ in range(2)),
  )
  return *own, jnp.asarray(mask), _make_prefix(rng, shape, dead)


def random_tree(rng, num_nodes):
  """Returns bool[N, N], who is an ancestor of whom, or itself."""
  mask = np.eye(num_nodes, dtype=bool)
  for node in range(1, num_nodes):
    mask[node] |= mask[rng.integers(max(0, node - 6), node)]
  return mask


def window_options(shape: Shape, window: int, seed: int = 0) -> dict[str, Any]:
  """Returns the arguments of a window: positions around the middle of the prefix's."""
  rng = np.random.default_rng(seed)
  size = (len(shape.lengths), max(shape.num_queries, shape.num_tokens or 0))
  positions = jnp.asarray(rng.integers(shape.num_slots // 3, shape.num_slots, size), jnp.int32)
  positions = positions.at[:, : shape.num_queries].set(positions[:, :1])  # all see themselves
  return dict(
    window=jnp.int32(window),
    query_positions=positions[:, : shape.num_queries],
    key_positions=positions[:, : shape.num_tokens or shape.num_queries],
  )


def _make_prefix(rng, shape, dead):
  batch, num_slots = len(shape.lengths), shape.num_slots
  length = np.asarray(shape.lengths, np.int32)
  size = (2, batch, shape.num_kv_heads, num_slots, shape.head_dim)
  live = (np.arange(num_slots)[None] < length[:, None])[None, :, None, :, None]
  dtype = shape.dtype if shape.cache_dtype is None else shape.cache_dtype
  narrow = jnp.dtype(dtype).itemsize == 1
  slots, scales = [], []
  for _ in range(2):
    numbers = rng.standard_normal(size) * (25 if narrow else 1)
    nothing = dead if jnp.issubdtype(dtype, jnp.floating) else 127  # integers have no NaN
    slots.append(jnp.asarray(np.where(live, numbers, nothing)).astype(dtype))
    scales.append(jnp.asarray(rng.uniform(0.01, 0.1, (2, shape.num_kv_heads)), jnp.float32))
  positions = np.stack([rng.permutation(num_slots) for _ in range(batch)])  # in no order
  table = None
  if shape.page_size is not None:
    slots, table = _into_pages(rng, slots, length, shape.page_size, dead)
  return Prefix(
    keys=slots[0],
    values=slots[1],
    positions=jnp.asarray(positions, jnp.int32),
    length=jnp.asarray(length),
    layer=jnp.int32(1),
    page_table=table,
    key_scale=scales[0] if narrow else None,
    value_scale=scales[1] if narrow else None,
  )


def _into_pages(rng, slots, length, page_size, dead):
  """Returns (slots in shuffled pages, i32[B, S / page]); dead entries lead to pages of NaN."""
  layers, batch, heads, num_slots, head_dim = slots[0].shape
  per_row = num_slots // page_size
  num_pages = batch * per_row
  order = rng.permutation(num_pages)
  paged = []
  for array in slots:
    pages = array.reshape(layers, batch, heads, per_row, page_size, head_dim)
    pages = pages.transpose(0, 1, 3, 2, 4, 5).reshape(layers, num_pages, heads, page_size, head_dim)
    pages = jnp.zeros_like(pages).at[:, order].set(pages)
    nothing = dead if jnp.issubdtype(array.dtype, jnp.floating) else 127
    paged.append(jnp.concatenate([pages, jnp.full_like(pages[:, :1], nothing)], axis=1))
  table = order.reshape(batch, per_row)
  dead_entry = np.arange(per_row)[None] * page_size >= length[:, None]
  return paged, jnp.asarray(np.where(dead_entry, num_pages, table), jnp.int32)

"""The XLA form of block attention: one online softmax over the block and the cached prefix.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `P` pages, `L` layers, `H` query
heads, `Hkv` key/value heads, `G = H / Hkv`, `Dh` head size, `W = ceil(N / 32)` words of bits.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.masks import unpack_mask

MASKED = -1e30  # finite, so that a row with nothing to attend to gives no NaN


class Prefix(NamedTuple):
  """A committed cache as attention reads it: all layers, and which one.

  With a page table the slots of a row lie in pages: keys and values are f[L, P, Hkv, page, Dh], and
  slot s of row b is slot s % page of page `page_table[b, s // page]`. Entries of the table past a
  row's length are never followed. Keys and values may be int8 or a float of 8 bits; what they stand
  for is then the number times its head's scale.
  """

  keys: jax.Array  # f[L, B, Hkv, S, Dh]
  values: jax.Array  # f[L, B, Hkv, S, Dh]
  positions: jax.Array  # i32[B, S] position of the token in each slot
  length: jax.Array  # i32[B] slots that are valid
  layer: jax.Array  # i32[] the layer to read
  page_table: jax.Array | None = None  # i32[B, S / page]
  key_scale: jax.Array | None = None  # f32[L, Hkv]
  value_scale: jax.Array | None = None  # f32[L, Hkv]


def block_attention_reference(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  prefix: Prefix | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
  window: jax.Array | None = None,
  query_positions: jax.Array | None = None,
  key_positions: jax.Array | None = None,
  prefix_block_size: int = 128,
) -> jax.Array:
  """Returns f[B, T, H, Dh]; see `block_attention` for arguments and errors.

  A row reads its prefix in blocks up to the longest row of the batch, never the whole capacity;
  slots beyond a row's length weigh exactly nothing, whatever they hold, so that a row's result
  is the same to the bit beside any neighbour and at any capacity.

  Source: online softmax, arXiv:1805.02867; split over prefix blocks as in arXiv:2205.14135.
  """
  batch, num_queries, num_heads, head_dim = queries.shape
  num_kv_heads = keys.shape[1]
  group = num_heads // num_kv_heads
  if mask.dtype != jnp.bool_:
    mask = unpack_mask(mask, keys.shape[2])
  grouped = group_queries(queries, num_kv_heads, scale)

  def visible(ok, positions):  # bool[B, 1 or T, n] -> bool[B, 1, G * T, n]
    if window is not None and query_positions is not None:
      ok = ok & (positions[:, None, :] > query_positions[:, :, None] - window)
    ok = jnp.broadcast_to(ok, (batch, num_queries, ok.shape[-1]))[:, None, None]
    ok = jnp.broadcast_to(ok, (batch, 1, group, *ok.shape[-2:]))
    return ok.reshape(batch, 1, -1, ok.shape[-1])

  def scores_of(some_keys, ok, scale=None):
    scores = jnp.einsum('bkqd,bknd->bkqn', grouped, some_keys, preferred_element_type=jnp.float32)
    if scale is not None:
      scores = scores * scale[None, :, None, None]
    if soft_cap is not None:
      scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(ok, scores, MASKED)

  def weighted(weights, some_values, scale=None):
    mixed = jnp.einsum(
      'bkqn,bknd->bkqd',
      weights.astype(some_values.dtype),
      some_values,
      preferred_element_type=jnp.float32,
    )
    return mixed if scale is None else mixed * scale[None, :, None, None]

  scores = scores_of(keys, visible(mask, key_positions))
  peak = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - peak)
  carry = (peak, weights.sum(-1, keepdims=True), weighted(weights, values))

  def read_block(prefix, size, index, carry):
    peak, total, mixed = carry
    start = index * size
    valid = start + jnp.arange(size)[None] < prefix.length[:, None]  # bool[B, n]
    some_keys = _read_slots(prefix.keys, prefix, index, size, queries.dtype)
    some_values = _read_slots(prefix.values, prefix, index, size, queries.dtype)
    some_values = jnp.where(valid[:, None, :, None], some_values, 0)  # dead slots may hold NaN
    positions = lax.dynamic_slice(prefix.positions, (0, start), (batch, size))
    scores = scores_of(
      some_keys, visible(valid[:, None], positions), layer_scale(prefix.key_scale, prefix)
    )
    new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
    shrink, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak)
    total = total * shrink + weights.sum(-1, keepdims=True)
    added = weighted(weights, some_values, layer_scale(prefix.value_scale, prefix))
    return new_peak, total, mixed * shrink + added

  if prefix is not None:
    size = prefix_block_size if prefix.page_table is None else prefix.keys.shape[3]
    num_blocks = -(-jnp.max(prefix.length) // size)
    carry = lax.fori_loop(0, num_blocks, functools.partial(read_block, prefix, size), carry)

  _, total, mixed = carry
  return ungroup((mixed / total).astype(queries.dtype), queries.shape)


def group_queries(queries: jax.Array, num_kv_heads: int, scale: float) -> jax.Array:
  """Returns f[B, Hkv, G * T, Dh], scaled: the rows that meet the keys of one head in a matmul."""
  batch, num_queries, num_heads, head_dim = queries.shape
  grouped = queries.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
  return grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim) * scale


def ungroup(mixed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns f[B, T, H, Dh] of that shape from f[B, Hkv, G * T, Dh]."""
  batch, num_queries, num_heads, head_dim = shape
  num_kv_heads = mixed.shape[1]
  mixed = mixed.reshape(batch, num_kv_heads, num_heads // num_kv_heads, num_queries, head_dim)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(shape)


def layer_scale(scale: jax.Array | None, prefix: Prefix) -> jax.Array | None:
  """Returns f32[Hkv], the prefix's layer of a scale f32[L, Hkv], or None."""
  if scale is None:
    return None
  return lax.dynamic_index_in_dim(scale.astype(jnp.float32), prefix.layer, keepdims=False)


def _read_slots(slots, prefix, index, size, dtype):
  """Returns f[B, Hkv, size, Dh], the index-th stretch of slots of every row."""
  if prefix.page_table is None:
    shape = (1, *slots.shape[1:3], size, slots.shape[4])
    read = lax.dynamic_slice(slots, (prefix.layer, 0, 0, index * size, 0), shape)[0]
  else:
    pages = lax.dynamic_index_in_dim(prefix.page_table, index, 1, keepdims=False)
    last = (jnp.maximum(prefix.length, 1) - 1) // size  # entries past a row's length are dead
    pages = jnp.where(index <= last, pages, 0)
    read = slots[prefix.layer, pages]
  return read if prefix.key_scale is None and read.dtype.itemsize > 1 else read.astype(dtype)


def check_arguments(queries, keys, values, mask, prefix, window, query_positions, key_positions):
  """Checks shapes and dtypes, as `block_attention` says.

  Raises:
    ValueError: if they do not fit.
  """
  batch, num_queries, num_heads, head_dim = queries.shape
  if keys.shape != values.shape or keys.ndim != 4:
    raise ValueError(f'keys and values must be [B, Hkv, N, Dh]: {keys.shape=}, {values.shape=}')
  if (keys.shape[0], keys.shape[3]) != (batch, head_dim) or num_heads % keys.shape[1]:
    raise ValueError(f'keys do not fit the queries [B, T, H, Dh]: {queries.shape=}, {keys.shape=}')
  words = (batch, num_queries, -(-keys.shape[2] // 32))
  dense = (batch, num_queries, keys.shape[2])
  if mask.dtype == jnp.bool_ and mask.shape != dense:
    raise ValueError(f'mask must be bool[B, T, N]: {mask.shape=}, expected {dense}')
  if mask.dtype != jnp.bool_ and (mask.shape != words or mask.dtype != jnp.int32):
    raise ValueError(
      f'a packed mask must be i32[B, T, ceil(N / 32)]: {mask.shape=}, {mask.dtype=}, '
      f'expected {words}'
    )
  if window is not None and (query_positions is None or key_positions is None):
    raise ValueError('a window needs query_positions and key_positions')
  if prefix is not None:
    _check_prefix(prefix, keys)


def _check_prefix(prefix, keys):
  paged = prefix.page_table is not None
  rows = keys.shape[1:2] if paged else keys.shape[:2]
  shape = prefix.keys.shape
  if len(shape) != 5 or shape[2 - len(rows) + 1 : 3] != rows or shape[4] != keys.shape[3]:
    form = '[L, P, Hkv, page, Dh]' if paged else '[L, B, Hkv, S, Dh]'
    raise ValueError(f'prefix must be {form}: {prefix.keys.shape=}, {keys.shape=}')
  if prefix.values.shape != shape or prefix.values.dtype != prefix.keys.dtype:
    raise ValueError(f'prefix keys and values differ: {shape=}, {prefix.values.shape=}')
  num_slots = shape[3] * (prefix.page_table.shape[1] if paged else 1)
  if prefix.positions.shape != (keys.shape[0], num_slots):
    raise ValueError(
      f'prefix positions must be i32[B, S]: {prefix.positions.shape=}, '
      f'expected {(keys.shape[0], num_slots)}'
    )
  scales = (prefix.key_scale, prefix.value_scale)
  if (prefix.keys.dtype.itemsize == 1) != all(s is not None for s in scales):
    raise ValueError(
      f'a cache of 8-bit numbers, and no other, needs key_scale and value_scale: '
      f'{prefix.keys.dtype=}'
    )
  for scale in scales:
    if scale is not None and scale.shape != (shape[0], shape[2]):
      raise ValueError(f'scales must be f32[L, Hkv]: {scale.shape=}, {prefix.keys.shape=}')

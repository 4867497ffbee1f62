"""What goes into the GPU kernels and what comes out: tiles of slots, and splits of a prefix.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `P` pages, `L` layers, `H` query
heads, `Hkv` key/value heads, `R` rows of queries (G * T, padded), `Dh` head size, `W` words of
bits, `Z` splits.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention.reference import Prefix
from pallas_kernels.block_attention.reference import group_queries
from pallas_kernels.block_attention.reference import layer_scale
from pallas_kernels.block_attention.reference import ungroup
from pallas_kernels.block_attention.rows import narrow_mask
from pallas_kernels.block_attention.rows import needed_blocks
from pallas_kernels.block_attention.rows import round_up
from pallas_kernels.block_attention.rows import spread_rows
from pallas_kernels.masks import WORD
from pallas_kernels.masks import pack_mask


class SplitInputs(NamedTuple):
  """What a kernel reads; absent parts are None."""

  queries: Any  # f[B * Hkv, R, Dh]
  keys: Any  # f[B * Hkv, N, Dh], N whole tiles
  values: Any
  words: Any  # i32[B, W, R]
  key_slots: Any = None  # f[L * B * Hkv, S, Dh] or f[L * P * Hkv, page, Dh]
  value_slots: Any = None
  first: Any = None  # i32[1] index of the layer's first row of slots
  length: Any = None  # i32[B]
  count: Any = None  # i32[B] tiles of the prefix that a row reads
  page_table: Any = None  # i32[B, S / page]
  tiles: Any = None  # i32[B, S / block] which tiles, under a window
  lowest: Any = None  # i32[B, R] a query sees positions greater than this
  positions: Any = None  # i32[B, S]
  key_scale: Any = None  # f32[Hkv]
  value_scale: Any = None


def split_inputs(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  prefix: Prefix | None,
  *,
  scale: float,
  window: jax.Array | None,
  query_positions: jax.Array | None,
  key_positions: jax.Array | None,
  num_rows: int,
  block_kv: int,
) -> SplitInputs:
  """Returns what a kernel reads, padded; arguments as of `block_attention`.

  Args:
    num_rows: R.
    block_kv: slots of a tile.
  """
  num_kv_heads, num_tokens = keys.shape[1:3]
  group = queries.shape[2] // num_kv_heads
  padded = round_up(num_tokens, block_kv)
  lowest = None
  if window is not None:
    assert query_positions is not None and key_positions is not None
    lowest = query_positions - window
    mask = narrow_mask(mask, num_tokens, window, query_positions, key_positions)
  words = pack_mask(mask) if mask.dtype == jnp.bool_ else mask
  words = jnp.pad(words, [(0, 0), (0, 0), (0, padded // WORD - words.shape[2])])
  rows = [(0, 0), (0, 0), (0, num_rows - queries.shape[1] * group), (0, 0)]
  tokens = [(0, 0), (0, 0), (0, padded - num_tokens), (0, 0)]
  inputs = SplitInputs(
    queries=_flat(jnp.pad(group_queries(queries, num_kv_heads, scale), rows)),
    keys=_flat(jnp.pad(keys, tokens)),
    values=_flat(jnp.pad(values, tokens)),
    words=spread_rows(words, group, num_rows).transpose(0, 2, 1),
  )
  if prefix is None:
    return inputs
  wanted = needed_blocks(prefix, block_kv, None if lowest is None else lowest.min(-1))
  inputs = inputs._replace(
    key_slots=_flat(prefix.keys),
    value_slots=_flat(prefix.values),
    first=(prefix.layer * math.prod(prefix.keys.shape[1:3])).reshape(1),
    length=prefix.length,
    count=wanted.sum(1, dtype=jnp.int32),
    page_table=prefix.page_table,
    key_scale=layer_scale(prefix.key_scale, prefix),
    value_scale=layer_scale(prefix.value_scale, prefix),
  )
  if lowest is None:
    return inputs
  return inputs._replace(
    tiles=jnp.argsort(~wanted, axis=1, stable=True).astype(jnp.int32),
    lowest=spread_rows(lowest[..., None], group, num_rows)[..., 0],
    positions=prefix.positions,
  )


def join_splits(
  mixed: jax.Array, peaks: jax.Array, shape: tuple[int, ...], num_kv_heads: int
) -> jax.Array:
  """Returns f[B, T, H, Dh] of that shape from what the splits of every row found.

  Args:
    mixed: f[Z, B * Hkv, R', Dh], the outputs of the rows that are not padding, or more.
    peaks: f32[Z, B * Hkv, R], log2 of their normalisers.
    shape: (B, T, H, Dh).
    num_kv_heads: Hkv.
  """
  num_splits, _, num_rows, head_dim = mixed.shape
  dtype = mixed.dtype
  mixed = mixed.reshape(num_splits, shape[0], num_kv_heads, num_rows, head_dim)
  if num_splits > 1:
    peaks = peaks.reshape(*mixed.shape[:3], -1)[..., :num_rows]
    mixed = _merge(mixed, peaks)
  else:
    mixed = mixed[0]
  used = shape[1] * (shape[2] // num_kv_heads)
  return ungroup(mixed[:, :, :used].astype(dtype), shape)


def _flat(array):
  """Returns f[x, n, Dh], a view with the leading axes as one."""
  return array.reshape(-1, *array.shape[-2:])


def _merge(mixed, peaks):
  """Returns f32[B, Hkv, R, Dh] from the outputs and log2-normalisers of splits, f[Z, B, Hkv, R]."""
  weight = jnp.exp2(peaks - peaks.max(0, keepdims=True))[..., None]
  return (mixed.astype(jnp.float32) * weight).sum(0) / weight.sum(0)

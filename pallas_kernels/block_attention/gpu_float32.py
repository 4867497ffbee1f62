"""The GPU kernel of block attention for float32 (Triton), where wgmma would round the products.

A thread block is one split of one row's slots for one key head and a tile of its queries, as in the
kernel for 16 bits; the compiler does the fetching. Products are float32 throughout, so a row costs
what the processors outside the matrix units make of it. An 8-bit cache is widened in registers.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `Hkv` key/value heads, `R` rows of
queries (G * T, padded), `Dh` head size, `Z` splits; `r` rows and `n` slots of a tile, `d` head
size, a power of 2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from pallas_kernels.block_attention import block_sizes
from pallas_kernels.block_attention.reference import MASKED
from pallas_kernels.block_attention.reference import Prefix
from pallas_kernels.block_attention.rows import round_up
from pallas_kernels.block_attention.splits import SplitInputs
from pallas_kernels.block_attention.splits import join_splits
from pallas_kernels.block_attention.splits import split_inputs
from pallas_kernels.dispatch import device_kind
from pallas_kernels.masks import WORD

_NARROW = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
_LOG2E = math.log2(math.e)


def why_not(queries: jax.Array, keys: jax.Array, prefix: Prefix | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  if queries.dtype != jnp.float32 or keys.dtype != queries.dtype:
    return f'it takes float32 for float32: {queries.dtype=}, {keys.dtype=}'
  if queries.shape[3] > 256:
    return f'a head has at most 256 elements: {queries.shape=}'
  if prefix is not None and prefix.keys.dtype not in (queries.dtype, *_NARROW):
    return f'a cache is like the queries or has 8 bits: {prefix.keys.dtype=}, {queries.dtype=}'
  return None


class _Call(NamedTuple):
  """What is static about one call."""

  sizes: block_sizes.Float32BlockSizes
  num_kv_heads: int
  head_dim: int
  num_own: int  # tiles of the block itself
  page_size: int | None  # None if the cache is contiguous
  soft_cap: float | None


def block_attention_float32(
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
  sizes: 'block_sizes.Float32BlockSizes | None' = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns f32[B, T, H, Dh]; see `block_attention`.

  Args:
    sizes: block sizes; None looks them up for the device.
    interpret: as `pallas_call` takes it.

  Source: FlashAttention-2, arXiv:2307.08691, algorithm 1; splits and their merging as in
  Flash-Decoding.
  """
  batch, num_queries, num_heads, head_dim = queries.shape
  num_kv_heads = keys.shape[1]
  num_rows = num_queries * (num_heads // num_kv_heads)
  if sizes is None:
    num_slots = 0 if prefix is None else prefix.positions.shape[1]
    sizes = block_sizes.float32_block_sizes(
      device_kind(), head_dim, num_rows, batch * num_kv_heads, num_slots
    )
  num_rows = round_up(num_rows, sizes.rows)
  inputs = split_inputs(
    queries, keys, values, mask, prefix, scale=scale, window=window,
    query_positions=query_positions, key_positions=key_positions,
    num_rows=num_rows, block_kv=sizes.block_kv,
  )  # fmt: skip
  paged = prefix is not None and prefix.page_table is not None
  call = _Call(
    sizes=sizes,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    num_own=inputs.keys.shape[1] // sizes.block_kv,
    page_size=prefix.keys.shape[3] if prefix is not None and paged else None,
    soft_cap=soft_cap,
  )
  present = {name: a for name, a in inputs._asdict().items() if a is not None}
  found = (sizes.num_splits, batch * num_kv_heads, num_rows)
  mixed, peaks = pl.pallas_call(
    functools.partial(_kernel, call, tuple(present)),
    out_shape=[
      jax.ShapeDtypeStruct((*found, head_dim), jnp.float32),
      jax.ShapeDtypeStruct(found, jnp.float32),
    ],
    grid=(num_rows // sizes.rows, sizes.num_splits, batch * num_kv_heads),
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(present),
    out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
    compiler_params=plt.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.stages),
    interpret=interpret,
    name='block_attention_float32',
  )(*present.values())
  return join_splits(mixed, peaks, queries.shape, num_kv_heads)


def _kernel(call, names, *refs):
  inputs = SplitInputs(**dict(zip(names, refs, strict=False)))
  tile, split, pair = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  rows = tile * call.sizes.rows + jnp.arange(call.sizes.rows, dtype=jnp.int32)
  row = lax.div(pair, call.num_kv_heads)
  queries = _read(call, inputs.queries, pair, rows, True)
  shape = (call.sizes.rows, 1)
  carry = (
    jnp.full(shape, MASKED, jnp.float32),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros(queries.shape, jnp.float32),
  )
  own = functools.partial(_own_tile, call, inputs, queries, pair, row, rows)
  carry = lax.fori_loop(0, jnp.where(split == 0, jnp.int32(call.num_own), 0), own, carry)
  if inputs.count is not None:
    count = plt.load(inputs.count.at[row])
    share = lax.div(count + (call.sizes.num_splits - 1), call.sizes.num_splits)
    low = jnp.minimum(split * share, count)
    high = jnp.minimum(low + share, count)
    prefix = functools.partial(_prefix_tile, call, inputs, queries, pair, row, rows)
    carry = lax.fori_loop(low, high, prefix, carry)
  peak, total, mixed = carry
  total = jnp.maximum(total, 1e-37)  # nothing at all was read: a split without tiles
  depth = _depth(call)
  out, peaks = refs[-2:]
  plt.store(
    out.at[split, pair, rows[:, None], depth], mixed / total, mask=_inside(call, depth, mixed)
  )
  plt.store(peaks.at[split, pair, rows], (peak + jnp.log2(total)).reshape(rows.shape))


def _depth(call):
  """Returns i32[1, d], the elements of a head and what pads it."""
  return jnp.arange(pl.next_power_of_2(call.head_dim), dtype=jnp.int32)[None]


def _inside(call, depth, like):
  return jnp.broadcast_to(depth < call.head_dim, like.shape)


def _read(call, ref, first, ids, alive):
  """Returns f32[n, d], rows `ids` of ref[first]; 0 beyond a head's size and where not `alive`."""
  depth = _depth(call)
  mask = jnp.broadcast_to(depth < call.head_dim, (ids.shape[0], depth.shape[1]))
  if alive is not True:
    mask &= alive[:, None]
  if not isinstance(first, int) and first.ndim:
    first = first[:, None]
  where = (first, ids[:, None], depth)
  return plt.load(ref.at[where], mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)


def _own_tile(call, inputs, queries, pair, row, rows, index, carry):
  """Takes a tile of the block itself into the online softmax."""
  token = index * call.sizes.block_kv + jnp.arange(call.sizes.block_kv, dtype=jnp.int32)
  keys, values = (_read(call, ref, pair, token, True) for ref in (inputs.keys, inputs.values))
  word, bit = lax.div(token, WORD)[None], lax.rem(token, WORD)[None]
  words = plt.load(inputs.words.at[row, word, rows[:, None]])
  seen = (lax.shift_right_logical(words, jnp.broadcast_to(bit, words.shape)) & 1) > 0
  return _step(call, queries, keys, values, seen, None, carry)


def _prefix_tile(call, inputs, queries, pair, row, rows, index, carry):
  """Takes a tile of the row's slots into the online softmax."""
  tile = index if inputs.tiles is None else plt.load(inputs.tiles.at[row, index])
  slot = tile * call.sizes.block_kv + jnp.arange(call.sizes.block_kv, dtype=jnp.int32)
  alive = slot < plt.load(inputs.length.at[row])
  first, head = inputs.first[0], lax.rem(pair, call.num_kv_heads)
  if call.page_size is None:
    where, offset = first + pair, slot
  else:
    entry = lax.div(slot, call.page_size)
    page = plt.load(inputs.page_table.at[row, entry], mask=alive, other=0)
    where, offset = first + page * call.num_kv_heads + head, lax.rem(slot, call.page_size)
  keys, values = (
    _read(call, ref, where, offset, alive) for ref in (inputs.key_slots, inputs.value_slots)
  )
  seen = jnp.broadcast_to(alive[None], (rows.shape[0], slot.shape[0]))
  if inputs.lowest is not None:
    position = plt.load(inputs.positions.at[row, slot], mask=alive, other=0)
    seen &= position[None] > plt.load(inputs.lowest.at[row, rows])[:, None]
  scales = None
  if inputs.key_scale is not None:
    scales = plt.load(inputs.key_scale.at[head]), plt.load(inputs.value_scale.at[head])
  return _step(call, queries, keys, values, seen, scales, carry)


def _step(call, queries, keys, values, seen, scales, carry):
  """Returns (peak, total, mixed) with a tile more; peaks are in units of log 2."""
  peak, total, mixed = carry
  product = functools.partial(
    jnp.dot, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
  )
  scores = product(queries, keys.T)
  if scales is not None:
    scores = scores * scales[0]
  if call.soft_cap is not None:
    scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)
  scores = jnp.where(seen, scores * _LOG2E, MASKED)
  new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
  shrink = jnp.exp2(peak - new_peak)
  weights = jnp.exp2(scores - new_peak)
  total = total * shrink + weights.sum(-1, keepdims=True)
  if scales is not None:
    weights = weights * scales[1]
  return new_peak, total, mixed * shrink + product(weights, values)

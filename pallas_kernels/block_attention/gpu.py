"""The GPU kernel of block attention, for Hopper (Mosaic GPU: TMA, wgmma, warpgroups).

A thread block is one split of one row's slots for one key head and a tile of its queries. One
warpgroup fetches keys and values into a ring of buffers in shared memory, one or two multiply;
the first split begins with the block itself. What the splits found is merged outside. A
contiguous cache and a paged one differ in where a tile is fetched from, and in nothing else. A
cache of 8-bit numbers is fetched into a ring of its own, from where the warpgroup that fetches, or
two of them, widens it into the other: those that multiply see no difference but the scales.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `P` pages, `L` layers, `Hkv`
key/value heads, `G` query heads a key head, `R` rows of queries (G * T, padded), `Dh` head size,
`W` words of bits, `Z` splits.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
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
_TILE = 64  # rows of queries of one warpgroup: the height of a wgmma
_LOG2E = math.log2(math.e)
_BY_ROW, _BY_LANE = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def why_not(queries: jax.Array, keys: jax.Array, prefix: Prefix | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  if queries.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != queries.dtype:
    return f'wgmma takes bfloat16 or float16, all alike: {queries.dtype=}, {keys.dtype=}'
  if queries.shape[3] % 16 or queries.shape[3] > 256:
    return f'a head has a multiple of 16 elements, at most 256: {queries.shape=}'
  if prefix is not None:
    widened = _NARROW if queries.dtype == jnp.bfloat16 else ()
    if prefix.keys.dtype not in (queries.dtype, *widened):
      return (
        'a cache is like the queries or, of bfloat16 queries, has 8 bits: '
        f'{prefix.keys.dtype=}, {queries.dtype=}'
      )
    if prefix.keys.shape[3] % 64:
      what = 'cache' if prefix.page_table is None else 'page'
      return f'a {what} must hold a multiple of 64 slots: {prefix.keys.shape=}'
  return None


class _Call(NamedTuple):
  """What is static about one call."""

  sizes: block_sizes.GpuBlockSizes
  num_groups: int  # warpgroups that multiply
  num_fetchers: int  # warpgroups that fetch
  num_queries: int  # rows that are not padding
  num_kv_heads: int
  head_dim: int
  num_own: int  # tiles of the block itself
  per_page: int | None  # tiles of a page; None if the cache is contiguous
  windowed: bool
  has_prefix: bool
  soft_cap: float | None
  dtype: Any
  narrow: Any  # dtype of an 8-bit cache, or None
  interpreted: bool


class _Scratch(NamedTuple):
  """Shared memory and barriers."""

  queries: Any  # [groups, 64, Dh], and then the output
  keys: Any  # [stages, block, Dh]
  values: Any
  peaks: Any  # f32[groups, 64]
  key_ready: Any
  value_ready: Any
  query_ready: Any
  key_used: Any
  value_used: Any
  cleared: Any
  narrow_keys: Any = None  # [narrow stages, block, Dh]
  narrow_values: Any = None
  narrow_key_ready: Any = None
  narrow_value_ready: Any = None


def block_attention_gpu(
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
  sizes: 'block_sizes.GpuBlockSizes | None' = None,
  interpret: Any = None,
) -> jax.Array:
  """Returns f[B, T, H, Dh]; see `block_attention`.

  Args:
    sizes: block sizes; None looks them up for the device.
    interpret: as `plgpu.kernel` takes it.

  Source: FlashAttention-3, arXiv:2407.08608, section 3.1 (producer and consumer warpgroups); splits
  and their merging as in Flash-Decoding.
  """
  batch, num_queries, num_heads, head_dim = queries.shape
  num_kv_heads = keys.shape[1]
  group = num_heads // num_kv_heads
  num_groups = 1 if num_queries * group <= _TILE else 2
  num_rows = round_up(num_queries * group, _TILE * num_groups)
  narrow = prefix is not None and prefix.keys.dtype.itemsize == 1
  if sizes is None:
    page = None if prefix is None or prefix.page_table is None else prefix.keys.shape[3]
    num_blocks = batch * num_kv_heads * (num_rows // (_TILE * num_groups))
    num_slots = 0 if prefix is None else prefix.positions.shape[1]
    sizes = block_sizes.gpu_block_sizes(
      device_kind(), head_dim, num_blocks, num_slots, page, narrow
    )
  inputs = split_inputs(
    queries, keys, values, mask, prefix, scale=scale, window=window,
    query_positions=query_positions, key_positions=key_positions,
    num_rows=num_rows, block_kv=sizes.block_kv,
  )  # fmt: skip
  call = _Call(
    sizes=sizes,
    num_groups=num_groups,
    # Few queries leave the memory as the limit: keys and values are then widened side by side.
    num_fetchers=2 if narrow and num_groups == 1 else 1,
    num_queries=num_queries * group,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    num_own=inputs.keys.shape[1] // sizes.block_kv,
    per_page=None if prefix is None or prefix.page_table is None
    else prefix.keys.shape[3] // sizes.block_kv,
    windowed=window is not None and prefix is not None,
    has_prefix=prefix is not None,
    soft_cap=soft_cap,
    dtype=queries.dtype,
    narrow=prefix.keys.dtype if prefix is not None and narrow else None,
    interpreted=interpret is not None,
  )  # fmt: skip
  mixed, peaks = _run(call, inputs, interpret)
  return join_splits(mixed, peaks, queries.shape, num_kv_heads)


# --- The call ------------------------------------------------------------------------------------


def _run(call, inputs, interpret):
  """Returns (f[Z, B * Hkv, R', Dh] outputs, f32[Z, B * Hkv, R] log2 of their normalisers)."""
  present = {name: a for name, a in inputs._asdict().items() if a is not None}
  num_pairs, num_rows, head_dim = inputs.queries.shape
  rows_out = _rows_out(call, num_rows)
  sizes, groups = call.sizes, call.num_groups
  tile = (sizes.block_kv, head_dim)

  narrow = ()
  if call.narrow is not None:
    narrow = (
      *[_tiled_memory((sizes.narrow_stages, *tile), call.narrow)] * 2,
      *[plgpu.Barrier(num_barriers=sizes.narrow_stages)] * 2,
    )

  def body(*refs):
    named = dict(zip(present, refs, strict=False))
    out_refs = refs[len(present) :]

    def scoped(*scratch):
      _kernel(call, SplitInputs(**named), out_refs, _Scratch(*scratch))

    pl.run_scoped(
      scoped,
      _tiled_memory((groups, _TILE, head_dim), call.dtype),
      _tiled_memory((sizes.stages, *tile), call.dtype),
      _tiled_memory((sizes.stages, *tile), call.dtype),
      plgpu.SMEM((groups, _TILE), jnp.float32),
      plgpu.Barrier(num_barriers=sizes.stages),
      plgpu.Barrier(num_barriers=sizes.stages),
      plgpu.Barrier(num_barriers=groups),
      plgpu.Barrier(num_arrivals=groups, num_barriers=sizes.stages),
      plgpu.Barrier(num_arrivals=groups, num_barriers=sizes.stages),
      plgpu.Barrier(num_arrivals=groups),
      *narrow,
      collective_axes='group',
    )

  kernel = plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((sizes.num_splits, num_pairs, rows_out, head_dim), call.dtype),
      jax.ShapeDtypeStruct((sizes.num_splits, num_pairs, num_rows), jnp.float32),
    ),
    grid=(num_rows // (_TILE * groups), sizes.num_splits, num_pairs),
    grid_names=('tile', 'split', 'pair'),
    num_threads=groups + call.num_fetchers,
    thread_name='group',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    **({} if interpret is None else {'interpret': interpret}),
  )
  return kernel(*present.values())


def _tiled_memory(shape, dtype):
  """Returns shared memory as wgmma reads it, swizzled so that threads meet no bank twice."""
  bits = 8 * jnp.dtype(dtype).itemsize
  if shape[-1] * bits % 256:  # heads of 16, 48, 80, ... numbers of 8 bits, too narrow for it
    return plgpu.SMEM(shape, dtype)
  swizzle = plgpu.find_swizzle(shape[-1] * bits)
  transforms = (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def _rows_out(call, num_rows):
  """Returns how many rows are written: of a single tile those that hold queries, in eights."""
  return num_rows if call.num_groups > 1 else round_up(call.num_queries, 8)


def _kernel(call, inputs, outs, scratch):
  group = lax.axis_index('group')
  pair, split = lax.axis_index('pair'), lax.axis_index('split')
  row = lax.div(pair, jnp.int32(call.num_kv_heads))
  num_own = jnp.where(split == 0, call.num_own, 0)
  low = high = jnp.int32(0)
  if call.has_prefix:
    count = inputs.count[row]
    share = lax.div(count + (call.sizes.num_splits - 1), jnp.int32(call.sizes.num_splits))
    low = jnp.minimum(split * share, count)
    high = jnp.minimum(low + share, count)

  few, many = _registers(call)
  parts = _parts(inputs, scratch)
  each = len(parts) // call.num_fetchers
  for index in range(call.num_fetchers):

    @pl.when(group == call.num_groups + index)
    def _fetch(parts=parts[index * each : (index + 1) * each]):
      if few is not None:
        plgpu.set_max_registers(few, action='decrease')
      _fetch_tiles(call, inputs, parts, pair, row, num_own, low, high)

  @pl.when(group < call.num_groups)
  def _multiply():
    if many is not None:
      plgpu.set_max_registers(many, action='increase')
    _attend(call, inputs, outs, scratch, group, pair, row, split, num_own, low, high)


def _registers(call):
  """Returns how many a thread has that fetches and one that multiplies; None: an equal share."""
  if call.num_groups == 1:
    return (None, None) if call.num_fetchers == 1 else (72, 240)
  return (40, 232) if call.narrow is None else (72, 216)


def _tile_of(inputs, row, index):
  """Returns which tile of the row's slots the index-th is that it reads."""
  return index if inputs.tiles is None else inputs.tiles[row, index]


# --- The warpgroups that fetch --------------------------------------------------------------------


class _Part(NamedTuple):
  """Keys or values, and how they come to those that multiply."""

  own: Any
  slots: Any
  wide: Any  # [stages, block, Dh]
  ready: Any
  used: Any
  narrow: Any  # [narrow stages, block, Dh], or None
  narrow_ready: Any


def _parts(inputs, scratch):
  """Returns (keys, values)."""
  return (
    _Part(
      inputs.keys, inputs.key_slots, scratch.keys, scratch.key_ready, scratch.key_used,
      scratch.narrow_keys, scratch.narrow_key_ready,
    ),
    _Part(
      inputs.values, inputs.value_slots, scratch.values, scratch.value_ready, scratch.value_used,
      scratch.narrow_values, scratch.narrow_value_ready,
    ),
  )  # fmt: skip


def _fetch_tiles(call, inputs, parts, pair, row, num_own, low, high):
  block, stages = call.sizes.block_kv, call.sizes.stages

  def fetch(part, step, source):
    slot = lax.rem(step, jnp.int32(stages))
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(part.used.at[slot]))
    plgpu.copy_gmem_to_smem(source, part.wide.at[slot], part.ready.at[slot])

  def own(index, _):
    for part in parts:
      fetch(part, index, part.own.at[pair, pl.ds(index * block, block)])

  def prefix(index, _):
    where = _where_tile_lies(call, inputs, pair, row, index)
    for part in parts:
      fetch(part, num_own + index - low, part.slots.at[where])

  if call.narrow is None:
    lax.fori_loop(0, num_own, own, None)
    if call.has_prefix:
      lax.fori_loop(low, high, prefix, None)
  else:
    start, widen = _narrow_tiles(call, inputs, parts, pair, row, num_own, low, high)
    early = jnp.minimum(low + call.sizes.narrow_stages, high)
    lax.fori_loop(low, early, start, None)
    lax.fori_loop(0, num_own, own, None)
    lax.fori_loop(low, high, widen, None)

  def drain(step, _):  # no barrier goes away before all have passed it
    for part in parts:
      plgpu.barrier_wait(part.used.at[lax.rem(step, jnp.int32(stages))])

  total = num_own + high - low
  lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def _where_tile_lies(call, inputs, pair, row, index):
  """Returns the index into the slots of the index-th tile that the row reads."""
  block, tile = call.sizes.block_kv, _tile_of(inputs, row, index)
  if call.per_page is None:
    return inputs.first[0] + pair, pl.ds(tile * block, block)
  page = inputs.page_table[row, lax.div(tile, jnp.int32(call.per_page))]
  head = lax.rem(pair, jnp.int32(call.num_kv_heads))
  offset = lax.rem(tile, jnp.int32(call.per_page)) * block
  return inputs.first[0] + page * call.num_kv_heads + head, pl.ds(offset, block)


def _narrow_tiles(call, inputs, parts, pair, row, num_own, low, high):
  """Returns loop bodies: one has the index-th tile of 8-bit numbers fetched, one hands it on."""
  stages, narrow_stages = call.sizes.stages, call.sizes.narrow_stages

  def fetch(part, index):
    slot = lax.rem(index - low, jnp.int32(narrow_stages))
    source = part.slots.at[_where_tile_lies(call, inputs, pair, row, index)]
    plgpu.copy_gmem_to_smem(source, part.narrow.at[slot], part.narrow_ready.at[slot])

  def start(index, _):
    for part in parts:
      fetch(part, index)

  def widen(index, _):
    step = num_own + index - low
    slot = lax.rem(step, jnp.int32(stages))
    narrow_slot = lax.rem(index - low, jnp.int32(narrow_stages))
    for part in parts:
      plgpu.barrier_wait(part.narrow_ready.at[narrow_slot])
      pl.when(step >= stages)(lambda part=part: plgpu.barrier_wait(part.used.at[slot]))
      for first in range(0, call.sizes.block_kv, _TILE):
        rows = pl.ds(first, _TILE)
        _widen(call, part.narrow.at[narrow_slot, rows], part.wide.at[slot, rows])
      plgpu.commit_smem()  # all have read and written: for wgmma, and for the next copy
      plgpu.barrier_arrive(part.ready.at[slot])
      pl.when(index + narrow_stages < high)(functools.partial(fetch, part, index + narrow_stages))

  return start, widen


def _widen(call, narrow, wide):
  """Writes 64 rows of 8-bit numbers as numbers that wgmma multiplies; the change is exact."""
  content = _load(call, narrow, plgpu.Layout.WGMMA_UPCAST_2X)
  if call.narrow != jnp.int8:  # floats have no shorter way to bfloat16
    content = content.astype(jnp.float32)
  wide[...] = content.astype(call.dtype)


# --- The warpgroups that multiply ----------------------------------------------------------------


def _attend(call, inputs, outs, scratch, group, pair, row, split, num_own, low, high):
  block, stages = call.sizes.block_kv, call.sizes.stages
  first = (lax.axis_index('tile') * call.num_groups + group) * _TILE
  rows = pl.ds(first, _TILE)
  queries = scratch.queries.at[group]
  ready = scratch.query_ready.at[group]
  plgpu.copy_gmem_to_smem(inputs.queries.at[pair, rows], queries, ready)
  plgpu.barrier_wait(ready)
  scales = None
  if call.narrow is not None:
    head = lax.rem(pair, jnp.int32(call.num_kv_heads))
    scales = inputs.key_scale[head], inputs.value_scale[head]

  def own(index, carry):
    visible = functools.partial(
      _unpack, call, inputs.words, row, rows, index * (block // WORD), block
    )
    slot = lax.rem(index, jnp.int32(stages))
    return _step(call, scratch, queries, slot, visible, None, None, carry)

  def prefix(ragged, index, carry):
    tile = _tile_of(inputs, row, index)
    slot = lax.rem(num_own + index - low, jnp.int32(stages))
    valid = inputs.length[row] - tile * block  # slots of the tile

    def visible():
      ok = None
      if ragged:
        ok = _iota(call, (_TILE, block), 1) < valid
      if call.windowed:
        shape = (_TILE, block)
        lowest = _load(call, inputs.lowest.at[row, rows], _BY_ROW)
        positions = _load(call, inputs.positions.at[row, pl.ds(tile * block, block)], _BY_LANE)
        seen = lax.broadcast_in_dim(positions, shape, [1]) > lax.broadcast_in_dim(
          lowest, shape, [0]
        )
        ok = seen if ok is None else ok & seen
      return ok

    has_mask = ragged or call.windowed
    left = valid if ragged else None
    visible_or_all = visible if has_mask else None
    return _step(call, scratch, queries, slot, visible_or_all, left, scales, carry)

  carry = (
    _cast(call, jnp.full((_TILE,), MASKED, jnp.float32), _BY_ROW),
    _cast(call, jnp.full((_TILE,), 0, jnp.float32), _BY_ROW),
    _cast(call, jnp.full((_TILE, call.head_dim), 0, jnp.float32), plgpu.Layout.WGMMA),
  )
  carry = lax.fori_loop(0, num_own, own, carry)
  if call.has_prefix:
    # Only a row's last tile can be ragged; under a window it is still the last that is listed.
    whole = lax.div(inputs.length[row], jnp.int32(block))
    last = _tile_of(inputs, row, jnp.maximum(high - 1, 0))
    edge = jnp.where((high > low) & (last >= whole), high - 1, high)
    carry = lax.fori_loop(low, edge, functools.partial(prefix, False), carry)
    carry = lax.fori_loop(edge, high, functools.partial(prefix, True), carry)

  peak, total, mixed = carry
  total = jnp.maximum(total, 1e-37)  # nothing at all was read: a split without tiles
  mixed = mixed / lax.broadcast_in_dim(total, mixed.shape, [0])
  queries[...] = mixed.astype(call.dtype)
  scratch.peaks.at[group][...] = peak + jnp.log(total) * _LOG2E
  plgpu.commit_smem()
  num_out = min(_TILE, outs[0].shape[2])
  out = outs[0].at[split, pair, pl.ds(first, num_out)]
  plgpu.copy_smem_to_gmem(queries.at[pl.ds(0, num_out)], out)
  plgpu.copy_smem_to_gmem(scratch.peaks.at[group], outs[1].at[split, pair, rows])
  plgpu.wait_smem_to_gmem(0)


def _step(call, scratch, queries, slot, visible, left, scales, carry):
  """Takes one tile of keys and values into the online softmax; peaks are in units of log 2.

  Args:
    left: i32[], how many slots of the tile are valid, if not all: the others may hold NaN.
    scales: f32[] of the keys and of the values, or None.
  """
  peak, total, mixed = carry
  block = call.sizes.block_kv
  plgpu.barrier_wait(scratch.key_ready.at[slot])

  def multiply_keys(product):
    plgpu.wgmma(product, queries, scratch.keys.at[slot].transpose((1, 0)))
    return product[...]

  scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((_TILE, block), jnp.float32))
  plgpu.barrier_arrive(scratch.key_used.at[slot])
  if scales is not None:
    scores = scores * scales[0]
  if call.soft_cap is not None:
    scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)
  scores = scores * _LOG2E
  if visible is not None:
    scores = jnp.where(visible(), scores, MASKED)
  new_peak = jnp.maximum(peak, scores.max(axis=1))
  shrink = jnp.exp2(peak - new_peak)
  weights = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
  total = total * shrink + weights.sum(axis=1)
  mixed = mixed * lax.broadcast_in_dim(shrink, mixed.shape, [0])
  if scales is not None:
    weights = weights * scales[1]
  weights = weights.astype(call.dtype)
  plgpu.barrier_wait(scratch.value_ready.at[slot])
  values = scratch.values.at[slot]
  if left is not None:
    _clear_dead(call, scratch, values, left)

  mixed = _accumulate(call, mixed, weights, values)
  plgpu.barrier_arrive(scratch.value_used.at[slot])
  return new_peak, total, mixed


def _accumulate(call, mixed, weights, values):
  """Returns f32[64, Dh], mixed + weights @ values."""

  if call.interpreted:  # the interpreter has no products of what is in registers
    product = jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # an ordinary read, which the copy that comes next must not overtake
    return mixed + product

  def multiply(product):
    plgpu.wgmma(product, weights, values)

  return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(mixed))


def _clear_dead(call, scratch, values, left):
  """Overwrites the values of dead slots with 0; the warpgroups share the work and wait."""
  shape, group = (_TILE, call.head_dim), lax.axis_index('group')
  for index in range(call.sizes.block_kv // _TILE):

    @pl.when(group == index % call.num_groups)
    def _clear_part(start=index * _TILE):
      part = values.at[pl.ds(start, _TILE)]
      content = _cast(call, part[...], plgpu.Layout.WGMMA)
      alive = start + _iota(call, shape, 0) < left
      part[...] = jnp.where(alive, content, jnp.zeros_like(content))

  plgpu.commit_smem()
  if call.num_groups > 1:
    plgpu.barrier_arrive(scratch.cleared)
    plgpu.barrier_wait(scratch.cleared)


def _unpack(call, words, row, rows, first, block):
  """Returns bool[64, block], what the rows see of a tile of the block itself."""
  shape = (_TILE, block)
  lane = _iota(call, shape, 1)

  def spread(index):
    word = _load(call, words.at[row, first + index, rows], _BY_ROW)
    return lax.broadcast_in_dim(word, shape, [0])

  own = spread(0)
  for index in range(1, block // WORD):
    own = jnp.where(lane >= index * WORD, spread(index), own)
  return (lax.shift_right_logical(own, lane & (WORD - 1)) & 1) > 0


def _iota(call, shape, axis):
  return _cast(call, lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)


def _cast(call, array, layout):
  """Returns the array spread over the threads as `layout` says; the interpreter has no layouts."""
  return array if call.interpreted else plgpu.layout_cast(array, layout)


def _load(call, ref, layout):
  if call.interpreted:
    return ref[...]
  return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)


# Up to jax 0.10 `load` wants an index, from 0.11 on it warns of one.
_NO_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()

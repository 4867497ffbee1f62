"""The TPU kernel of block attention.

The grid is (splits, groups of heads, work items). An item is one stretch of one row's slots, for
several heads at a time; the items of a row follow each other and share one online softmax, which
the row's first item begins with the block itself. Rows cost what they hold: the list of items is
made from their lengths and its length is the grid's. A contiguous cache and a paged one differ in
where an item's slots are fetched from, and in nothing else.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `P` pages, `L` layers, `Hkv`
key/value heads, `G` query heads a key head, `R` rows of a matmul (G * T, padded), `Dh` head size,
`W` words of bits, `Z` splits.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.block_attention import block_sizes
from pallas_kernels.block_attention.reference import MASKED
from pallas_kernels.block_attention.reference import Prefix
from pallas_kernels.block_attention.reference import group_queries
from pallas_kernels.block_attention.reference import layer_scale
from pallas_kernels.block_attention.reference import ungroup
from pallas_kernels.block_attention.rows import narrow_mask
from pallas_kernels.block_attention.rows import needed_blocks
from pallas_kernels.block_attention.rows import round_up
from pallas_kernels.block_attention.rows import spread_rows
from pallas_kernels.dispatch import device_kind
from pallas_kernels.masks import WORD
from pallas_kernels.masks import pack_mask
from pallas_kernels.worklist import make_work_list

_FLOATS = (jnp.bfloat16, jnp.float32)
_NARROW = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
_SUBLANES = 16  # rows of queries and block tokens are padded to whole tiles of bfloat16


def why_not(queries: jax.Array, keys: jax.Array, prefix: Prefix | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  if queries.dtype not in _FLOATS or keys.dtype != queries.dtype:
    return f'it takes bfloat16 or float32, all alike: {queries.dtype=}, {keys.dtype=}'
  if keys.shape[2] > 1024:
    return f'a block has at most 1024 tokens: {keys.shape=}'
  if prefix is not None:
    if prefix.keys.dtype != queries.dtype and prefix.keys.dtype not in _NARROW:
      return f'a cache is like the queries or has 8 bits: {prefix.keys.dtype=}, {queries.dtype=}'
    if prefix.page_table is not None and prefix.keys.shape[3] % 32:
      return f'pages must hold a multiple of 32 slots: {prefix.keys.shape=}'
  if block_sizes.tpu_block_sizes('', _problem(queries, keys, prefix)) is None:
    return f'{queries.shape[1] * queries.shape[2] // keys.shape[1]} rows of queries are too many'
  return None


def _problem(queries, keys, prefix):
  num_rows = round_up(queries.shape[1] * queries.shape[2] // keys.shape[1], _SUBLANES)
  slots = None if prefix is None else prefix.keys
  paged = prefix is not None and prefix.page_table is not None
  return block_sizes.Problem(
    num_rows=num_rows,
    num_tokens=round_up(keys.shape[2], _SUBLANES),
    num_kv_heads=keys.shape[1],
    head_dim=keys.shape[3],
    itemsize=queries.dtype.itemsize,
    cache_itemsize=queries.dtype.itemsize if slots is None else slots.dtype.itemsize,
    num_slots=0 if prefix is None else prefix.positions.shape[1],
    page_size=slots.shape[3] if slots is not None and paged else None,
  )


def block_attention_tpu(
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
  sizes: 'block_sizes.TpuBlockSizes | None' = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns f[B, T, H, Dh]; see `block_attention`.

  Args:
    sizes: block sizes; None looks them up for the device.
    interpret: as `pallas_call` takes it.

  Source: FlashAttention, arXiv:2205.14135, algorithm 1; splits and their merging as in
  Flash-Decoding (FlashAttention-2, arXiv:2307.08691, section 3.1).
  """
  problem = _problem(queries, keys, prefix)
  if sizes is None:
    sizes = block_sizes.tpu_block_sizes(device_kind(), problem)
  assert sizes is not None
  num_queries, group = queries.shape[1], queries.shape[2] // keys.shape[1]
  num_rows, num_tokens = num_queries * group, keys.shape[2]
  lowest = None
  if window is not None:
    assert query_positions is not None and key_positions is not None
    lowest = query_positions - window
    mask = narrow_mask(mask, num_tokens, window, query_positions, key_positions)
  words = pack_mask(mask) if mask.dtype == jnp.bool_ else mask
  rows = [(0, 0), (0, 0), (0, problem.num_rows - num_rows), (0, 0)]
  tokens = [(0, 0), (0, 0), (0, problem.num_tokens - num_tokens), (0, 0)]
  by_row = functools.partial(spread_rows, group=group, num_rows=problem.num_rows)
  grouped = jnp.pad(group_queries(queries, keys.shape[1], scale), rows)
  own = [grouped, jnp.pad(keys, tokens), jnp.pad(values, tokens), by_row(words)]
  if lowest is not None and prefix is not None:
    own.append(by_row(lowest[:, :, None]))
  call = _Call(
    problem=problem,
    sizes=sizes,
    num_words=words.shape[-1],
    num_pages=_num_pages(prefix, sizes),
    windowed=window is not None and prefix is not None,
    soft_cap=soft_cap,
    scaled=prefix is not None and prefix.key_scale is not None,
    paged=prefix is not None and prefix.page_table is not None,
    has_prefix=prefix is not None,
    dtype=queries.dtype,
  )
  lowest = None if lowest is None else lowest.min(-1)
  parts = _run(call, own, prefix, lowest, interpret)
  mixed = parts[0][0] if sizes.num_splits == 1 else _merge(*parts).astype(queries.dtype)
  return ungroup(mixed[:, :, :num_rows], queries.shape)


class _Call(NamedTuple):
  """What is static about one call."""

  problem: block_sizes.Problem
  sizes: block_sizes.TpuBlockSizes
  num_words: int  # W
  num_pages: int  # stretches of slots fetched apart in one step; 1 if the cache is contiguous
  windowed: bool
  soft_cap: float | None
  scaled: bool
  paged: bool
  has_prefix: bool
  dtype: Any


def _num_pages(prefix, sizes):
  if prefix is None or prefix.page_table is None:
    return 1
  return sizes.block_kv // prefix.keys.shape[3]


def _merge(mixed, peak, total):
  """Returns f32[B, Hkv, R, Dh] from parts f32[Z, B, Hkv, R, Dh or 1] of one softmax."""
  weight = jnp.exp(peak - peak.max(0, keepdims=True))
  return (mixed * weight).sum(0) / (total * weight).sum(0)


# --- The call ------------------------------------------------------------------------------------


def _run(call, own, prefix, lowest, interpret):
  """Returns (mixed,) normalised or (mixed, peak, total) of the splits, [Z, B, Hkv, R, ...]."""
  problem, sizes = call.problem, call.sizes
  batch, heads = own[0].shape[0], sizes.heads
  num_blocks = max(-(-problem.num_slots // sizes.block_kv), 1)
  wanted = jnp.zeros((batch, 1), bool)
  if prefix is not None:
    wanted = needed_blocks(prefix, sizes.block_kv, lowest)
  work = make_work_list(wanted, sizes.num_splits)
  scalars = [work.items, work.count]
  inputs, specs = list(own), _own_specs(call, heads, num_blocks)
  if prefix is not None:
    scalars += [prefix.length, prefix.layer.reshape(1)]
    if call.paged:
      scalars.append(prefix.page_table)
    if call.windowed:
      inputs.append(prefix.positions[:, None, :])
      specs.append(pl.BlockSpec((None, 1, sizes.block_kv), _position_map(num_blocks)))
    if call.scaled:
      inputs += [layer_scale(s, prefix) for s in (prefix.key_scale, prefix.value_scale)]
      specs += [pl.BlockSpec(memory_space=pltpu.SMEM)] * 2
    for slots in (prefix.keys, prefix.values):
      inputs += [slots] * call.num_pages
      specs += [_slots_spec(call, heads, num_blocks, page) for page in range(call.num_pages)]

  def out(width, dtype):
    shape = (sizes.num_splits, batch, problem.num_kv_heads, problem.num_rows, width)
    block = (None, None, heads, problem.num_rows, width)

    def index(split, head, step, items, *_):
      return split, _row(items, split, step, num_blocks), head, 0, 0

    return jax.ShapeDtypeStruct(shape, dtype), pl.BlockSpec(block, index)

  whole = sizes.num_splits == 1
  outs = [out(problem.head_dim, call.dtype if whole else jnp.float32)]
  if not whole:
    outs += [out(1, jnp.float32), out(1, jnp.float32)]
  state = (heads, problem.num_rows)
  return pl.pallas_call(
    functools.partial(_kernel, call, num_blocks),
    out_shape=[shape for shape, _ in outs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(sizes.num_splits, problem.num_kv_heads // heads, work.count.max()),
      in_specs=specs,
      out_specs=[spec for _, spec in outs],
      scratch_shapes=[
        pltpu.VMEM((*state, problem.head_dim), jnp.float32),
        pltpu.VMEM((*state, 1), jnp.float32),
        pltpu.VMEM((*state, 1), jnp.float32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=block_sizes.VMEM_LIMIT,
    ),
    interpret=interpret,
    name='block_attention',
  )(*scalars, *inputs)


def _item(items, split, step):
  item = items[split, step]
  return jnp.where(item < 0, ~item, item)


def _row(items, split, step, num_blocks):
  return lax.div(_item(items, split, step), num_blocks)


def _own_specs(call, heads, num_blocks):
  problem = call.problem

  def by_head(size, width):
    def index(split, head, step, items, *_):
      return _row(items, split, step, num_blocks), head, 0, 0

    return pl.BlockSpec((None, heads, size, width), index)

  def shared(width):
    def index(split, head, step, items, *_):
      del head
      return _row(items, split, step, num_blocks), 0, 0

    return pl.BlockSpec((None, problem.num_rows, width), index)

  own = by_head(problem.num_tokens, problem.head_dim)
  specs = [by_head(problem.num_rows, problem.head_dim), own, own, shared(call.num_words)]
  return specs + [shared(1)] * call.windowed


def _position_map(num_blocks):
  def index(split, head, step, items, *_):
    del head
    item = _item(items, split, step)
    return lax.div(item, num_blocks), 0, lax.rem(item, num_blocks)

  return index


def _slots_spec(call, heads, num_blocks, page):
  """Where the page-th stretch of an item's slots is: in its row, or where the table says."""
  head_dim, size = call.problem.head_dim, call.sizes.block_kv // call.num_pages

  def contiguous(split, head, step, items, count, length, layer):
    del count, length
    item = _item(items, split, step)
    return layer[0], lax.div(item, num_blocks), head, lax.rem(item, num_blocks), 0

  def paged(split, head, step, items, count, length, layer, table):
    del count
    item = _item(items, split, step)
    row = lax.div(item, num_blocks)
    last = lax.div(jnp.maximum(length[row], 1) - 1, size)  # entries past it are not to be followed
    entry = jnp.minimum(lax.rem(item, num_blocks) * call.num_pages + page, last)
    where = jnp.where(length[row] > 0, table[row, entry], 0)
    return layer[0], where, head, 0, 0

  return pl.BlockSpec((None, None, heads, size, head_dim), paged if call.paged else contiguous)


# --- The kernel ----------------------------------------------------------------------------------


class _Refs(NamedTuple):
  """The kernel's memory by name; absent parts are None or empty."""

  items: Any
  count: Any
  length: Any
  queries: Any  # [heads, R, Dh]
  keys: Any  # [heads, N, Dh]
  values: Any
  words: Any  # [R, W]
  lowest: Any  # [R, 1] a query sees positions greater than this
  positions: Any  # [1, block]
  key_scale: Any
  value_scale: Any
  key_slots: Any  # one [heads, page, Dh] for each page of the item
  value_slots: Any
  outs: Any
  mixed: Any  # f32[heads, R, Dh]
  peak: Any  # f32[heads, R, 1]
  total: Any  # f32[heads, R, 1]


def _name_refs(call, refs):
  refs = list(refs)

  def take(count=1):
    taken, refs[:count] = refs[:count], []
    return taken

  items, count = take(2)
  length = None
  if call.has_prefix:
    length, _ = take(2)
    take(call.paged)
  queries, keys, values, words = take(4)
  lowest = take()[0] if call.windowed else None
  positions = take()[0] if call.windowed else None
  key_scale, value_scale = take(2) if call.scaled else (None, None)
  pages = call.num_pages if call.has_prefix else 0
  key_slots, value_slots = take(pages), take(pages)
  outs = take(1 if call.sizes.num_splits == 1 else 3)
  return _Refs(
    items, count, length, queries, keys, values, words, lowest, positions, key_scale, value_scale,
    key_slots, value_slots, outs, *refs,
  )  # fmt: skip


def _kernel(call, num_blocks, *refs):
  r = _name_refs(call, refs)
  split, group, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  heads, size = call.sizes.heads, call.sizes.block_kv
  last_step = r.count[split] - 1
  row = _row(r.items, split, step, num_blocks)
  before = _row(r.items, split, jnp.maximum(step - 1, 0), num_blocks)
  after = _row(r.items, split, jnp.minimum(step + 1, last_step), num_blocks)
  live = step <= last_step

  @pl.when(live & ((step == 0) | (before != row)))
  def _begin():
    r.mixed[...] = jnp.zeros_like(r.mixed)
    r.peak[...] = jnp.full_like(r.peak, MASKED)
    r.total[...] = jnp.zeros_like(r.total)

    @pl.when(split == 0)
    def _attend_block():
      visible = _unpack(r.words[...], call.problem.num_tokens)
      for head in range(heads):
        scores = _scores(call, r.queries[head], r.keys[head], None)
        _update(r, head, jnp.where(visible, scores, MASKED), r.values[head], None)

  def attend_slots(start, ragged):
    visible = None
    if call.windowed:
      visible = r.positions[...] > r.lowest[...]
    if ragged:
      lane = lax.broadcasted_iota(jnp.int32, (call.problem.num_rows, size), 1)
      valid = start + lane < r.length[row]
      visible = valid if visible is None else visible & valid
    for head in range(heads):
      key_scale, value_scale = (
        None if s is None else s[group * heads + head] for s in (r.key_scale, r.value_scale)
      )
      some_keys = _join(call, [slots[head] for slots in r.key_slots])
      some_values = _join(call, [slots[head] for slots in r.value_slots])
      if ragged:  # dead slots may hold NaN
        slot = lax.broadcasted_iota(jnp.int32, some_values.shape, 0)
        some_values = jnp.where(start + slot < r.length[row], some_values, 0)
      scores = _scores(call, r.queries[head], some_keys, key_scale)
      if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
      _update(r, head, scores, some_values, value_scale)

  if call.has_prefix:
    start = lax.rem(_item(r.items, split, step), num_blocks) * size
    some = live & (r.items[split, step] >= 0) & (start < r.length[row])
    whole = start + size <= r.length[row]
    pl.when(some & whole)(lambda: attend_slots(start, ragged=False))
    pl.when(some & ~whole)(lambda: attend_slots(start, ragged=True))

  @pl.when(live & ((step == last_step) | (after != row)))
  def _end():
    if call.sizes.num_splits == 1:
      r.outs[0][...] = (r.mixed[...] / r.total[...]).astype(call.dtype)
    else:
      for out, state in zip(r.outs, (r.mixed, r.peak, r.total), strict=True):
        out[...] = state[...]


def _join(call, pages):
  """Returns f[block, Dh] in the dtype of the queries."""
  pages = [page.astype(call.dtype) for page in pages]
  return pages[0] if len(pages) == 1 else jnp.concatenate(pages, axis=0)


def _scores(call, queries, keys, scale):
  scores = _dot(queries, keys, 1)
  if scale is not None:
    scores = scores * scale
  return scores if call.soft_cap is None else call.soft_cap * jnp.tanh(scores / call.soft_cap)


def _update(r, head, scores, values, scale):
  """Takes scores f32[R, n] and values f[n, Dh] into the online softmax of a head."""
  peak = jnp.maximum(r.peak[head], scores.max(-1, keepdims=True))
  shrink, weights = jnp.exp(r.peak[head] - peak), jnp.exp(scores - peak)
  mixed = _dot(weights.astype(values.dtype), values, 0)
  if scale is not None:
    mixed = mixed * scale
  r.peak[head] = peak
  r.total[head] = r.total[head] * shrink + weights.sum(-1, keepdims=True)
  r.mixed[head] = r.mixed[head] * shrink + mixed


def _dot(a, b, axis):
  """Returns f32, the product of a[R, x] and of b contracted over its `axis`."""
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(
    a, b, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
  )


def _unpack(words, num_tokens):
  """Returns bool[R, N] from words i32[R, W]: bit j % 32 of word j // 32."""
  shape = (words.shape[0], num_tokens)
  lane = lax.broadcasted_iota(jnp.int32, shape, 1)
  own = jnp.broadcast_to(words[:, :1], shape)
  for index in range(1, words.shape[1]):
    own = jnp.where(lane >= index * WORD, words[:, index : index + 1], own)
  seen = lax.shift_right_logical(own, lane & (WORD - 1)) & 1 > 0
  return seen & (lane < words.shape[1] * WORD)

"""Problems of the sizes that models have, for the kernels: what is compiled, checked and measured.

Needs jax alone. Axes: `B` batch, `T` block tokens, `S` slots, `L` layers, `H` query heads, `Hkv`
key/value heads, `Dh` head size, `D` hidden size, `V` vocabulary, `K` nodes of a path.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention import Prefix
from pallas_kernels.block_attention import block_attention
from pallas_kernels.commit import commit
from pallas_kernels.unmask import unmask
from pallas_kernels.verify import verify

_PAGE = 128


class Problem(NamedTuple):
  """One call of one operation."""

  name: str
  run: Callable  # (*args, implementation=...) -> what the operation returns
  args: tuple  # pytrees of ShapeDtypeStruct
  num_bytes: int  # that any implementation must read and write
  num_flops: int  # of its matrix products


class Attention(NamedTuple):
  """A block attention call; the defaults are those of an 8B Llama with a tree of 64 nodes."""

  batch: int = 8
  num_queries: int = 64
  prefix: int = 8192
  num_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  dtype: Any = jnp.bfloat16
  cache_dtype: Any = None
  paged: bool = False
  windowed: bool = False
  soft_cap: float | None = None

  @property
  def name(self) -> str:
    """Returns a label that says what is not usual."""
    label = f'attention B={self.batch} T={self.num_queries} S={self.prefix}'
    label += f' H={self.num_heads}/{self.num_kv_heads} Dh={self.head_dim}'
    label += f' {jnp.dtype(self.dtype).name}'
    if self.cache_dtype is not None:
      label += f' cache {jnp.dtype(self.cache_dtype).name}'
    extra = {'paged': self.paged, 'window': self.windowed, 'soft cap': self.soft_cap is not None}
    return label + ''.join(f' {name}' for name, is_on in extra.items() if is_on)


def attention(shape: Attention) -> Problem:
  """Returns a block attention problem with full rows."""
  s, like = shape, _like
  cache_dtype = jnp.dtype(s.dtype if s.cache_dtype is None else s.cache_dtype)
  slots = like((1, s.batch, s.num_kv_heads, s.prefix, s.head_dim), cache_dtype)
  table = None
  if s.paged:
    per_row = s.prefix // _PAGE
    slots = like((1, s.batch * per_row, s.num_kv_heads, _PAGE, s.head_dim), cache_dtype)
    table = like((s.batch, per_row), jnp.int32)
  scale = like((1, s.num_kv_heads), jnp.float32) if cache_dtype.itemsize == 1 else None
  prefix = Prefix(
    slots, slots, like((s.batch, s.prefix), jnp.int32), like((s.batch,), jnp.int32),
    like((), jnp.int32), table, scale, scale,
  )  # fmt: skip
  queries = like((s.batch, s.num_queries, s.num_heads, s.head_dim), s.dtype)
  keys = like((s.batch, s.num_kv_heads, s.num_queries, s.head_dim), s.dtype)
  mask = like((s.batch, s.num_queries, s.num_queries), jnp.bool_)
  positions = like((s.batch, s.num_queries), jnp.int32)
  window = (like((), jnp.int32), positions, positions) if s.windowed else (None, None, None)

  def run(queries, keys, values, mask, prefix, window, query_positions, key_positions, **options):
    return block_attention(
      queries, keys, values, mask, prefix, scale=s.head_dim**-0.5, soft_cap=s.soft_cap,
      window=window, query_positions=query_positions, key_positions=key_positions, **options,
    )  # fmt: skip

  seen = s.prefix + s.num_queries
  return Problem(
    name=s.name,
    run=run,
    args=(queries, keys, keys, mask, prefix, *window),
    num_bytes=2 * _size(slots) + 2 * _size(queries) + 2 * _size(keys),
    num_flops=4 * s.batch * s.num_heads * s.num_queries * seen * s.head_dim,
  )


def commit_path(batch=8, num_layers=32, num_slots=8192, path=6, nodes=64, paged=False) -> Problem:
  """Returns a commit of a tree's path into the keys of an 8B Llama."""
  like, heads, head_dim = _like, 8, 128
  slots = like((num_layers, batch, heads, num_slots, head_dim), jnp.bfloat16)
  table = None
  if paged:
    per_row = num_slots // _PAGE
    slots = like((num_layers, batch * per_row, heads, _PAGE, head_dim), jnp.bfloat16)
    table = like((batch, per_row), jnp.int32)
  block = like((num_layers, batch, heads, nodes, head_dim), jnp.bfloat16)
  rows = like((batch,), jnp.int32)

  def run(slots, block, path, length, count, table, **options):
    return commit(slots, block, path, length, count, page_table=table, **options)

  return Problem(
    name=f'commit B={batch} L={num_layers} S={num_slots} K={path}{" paged" if paged else ""}',
    run=run,
    args=(slots, block, like((batch, path), jnp.int32), rows, rows, table),
    num_bytes=2 * num_layers * batch * heads * path * head_dim * 2,
    num_flops=0,
  )


def verify_nodes(batch=8, nodes=64, vocab_size=128256, filtered=False, laws=False) -> Problem:
  """Returns a verification of a tree's nodes; `filtered` with top-k, top-p and min-p."""
  like = _like
  logits = like((batch, nodes, vocab_size), jnp.float32)
  rows = like((batch,), jnp.float32)
  filters = dict(top_k=like((batch,), jnp.int32), top_p=rows, min_p=rows) if filtered else {}
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (batch, nodes)))
  draft = {'laws': logits, 'residual': like((batch, nodes), jnp.bool_)} if laws else {}

  def run(logits, tokens, temperature, keys, more, **options):
    return verify(logits, tokens, temperature=temperature, keys=keys, **more, **options)

  kind = (' top-k/top-p' if filtered else '') + (' residual' if laws else '')
  return Problem(
    name=f'verify B={batch} N={nodes} V={vocab_size}{kind}',
    run=run,
    args=(logits, like((batch, nodes, 1), jnp.int32), rows, keys, filters | draft),
    num_bytes=_size(logits) * (2 if laws else 1),
    num_flops=0,
  )


def unmask_block(batch=8, length=32, vocab_size=126464, hidden=None, dtype=jnp.bfloat16) -> Problem:
  """Returns an unmasking of a block; with a hidden size fused with the head."""
  like = _like
  if hidden is None:
    args = (like((batch, length, vocab_size), dtype), None)
  else:
    args = (like((batch, length, hidden), dtype), like((hidden, vocab_size), dtype))
  kind = '' if hidden is None else f' head D={hidden}'
  return Problem(
    name=f'unmask B={batch} T={length} V={vocab_size}{kind} {jnp.dtype(dtype).name}',
    run=unmask,
    args=args,
    num_bytes=sum(_size(a) for a in args if a is not None),
    num_flops=0 if hidden is None else 2 * batch * length * hidden * vocab_size,
  )


def compiled_problems() -> list[Problem]:
  """Returns what `make aot` compiles: every option of every kernel at the size of a model."""
  shapes = [
    Attention(),
    Attention(num_queries=1),
    Attention(num_queries=16, prefix=32768),
    Attention(num_queries=256),
    Attention(head_dim=64),
    Attention(head_dim=80, num_queries=5),
    Attention(head_dim=256, num_heads=8, num_kv_heads=4),
    Attention(num_kv_heads=1, num_queries=16),
    Attention(dtype=jnp.float32),
    Attention(dtype=jnp.float32, num_queries=1),
    Attention(dtype=jnp.float32, head_dim=256, num_heads=8, num_kv_heads=4),
    Attention(dtype=jnp.float32, cache_dtype=jnp.int8, paged=True, windowed=True),
    Attention(cache_dtype=jnp.int8),
    Attention(cache_dtype=jnp.int8, num_queries=1),
    Attention(cache_dtype=jnp.int8, head_dim=256, num_heads=8, num_kv_heads=4),
    Attention(cache_dtype=jnp.float8_e4m3fn),
    Attention(cache_dtype=jnp.float8_e4m3fn, head_dim=80, num_queries=5),
    Attention(cache_dtype=jnp.float8_e4m3fn, paged=True, windowed=True),
    Attention(paged=True),
    Attention(paged=True, windowed=True),
    Attention(windowed=True),
    Attention(soft_cap=50.0),
  ]
  return [
    *map(attention, shapes),
    commit_path(),
    commit_path(paged=True),
    verify_nodes(),
    verify_nodes(filtered=True),
    verify_nodes(laws=True),
    unmask_block(),
    unmask_block(hidden=4096),
  ]


def fill(problem: Problem, seed: int = 0):
  """Returns arrays for the arguments of a problem: full rows, random trees, random pages."""
  rng = np.random.default_rng(seed)
  flat, layout = jax.tree.flatten(problem.args)
  values = jax.tree.unflatten(layout, [_some(rng, like) for like in flat])
  if problem.run is unmask:
    return values
  if problem.name.startswith('attention'):
    queries, keys, others, mask, prefix, *window = values
    mask = jnp.asarray(np.stack([_tree(rng, mask.shape[1]) for _ in range(mask.shape[0])]))
    num_slots = prefix.positions.shape[1]
    prefix = prefix._replace(
      positions=jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), prefix.positions.shape),
      length=jnp.full(prefix.length.shape, num_slots, jnp.int32),
      layer=jnp.int32(0),
      page_table=_page_table(rng, prefix.page_table),
    )
    if window[0] is not None:
      ahead = num_slots + jnp.zeros_like(window[1])
      window = [jnp.int32(num_slots // 4), ahead, ahead]
    return queries, keys, others, mask, prefix, *window
  if problem.name.startswith('commit'):
    slots, block, path, length, count, table = values
    length = jnp.full(length.shape, 1000, jnp.int32)
    return slots, block, path, length, jnp.full_like(count, path.shape[1]), _page_table(rng, table)
  logits, tokens, temperature, keys, more = values
  more = dict(more)
  for name, value in dict(top_k=40, top_p=0.95, min_p=0.02).items():
    if name in more:
      more[name] = jnp.full_like(more[name], value)
  return logits, tokens, jnp.full_like(temperature, 0.8), keys, more


def _like(shape, dtype) -> Any:
  """Returns what stands for an array where only its shape and dtype matter."""
  return jax.ShapeDtypeStruct(shape, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key, shape):
  return jax.random.normal(key, shape, jnp.bfloat16)


def _some(rng, like):
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    return jax.random.split(jax.random.key(0), like.shape)
  if like.dtype == jnp.bool_:
    return jnp.asarray(rng.random(like.shape) < 0.5)
  if like.dtype == jnp.int8:
    return jnp.asarray(rng.integers(-100, 100, like.shape), jnp.int8)
  if jnp.issubdtype(like.dtype, jnp.integer):
    return jnp.asarray(rng.integers(0, 5, like.shape), like.dtype)
  return _normal(jax.random.key(rng.integers(2**31)), like.shape).astype(like.dtype)


def _tree(rng, num_nodes):
  mask = np.eye(num_nodes, dtype=bool)
  for node in range(1, num_nodes):
    mask[node] |= mask[rng.integers(max(0, node - 8), node)]
  return mask


def _page_table(rng, like):
  if like is None:
    return None
  return jnp.asarray(rng.permutation(math.prod(like.shape)).reshape(like.shape), jnp.int32)


def _size(like):
  return math.prod(like.shape) * jnp.dtype(like.dtype).itemsize

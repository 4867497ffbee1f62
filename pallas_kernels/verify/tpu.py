"""The TPU kernel of verify: eight nodes at a time, whole rows of logits in vector memory.

The logits are read once from memory, however many passes a threshold takes over them. Axes: `B`
batch, `N` nodes, `M = B N` rows, `V` vocabulary, `K` tokens asked for.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.verify import core
from pallas_kernels.verify.reference import Ingredients
from pallas_kernels.verify.wiring import Request
from pallas_kernels.verify.wiring import gathered_shapes
from pallas_kernels.verify.wiring import ingredients
from pallas_kernels.verify.wiring import make_request

_ROWS = 8
_CHUNK = 2048  # tokens of a pass's step
_VMEM_LIMIT = 56 * 2**20
_SPARE = 4 * 2**20


def why_not(logits: jax.Array, laws: jax.Array | None, keys: jax.Array | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  for name, array in (('logits', logits), ('laws', laws)):
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      return f'it takes bfloat16 and float32: {name} are {array.dtype}'
  if _row_bytes(logits, laws) > _VMEM_LIMIT - _SPARE:
    return f'eight rows of this vocabulary do not fit into vector memory: {logits.shape=}'
  if keys is not None and 'fry' not in str(keys.dtype):
    return f'it makes the random numbers of threefry: {keys.dtype=}'
  return None


def _row_bytes(logits, laws):
  arrays = [logits] if laws is None else [logits, laws]
  return sum(2 * _ROWS * _padded(logits.shape[2]) * a.dtype.itemsize for a in arrays)


def _padded(vocab_size):
  chunk = min(_CHUNK, -(-vocab_size // 128) * 128)
  return -(-vocab_size // chunk) * chunk


def verify_tpu(
  logits: jax.Array,
  tokens: jax.Array,
  *,
  temperature: jax.Array,
  top_k: jax.Array | None = None,
  top_p: jax.Array | None = None,
  min_p: jax.Array | None = None,
  laws: jax.Array | None = None,
  residual: jax.Array | None = None,
  keys: jax.Array | None = None,
  interpret: Any = False,
) -> Ingredients:
  """Returns the ingredients of every node; see `verify`."""
  batch, num_nodes, vocab_size = logits.shape
  request = make_request(tokens, num_nodes, temperature, top_k, top_p, min_p, residual, keys)
  num_rows = batch * num_nodes
  wide = [a.reshape(num_rows, vocab_size) for a in (logits, laws) if a is not None]
  small, layout = jax.tree.flatten(request)
  padded = _padded(vocab_size)

  def spec(width):
    return pl.BlockSpec((_ROWS, width), lambda row: (row, 0))

  shapes = gathered_shapes(request, laws is not None, num_rows)
  outs, out_layout = jax.tree.flatten(shapes)
  results = pl.pallas_call(
    functools.partial(_kernel, vocab_size, padded, laws is not None, layout),
    out_shape=outs,
    grid=(pl.cdiv(num_rows, _ROWS),),
    in_specs=[spec(padded)] * len(wide) + [spec(a.shape[1]) for a in small],
    out_specs=[spec(out.shape[1]) for out in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=_VMEM_LIMIT
    ),
    interpret=interpret,
    name='verify',
  )(*wide, *small)
  return ingredients(jax.tree.unflatten(out_layout, results), batch, num_nodes)


def _kernel(vocab_size, padded, has_laws, layout, *refs):
  num_wide = 1 + has_laws
  wide, rest = refs[:num_wide], refs[num_wide:]
  request: Request = jax.tree.unflatten(layout, [ref[...] for ref in rest[: layout.num_leaves]])
  outs = rest[layout.num_leaves :]
  chunk = min(_CHUNK, padded)

  def rows_of(ref):
    def ids(i):
      return i * chunk + lax.broadcasted_iota(jnp.int32, (_ROWS, chunk), 1)

    def read(i):
      start = pl.multiple_of(i * chunk, chunk)
      logits = ref[:, pl.ds(start, chunk)].astype(jnp.float32)
      return jnp.where(ids(i) < vocab_size, logits, -jnp.inf)

    return core.Rows(read, ids, padded // chunk)

  gathered = core.gather(
    rows_of(wide[0]),
    request.warp,
    request.tokens,
    laws=rows_of(wide[1]) if has_laws else None,
    residual=request.residual,
    keys=request.keys,
  )
  for out, value in zip(outs, jax.tree.leaves(gathered), strict=True):
    out[...] = value

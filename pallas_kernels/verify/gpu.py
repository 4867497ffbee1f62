"""The GPU kernel of verify (Triton): one thread block a node, which passes over its row of logits.

The first pass reads memory, those that follow find the row in the cache of the device (half a
megabyte a row, 50 MB on an H200). Axes: `B` batch, `N` nodes, `M = B N` rows, `V` vocabulary, `K`
tokens asked for.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from pallas_kernels.verify import core
from pallas_kernels.verify.reference import Ingredients
from pallas_kernels.verify.wiring import Request
from pallas_kernels.verify.wiring import gathered_shapes
from pallas_kernels.verify.wiring import ingredients
from pallas_kernels.verify.wiring import make_request

_CHUNK = 4096


def why_not(logits: jax.Array, laws: jax.Array | None, keys: jax.Array | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  for name, array in (('logits', logits), ('laws', laws)):
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      return f'it takes floats of 16 and 32 bits: {name} are {array.dtype}'
  if keys is not None and 'fry' not in str(keys.dtype):
    return f'it makes the random numbers of threefry: {keys.dtype=}'
  return None


def verify_gpu(
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
  outs, out_layout = jax.tree.flatten(gathered_shapes(request, laws is not None, num_rows))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  results = pl.pallas_call(
    functools.partial(_kernel, vocab_size, laws is not None, layout),
    out_shape=[jax.ShapeDtypeStruct((num_rows,), out.dtype) for out in outs],
    grid=(num_rows,),
    in_specs=[anywhere] * (len(wide) + len(small)),
    out_specs=[anywhere] * len(outs),
    compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
    interpret=interpret,
    name='verify',
  )(*wide, *(a[:, 0] for a in small))
  return ingredients(jax.tree.unflatten(out_layout, results), batch, num_nodes)


def _kernel(vocab_size, has_laws, layout, *refs):
  num_wide = 1 + has_laws
  wide, rest = refs[:num_wide], refs[num_wide:]
  row = pl.program_id(0)

  def column(ref):
    return plt.load(ref.at[row]).reshape(1, 1)

  request: Request = jax.tree.unflatten(layout, [column(r) for r in rest[: layout.num_leaves]])
  outs = rest[layout.num_leaves :]
  chunk = min(_CHUNK, pl.next_power_of_2(vocab_size))

  def rows_of(ref):
    def ids(i):
      return i * chunk + lax.broadcasted_iota(jnp.int32, (1, chunk), 1)

    def read(i):
      inside = ids(i) < vocab_size
      return plt.load(ref.at[row, ids(i)], mask=inside, other=-jnp.inf).astype(jnp.float32)

    return core.Rows(read, ids, pl.cdiv(vocab_size, chunk))

  gathered = core.gather(
    rows_of(wide[0]),
    request.warp,
    request.tokens,
    laws=rows_of(wide[1]) if has_laws else None,
    residual=request.residual,
    keys=request.keys,
  )
  for out, value in zip(outs, jax.tree.leaves(gathered), strict=True):
    plt.store(out.at[row], value.reshape(()))

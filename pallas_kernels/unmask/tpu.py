"""The TPU kernel of unmask: one pass over the vocabulary, with or without the head's matmul.

The grid is (tiles of positions, blocks of the vocabulary); what is known of the blocks so far is
kept in vector memory. With a head a block's logits are made there, used and forgotten.

Axes: `M` positions of the batch (B * T), `D` hidden size, `V` vocabulary.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.unmask.online import State
from pallas_kernels.unmask.online import update
from pallas_kernels.unmask.reference import Certainty
from pallas_kernels.unmask.reference import certainty

_BLOCK_BYTES = 4 * 2**20  # of logits or of the head, fetched at a time
_ROWS = 256  # positions of a tile


def why_not(logits: jax.Array, head: jax.Array | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  for name, array in (('logits', logits), ('head', head)):
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      return f'it takes bfloat16 and float32: {name} are {array.dtype}'
  if head is not None and logits.shape[-1] > 16384:
    return f'the hidden size is at most 16384: {logits.shape=}'
  return None


def unmask_tpu(
  logits: jax.Array,
  head: jax.Array | None = None,
  *,
  transposed: bool = False,
  interpret: Any = False,
) -> Certainty:
  """Returns the certainty of every position; see `unmask`.

  Source: online softmax, arXiv:1805.02867, with a running first moment for the entropy.
  """
  batch, length, size = logits.shape
  vocab_size = size if head is None else head.shape[0 if transposed else 1]
  flat = logits.reshape(-1, size)
  rows = min(_ROWS, _round_up(flat.shape[0], 16))
  rows = rows if head is not None else min(rows, 64)
  width = rows if head is None else size
  itemsize = (flat if head is None else head).dtype.itemsize
  block = max(_BLOCK_BYTES // (width * itemsize) // 128 * 128, 128)
  block = min(block, 4096, _round_up(vocab_size, 128))
  grid = (pl.cdiv(flat.shape[0], rows), pl.cdiv(vocab_size, block))
  if head is None:
    inputs, specs = [flat], [pl.BlockSpec((rows, block), lambda i, j: (i, j))]
  elif transposed:
    inputs = [flat, head.astype(flat.dtype)]
    specs = [
      pl.BlockSpec((rows, size), lambda i, j: (i, 0)),
      pl.BlockSpec((block, size), lambda i, j: (j, 0)),
    ]
  else:
    inputs = [flat, head.astype(flat.dtype)]
    specs = [
      pl.BlockSpec((rows, size), lambda i, j: (i, 0)),
      pl.BlockSpec((size, block), lambda i, j: (0, j)),
    ]
  dtypes = State.dtypes()
  out = pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
  parts = pl.pallas_call(
    functools.partial(_kernel, vocab_size, block, transposed),
    out_shape=[jax.ShapeDtypeStruct((flat.shape[0], 1), dtype) for dtype in dtypes],
    grid=grid,
    in_specs=specs,
    out_specs=[out] * len(dtypes),
    scratch_shapes=[pltpu.VMEM((rows, 1), dtype) for dtype in dtypes],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=32 * 2**20
    ),
    interpret=interpret,
    name='unmask',
  )(*inputs)
  state = State(*(part.reshape(batch, length) for part in parts))
  return certainty(state.token, state.peak, state.second, state.total, state.moment / state.total)


def _kernel(vocab_size, block, transposed, *refs):
  half = len(State._fields)
  inputs, outs, state = refs[: -2 * half], refs[-2 * half : -half], refs[-half:]
  index = pl.program_id(1)

  @pl.when(index == 0)
  def _begin():
    for ref, value in zip(state, State.empty((1, 1)), strict=True):
      ref[...] = jnp.broadcast_to(value, ref.shape)

  if len(inputs) == 1:
    logits = inputs[0][...].astype(jnp.float32)
  else:
    hidden, head = (ref[...] for ref in inputs)
    exact = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    logits = lax.dot_general(
      hidden, head, contract, precision=exact, preferred_element_type=jnp.float32
    )
  ids = index * block + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
  new = update(State(*(ref[...] for ref in state)), logits, ids)
  for ref, value in zip(state, new, strict=True):
    ref[...] = value

  @pl.when(index == pl.num_programs(1) - 1)
  def _end():
    for out, ref in zip(outs, state, strict=True):
      out[...] = ref[...]


def _round_up(value, multiple):
  return -(-value // multiple) * multiple

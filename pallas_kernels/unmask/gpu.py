"""The GPU kernel of unmask (Triton): thread blocks share out positions and vocabulary.

Each keeps what it knows of its part in registers; the parts are merged outside. With a head a
block's logits are made in registers, used and forgotten.

Axes: `M` positions of the batch (B * T), `D` hidden size, `V` vocabulary, `Z` parts.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from pallas_kernels.unmask.online import State
from pallas_kernels.unmask.online import merge
from pallas_kernels.unmask.online import update
from pallas_kernels.unmask.reference import Certainty
from pallas_kernels.unmask.reference import certainty

_CHUNK = 4096  # logits of a position read at a time
_WIDTH = 128  # tokens of which logits are made at a time
_DEPTH = 64  # of the hidden size, multiplied at a time
_PROGRAMS = 528  # thread blocks wanted: four for each multiprocessor of an H200


def why_not(logits: jax.Array, head: jax.Array | None) -> str | None:
  """Returns what keeps the kernel from this problem, or None if it can do it."""
  for name, array in (('logits', logits), ('head', head)):
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      return f'it takes floats of 16 and 32 bits: {name} are {array.dtype}'
  if head is not None and logits.shape[-1] % _DEPTH:
    return f'the hidden size must be a multiple of {_DEPTH}: {logits.shape=}'
  return None


def unmask_gpu(
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
  flat = logits.reshape(-1, size)
  num_rows = flat.shape[0]
  if head is None:
    vocab_size, rows, width = size, 1, min(_CHUNK, pl.next_power_of_2(size))
    inputs = [flat]
  else:
    vocab_size = head.shape[0 if transposed else 1]
    rows, width = min(64, max(16, pl.next_power_of_2(num_rows))), _WIDTH
    inputs = [flat, head.astype(flat.dtype)]
  tiles, steps = pl.cdiv(num_rows, rows), pl.cdiv(vocab_size, width)
  parts = max(1, min(steps, _PROGRAMS // tiles))
  dtypes = State.dtypes()
  padded = tiles * rows
  found = pl.pallas_call(
    functools.partial(_kernel, vocab_size, rows, width, pl.cdiv(steps, parts), transposed),
    out_shape=[jax.ShapeDtypeStruct((parts, padded), dtype) for dtype in dtypes],
    grid=(tiles, parts),
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
    out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(dtypes),
    compiler_params=plt.CompilerParams(num_warps=8 if head is None else 4, num_stages=3),
    interpret=interpret,
    name='unmask',
  )(*inputs)
  state = merge(State(*found))
  state = State(*(a[:num_rows].reshape(batch, length) for a in state))
  return certainty(state.token, state.peak, state.second, state.total, state.moment / state.total)


def _kernel(vocab_size, rows, width, steps, transposed, *refs):
  half = len(State._fields)
  inputs, outs = refs[:-half], refs[-half:]
  tile, part = pl.program_id(0), pl.program_id(1)
  first_row = tile * rows
  row = first_row + lax.broadcasted_iota(jnp.int32, (rows, width), 0)
  lane = lax.broadcasted_iota(jnp.int32, (rows, width), 1)

  def read(step):
    ids = (part * steps + step) * width + lane
    inside = (ids < vocab_size) & (row < inputs[0].shape[0])
    if len(inputs) == 1:
      logits = plt.load(inputs[0].at[row, ids], mask=inside, other=-jnp.inf).astype(jnp.float32)
    else:
      product = _product(
        inputs[0], inputs[1], first_row, (part * steps + step) * width, (rows, width), transposed
      )
      logits = jnp.where(inside, product, -jnp.inf)
    return logits, ids

  def step(index, state):
    logits, ids = read(index)
    return update(state, logits, ids)

  left = jnp.maximum(lax.div(vocab_size - part * steps * width + width - 1, width), 0)
  state = lax.fori_loop(0, jnp.minimum(steps, left), step, State.empty((rows, 1)))
  for out, value in zip(outs, state, strict=True):
    plt.store(out.at[part, pl.ds(first_row, rows)], value.reshape(rows))


def _product(hidden, head, first_row, first_token, shape, transposed):
  """Returns f32[rows, width], the logits of a tile of positions and tokens."""
  rows, width = shape
  row = first_row + lax.broadcasted_iota(jnp.int32, (rows, _DEPTH), 0)
  token = first_token + lax.broadcasted_iota(jnp.int32, (_DEPTH, width), 1)
  inside = token < head.shape[0 if transposed else 1]
  exact = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else lax.Precision.DEFAULT

  def step(index, total):
    depth = index * _DEPTH
    own = depth + lax.broadcasted_iota(jnp.int32, (rows, _DEPTH), 1)
    other = depth + lax.broadcasted_iota(jnp.int32, (_DEPTH, width), 0)
    a = plt.load(hidden.at[row, own], mask=row < hidden.shape[0], other=0.0)
    where = (token, other) if transposed else (other, token)
    b = plt.load(head.at[where], mask=inside, other=0.0)
    return total + jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)

  steps = hidden.shape[1] // _DEPTH
  return lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))

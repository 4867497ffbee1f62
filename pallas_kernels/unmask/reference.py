"""The XLA form of unmask: how sure a masked-diffusion model is of each position.

Axes: `B` batch, `T` positions, `D` hidden size, `V` vocabulary.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

_CHUNK = 4096  # tokens that are reduced at a time


class Certainty(NamedTuple):
  """What unmasking policies rank positions by; all of softmax(logits), in nats."""

  token: jax.Array  # i32[B, T] the first largest logit
  confidence: jax.Array  # f32[B, T] its probability
  second: jax.Array  # f32[B, T] the probability of the second largest
  margin: jax.Array  # f32[B, T] the former less the latter
  entropy: jax.Array  # f32[B, T] at least 0
  log_normalizer: jax.Array  # f32[B, T] logsumexp of the logits


def unmask_reference(
  logits: jax.Array,
  head: jax.Array | None = None,
  *,
  transposed: bool = False,
  chunk: int = _CHUNK,
) -> Certainty:
  """Returns the certainty of every position; see `unmask` for the arguments and errors.

  Each piece of `chunk` tokens is reduced while it is in the processor's cache and folded into a
  running maximum and running sums, so the logits are read once. A NaN anywhere gives NaN.

  Source: online softmax, arXiv:1805.02867; its entropy by the same recurrence.
  """
  if head is not None:
    layout = '...d,vd->...v' if transposed else '...d,dv->...v'
    logits = jnp.einsum(
      layout, logits, head.astype(logits.dtype), preferred_element_type=jnp.float32
    )
  vocab_size = logits.shape[-1]
  size = min(chunk, vocab_size)
  carry = _fold_chunk(_empty(logits.shape[:-1]), logits[..., :size], 0)
  num_whole = vocab_size // size

  def fold(index, carry):
    piece = lax.dynamic_slice_in_dim(logits, index * size, size, axis=-1)
    return _fold_chunk(carry, piece, index * size)

  if num_whole > 1:
    carry = lax.fori_loop(1, num_whole, fold, carry)
  if vocab_size % size:
    carry = _fold_chunk(carry, logits[..., num_whole * size :], num_whole * size)
  peak, second, token, total, moment = carry
  return certainty(token, peak, second, total, moment / total)


def _empty(shape):
  low = jnp.full(shape, -jnp.inf, jnp.float32)
  zero = jnp.zeros(shape, jnp.float32)
  return low, low, jnp.zeros(shape, jnp.int32), zero, zero


def _fold_chunk(carry, piece, start):
  """Returns (largest, second largest, index, sum e^(l - largest), sum (l - largest) e^(...))."""
  piece = piece.astype(jnp.float32)
  old_peak, old_second, old_best, old_total, old_moment = carry
  index = lax.broadcasted_iota(jnp.int32, piece.shape, piece.ndim - 1)
  top = piece.max(-1)
  where = jnp.where(piece == top[..., None], index, piece.shape[-1] - 1).min(-1)
  runner_up = jnp.where(index == where[..., None], -jnp.inf, piece).max(-1)
  peak = jnp.maximum(old_peak, top)
  # A piece of impossible tokens only: its peak is -inf, and a difference of those is not a number.
  base = jnp.where(jnp.isneginf(peak), 0, peak)
  shifted = piece - base[..., None]
  weights = jnp.exp(shifted)
  drop = old_peak - base
  shrink = jnp.exp(drop)
  moment = jnp.sum(jnp.where(jnp.isneginf(shifted), 0, shifted * weights), -1)
  kept = (old_moment + jnp.where(jnp.isneginf(drop), 0, drop) * old_total) * shrink
  second = jnp.maximum(jnp.minimum(old_peak, top), jnp.maximum(old_second, runner_up))
  return (
    peak,
    second,
    jnp.where(top > old_peak, where + start, old_best).astype(jnp.int32),
    old_total * shrink + weights.sum(-1),
    kept + moment,
  )


def certainty(token, peak, second, total, mean) -> Certainty:
  """Returns the record from what one pass gathers, f32[...] but the token.

  Args:
    token: i32[...].
    peak: the largest logit.
    second: the second largest.
    total: sum of exp(logits - peak).
    mean: mean of logits - peak under the law.
  """
  return Certainty(
    token=token,
    confidence=1 / total,
    second=jnp.exp(second - peak) / total,
    margin=(1 - jnp.exp(second - peak)) / total,
    entropy=jnp.maximum(jnp.log(total) - mean, 0),
    log_normalizer=peak + jnp.log(total),
  )


def check_arguments(logits, head, transposed):
  """Checks shapes and dtypes, as `unmask` says.

  Raises:
    ValueError: if they do not fit.
  """
  if logits.ndim != 3 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f'what is given must be f[B, T, V] or f[B, T, D]: {logits.shape=}')
  if head is not None:
    size = head.shape[1 if transposed else 0] if head.ndim == 2 else None
    if size != logits.shape[-1]:
      form = '[V, D]' if transposed else '[D, V]'
      raise ValueError(
        f'head must be f{form} for hidden f[B, T, D]: {head.shape=}, {logits.shape=}'
      )

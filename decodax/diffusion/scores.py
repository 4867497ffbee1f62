"""How sure the network is of each slot, and how to pick by it.

Axes: `B` batch, `W` window slots, `V` vocabulary. Everything is per row: a pick never looks at
neighbours in the batch.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from decodax.diffusion.keys import Purpose
from decodax.diffusion.types import Summary
from decodax.diffusion.types import View

VOCAB_CHUNK = 4096  # logits are summarised in pieces of this many, so that they are read once


def summarize(logits: jax.Array, *, chunk: int = VOCAB_CHUNK) -> Summary:
  """Returns best token, its probability, the runner-up's, entropy and normalizer, each [...].

  One pass over logits f32[..., V]: each piece of `chunk` tokens is reduced while it is in the
  processor's cache and folded into a running maximum and running sums. Of equal logits the first
  is the best. A NaN anywhere gives NaN.

  Source: online softmax, arXiv:1805.02867; its entropy by the same recurrence.
  """
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
  peak, second, best, total, moment = carry
  return Summary(
    best=best,
    top=1 / total,
    second=jnp.exp(second - peak) / total,
    entropy=jnp.maximum(jnp.log(total) - moment / total, 0),
    log_normalizer=peak + jnp.log(total),
  )


def _empty(shape):
  low = jnp.full(shape, -jnp.inf, jnp.float32)
  zero = jnp.zeros(shape, jnp.float32)
  return low, low, jnp.zeros(shape, jnp.int32), zero, zero


def _fold_chunk(carry, piece, start):
  """Returns (largest, second largest, index, sum e^(l - largest), sum (l - largest) e^(...))."""
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


def probability_of(logits: jax.Array, summary: Summary, tokens: jax.Array) -> jax.Array:
  """Returns f32[...], the probability of tokens i32[...] under logits f32[..., V]."""
  logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return jnp.exp(logit - summary.log_normalizer)


# --- Scores: the larger, the sooner ---------------------------------------------------------------


def _random(view: View) -> jax.Array:
  return view.keys.uniform(view.tokens.shape[1:], Purpose.ORDER)


SCORES: dict[str, Callable[[View], jax.Array]] = {
  'confidence': lambda view: view.confidence,
  'margin': lambda view: view.summary.top - view.summary.second,
  'entropy': lambda view: -view.summary.entropy,
  'random': _random,
  'left_to_right': lambda view: -view.positions.astype(jnp.float32),
}
"""name -> (view) -> f32[B, W]. Their scales differ: a threshold on one means nothing to another.

Source: `confidence` MaskGIT, arXiv:2202.04200, and LLaDA, arXiv:2502.09992; `margin` Train for the
Worst, Plan for the Best, arXiv:2502.06768; `entropy` Dream 7B, arXiv:2508.15487.
"""


def score_fn(name: str) -> Callable[[View], jax.Array]:
  """Returns the score of that name.

  Raises:
    ValueError: if there is none.
  """
  if name not in SCORES:
    raise ValueError(f'score must be one of {", ".join(SCORES)}: {name!r}')
  return SCORES[name]


# --- Picking --------------------------------------------------------------------------------------


def ranks(score: jax.Array, eligible: jax.Array) -> jax.Array:
  """Returns i32[B, W], 0 at the best eligible slot; ties go to the left, the ineligible come last.

  By counting: W is small, and a sort of it is slow.
  """
  index = jnp.arange(score.shape[1])
  mine, other = score[:, :, None], score[:, None, :]
  earlier = (index[None, :] < index[:, None])[None]
  ahead = eligible[:, None, :] & ((other > mine) | ((other == mine) & earlier))
  rest = eligible.sum(-1, keepdims=True) + jnp.cumsum(~eligible, axis=1) - 1
  return jnp.where(eligible, ahead.sum(-1), rest).astype(jnp.int32)


def top(score: jax.Array, eligible: jax.Array, count: jax.Array | int) -> jax.Array:
  """Returns bool[B, W], each row's `count` i32[B] best eligible slots; all if there are fewer."""
  count = jnp.broadcast_to(jnp.asarray(count), eligible.shape[:1])
  return eligible & (ranks(score, eligible) < count[:, None])


def by_rank(values: jax.Array, rank: jax.Array) -> jax.Array:
  """Returns values[B, W] in the order of rank i32[B, W], which is a permutation in every row."""
  order = jnp.argmax(rank[:, None, :] == jnp.arange(rank.shape[1])[None, :, None], axis=-1)
  return jnp.take_along_axis(values, order, axis=1)


def or_best(commit: jax.Array, score: jax.Array, eligible: jax.Array) -> jax.Array:
  """Returns commit bool[B, W]; in rows where it is empty, the best eligible slot."""
  commit = commit & eligible
  return commit | (top(score, eligible, 1) & ~commit.any(-1, keepdims=True))


def longest_prefix(ok: jax.Array) -> jax.Array:
  """Returns i32[B], the number of leading True in ok bool[B, W]."""
  return jnp.cumprod(ok, axis=-1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)

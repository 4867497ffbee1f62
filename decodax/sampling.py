"""Sampling rules: one order, one function, shared by target, drafter and plain sampling.

The order is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p,
min-p. A warped law is logits with -inf at the tokens it excludes.

Axes: `B` batch, `N` nodes, `V` vocabulary. Functions take logits f32[B, ..., V] and sampling values
of shape [B].
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from decodax.types import Sampling
from pallas_kernels.dispatch import Kernel
from pallas_kernels.dispatch import dispatch
from pallas_kernels.verify import verify
from pallas_kernels.verify import why_not

BLOCK_SIZE = 256  # tokens that are looked at together: about the root of a vocabulary


def warp(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns logits of the law to sample from, float[B, ..., V] like `logits`.

  At temperature 0 all but the first largest logit are -inf. The repetition penalty is not applied
  here since it depends on the tokens before each node: see `penalize`.

  Tokens that tie with the last one kept by top-k or top-p are kept too.

  Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751 (top-p); Turning Up the
  Heat, arXiv:2407.01082 (min-p).
  """
  filters = (sampling.top_k, sampling.top_p, sampling.min_p)
  if all(values is None for values in filters):
    return _warp_in_passes(logits, sampling)

  nodes = logits.reshape(logits.shape[0], -1, logits.shape[-1])

  def load(name):
    return Kernel(functools.partial(_warp_at_once, name), why_not(name, nodes))

  return dispatch('warp', None, (logits, sampling), xla=_warp_in_passes, load=load)


def _warp_in_passes(logits, sampling):
  """Warps by one pass over the logits for every step of a search for a threshold."""
  warped = logits / _divisor(logits, sampling)
  if sampling.top_k is not None:
    warped = _when_any(sampling.top_k > 0, _keep_top_k, warped, sampling.top_k)
  if sampling.top_p is not None:
    warped = _when_any(sampling.top_p < 1, _keep_top_p, warped, sampling.top_p)
  if sampling.min_p is not None:
    warped = _when_any(sampling.min_p > 0, _keep_min_p, warped, sampling.min_p)
  return _or_first_best(warped, argmax(logits), sampling)


def _warp_at_once(implementation, logits, sampling):
  """Warps with thresholds from a kernel that reads the logits once."""
  nodes = logits.reshape(logits.shape[0], -1, logits.shape[-1])
  found = verify(
    nodes,
    jnp.zeros((*nodes.shape[:2], 1), jnp.int32),
    temperature=sampling.temperature,
    top_k=sampling.top_k,
    top_p=sampling.top_p,
    min_p=sampling.min_p,
    implementation=implementation,
  )
  shape = logits.shape[:-1]
  warped = logits / _divisor(logits, sampling)
  warped = jnp.where(warped >= found.floor.reshape(*shape, 1), warped, -jnp.inf)
  return _or_first_best(warped, found.argmax.reshape(shape), sampling)


def _divisor(logits, sampling):
  temperature = jnp.where(sampling.temperature == 0, 1, sampling.temperature)
  return _rows(temperature, logits).astype(logits.dtype)


def _or_first_best(warped, first_best, sampling):
  """Returns the warped logits, of rows at temperature 0 all but the first best at -inf."""
  index = lax.broadcasted_iota(first_best.dtype, warped.shape, warped.ndim - 1)
  one_hot = jnp.where(index == first_best[..., None], 0, -jnp.inf).astype(warped.dtype)
  return jnp.where(_rows(sampling.temperature == 0, warped), one_hot, warped)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array | None) -> jax.Array:
  """Returns logits with those of seen tokens divided (if positive) or multiplied by the penalty.

  Args:
    logits: float[B, ..., V].
    seen: bool[B, ..., V], tokens of the prompt and output so far.
    penalty: f32[B], 1 is off; None returns the logits as they are.

  Source: CTRL, arXiv:1909.05858, section 4.1.
  """
  if penalty is None:
    return logits
  factor = _rows(penalty, logits).astype(logits.dtype)
  return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def mark_seen(seen: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
  """Returns bool[B, V] with the valid ones of tokens i32[B, K] added."""
  rows = jnp.arange(seen.shape[0])[:, None]
  return seen.at[rows, jnp.where(valid, tokens, seen.shape[1])].set(True, mode='drop')


def argmax(scores: jax.Array) -> jax.Array:
  """Returns i32[...], the first index of the largest of scores float[..., V].

  On CPU by two plain reductions, which vectorise where a reduction to an index does not. Scores
  with a NaN give some index below V.
  """

  def by_value(scores):
    index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    best = scores == scores.max(-1, keepdims=True)
    return jnp.where(best, index, scores.shape[-1] - 1).min(-1)

  def by_index(scores):
    return lax.argmax(scores, scores.ndim - 1, jnp.int32)

  return lax.platform_dependent(scores, cpu=by_value, default=by_index)


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns (f32[..., k], i32[..., k]), the k largest of float[..., V] and their indices.

  The same as `lax.top_k`, ties to the lower index: all of them lie in the k blocks of the largest
  maxima, so the vocabulary is read once, for the maxima of blocks.
  """
  size = values.shape[-1]
  if not in_few_blocks(k, size):
    return lax.top_k(values, k)
  blocks = in_blocks(values)
  _, chosen = lax.top_k(blocks.max(-1), k)
  chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the lower index comes first
  few = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
  largest, places = lax.top_k(few.reshape(*few.shape[:-2], -1), k)
  block = jnp.take_along_axis(chosen, places // BLOCK_SIZE, axis=-1)
  return largest, block * BLOCK_SIZE + places % BLOCK_SIZE


def in_few_blocks(k: int, size: int) -> bool:
  """Returns whether k blocks are but a part of a vocabulary of this size."""
  return 2 * k * BLOCK_SIZE <= size


def in_blocks(values: jax.Array) -> jax.Array:
  """Returns float[..., S, BLOCK_SIZE] of float[..., V], with -inf behind the last one."""
  padding = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % BLOCK_SIZE)]
  padded = jnp.pad(values, padding, constant_values=-jnp.inf)
  return padded.reshape(*values.shape[:-1], -1, BLOCK_SIZE)


def any_sampled(sampling: Sampling, live: jax.Array) -> jax.Array:
  """Returns bool[]: does any live row, bool[B], sample rather than take the argmax?"""
  return jnp.any(live & (sampling.temperature > 0))


def _rows(values, like):
  """Returns values[B] with trailing axes of size one, to combine with like[B, ...]."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _when_any(active, rule, logits, values):
  """Returns `rule(logits, values)` in active rows; the work is skipped if no row is active."""
  return lax.cond(
    jnp.any(active),
    lambda: jnp.where(_rows(active, logits), rule(logits, values), logits),
    lambda: logits,
  )


def _keep_top_k(logits, top_k):
  wanted = jnp.minimum(top_k, logits.shape[-1])
  floor = _largest_floor(logits, jnp.ones_like(logits), _rows(wanted, logits))
  return jnp.where(logits >= floor, logits, -jnp.inf)


def _keep_top_p(logits, top_p):
  laws = jax.nn.softmax(logits, -1)
  floor = _largest_floor(laws, laws, _rows(top_p, logits))
  return jnp.where(laws >= floor, logits, -jnp.inf)


def _keep_min_p(logits, min_p):
  floor = logits.max(-1, keepdims=True) + jnp.log(_rows(min_p, logits)).astype(logits.dtype)
  return jnp.where(logits >= floor, logits, -jnp.inf)


def _largest_floor(scores, weights, wanted):
  """Returns the largest float f with sum(weights where scores >= f) >= wanted, [..., 1].

  Bisection over the ordered integers that floats map to: exact after as many steps as a float has
  bits, each one pass over the scores, and no sort. If no floor gathers enough, everything is kept.
  """
  keys = _ordered_bits(scores)
  low = keys.min(-1, keepdims=True)  # gathers all, by definition or by rounding
  high = keys.max(-1, keepdims=True) + 1
  steps = jnp.iinfo(keys.dtype).bits

  def halve(_, bounds):
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
    gathered = jnp.where(keys >= middle, weights, 0).sum(-1, keepdims=True)
    enough = (gathered >= wanted) & (middle > low)
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low, _ = lax.fori_loop(0, steps, halve, (low, high))
  return _from_ordered_bits(low, scores.dtype)


def _ordered_bits(scores):
  """Returns integers that sort as the floats do; -0.0 just below 0.0."""
  integer = jnp.int32 if scores.dtype.itemsize == 4 else jnp.int64
  bits = lax.bitcast_convert_type(scores, integer)
  return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def _from_ordered_bits(keys, dtype):
  bits = jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys)
  return lax.bitcast_convert_type(bits, dtype)

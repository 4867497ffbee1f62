"""What verification needs of some rows of logits, read a chunk of the vocabulary at a time.

The TPU kernel reads chunks of rows that lie in vector memory, the GPU kernel reads them from memory
or its caches; the arithmetic is this. Axes: `M` rows, `V` vocabulary, `n` tokens of a chunk, `K`
tokens asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

_NONE = 2**30
_LOWEST_BITS = -(2**31) + 2**23  # ordered bits of the lowest finite float: gathers all
_ONE_BITS = 0x3F800000


class Rows(NamedTuple):
  """Some rows of logits, to be read in chunks."""

  read: Callable[[Any], jax.Array]  # chunk -> f32[M, n], -inf past the vocabulary
  ids: Callable[[Any], jax.Array]  # chunk -> i32[M, n]
  num_chunks: int

  def fold(self, step: Callable, start):
    """Returns the carry after `step(carry, chunk index, logits, ids)` of every chunk."""
    return lax.fori_loop(
      0, self.num_chunks, lambda i, carry: step(carry, i, self.read(i), self.ids(i)), start
    )


class Warp(NamedTuple):
  """Sampling values of the rows, each [M, 1]; None switches a rule off when compiling."""

  temperature: jax.Array  # f32, 0 is greedy
  top_k: jax.Array | None  # i32, 0 is off
  top_p: jax.Array | None  # f32, 1 is off
  min_p: jax.Array | None  # f32, 0 is off


class Gathered(NamedTuple):
  """What was gathered, each [M, 1]; entries that were not asked for are None."""

  argmax: jax.Array  # i32
  floor: jax.Array  # f32
  log_normalizer: jax.Array  # f32
  log_probs: tuple[jax.Array, ...]  # K of f32
  draft_log_probs: tuple[jax.Array, ...] | None
  excess: jax.Array | None  # f32
  sample: jax.Array | None  # i32


def gather(
  rows: Rows,
  warp: Warp,
  tokens: Sequence[jax.Array],
  *,
  laws: Rows | None = None,
  residual: jax.Array | None = None,
  keys: tuple[jax.Array, jax.Array] | None = None,
) -> Gathered:
  """Returns all that `verify` tells of the rows.

  Args:
    rows: the target's logits, as the model made them.
    warp: temperature and filters.
    tokens: K of i32[M, 1].
    laws: logits of the drafter's laws.
    residual: i32[M, 1], 1 to sample from max(p - q, 0), 0 from p; None samples from p everywhere.
    keys: the two words of a threefry key, each i32[M, 1]; None samples nothing.
  """
  peak, argmax = _first_best(rows)
  greedy = warp.temperature == 0
  scaled = _scale(rows, jnp.where(greedy, 1, warp.temperature))
  top = peak / jnp.where(greedy, 1, warp.temperature)
  floor = _floor(scaled, warp, top)
  warped = _warp(scaled, floor, greedy, argmax)
  top = jnp.where(greedy, 0, top)
  log_normalizer, log_probs = _log_probs(warped, top, tokens)
  draft_log_probs = excess = sample = draft_normalizer = None
  if laws is not None:
    draft_top, _ = _first_best(laws)
    draft_normalizer, draft_log_probs = _log_probs(laws, draft_top, tokens)
  draft = None
  if laws is not None or residual is not None:
    draft = _draft_law(laws, draft_normalizer, tokens)
    excess = _excess(warped, log_normalizer, draft)
  if keys is not None:
    some = None
    if residual is not None and excess is not None:
      some = (residual > 0) & (excess > 0)  # nothing left of p: only rounding can have led here
    sample = _sample(warped, log_normalizer, draft, some, keys)
  return Gathered(argmax, floor, log_normalizer, log_probs, draft_log_probs, excess, sample)


def gumbel(key: tuple[jax.Array, jax.Array], ids: jax.Array) -> jax.Array:
  """Returns f32[M, n], element `ids` of what `jax.random.gumbel` makes of a threefry key."""
  bits = _threefry(*key, ids)
  unit = lax.bitcast_convert_type(lax.shift_right_logical(bits, 9) | _ONE_BITS, jnp.float32) - 1
  tiny = float(jnp.finfo(jnp.float32).tiny)
  return -jnp.log(-jnp.log(jnp.maximum(unit + tiny, tiny)))


def _threefry(key1, key2, count):
  """Returns i32[M, n], the 32 random bits of each 64-bit count whose high word is 0.

  Source: Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Threefry-2x32 with 20 rounds.
  """
  schedule = (key1, key2, key1 ^ key2 ^ 0x1BD11BDA)
  rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
  a, b = jnp.broadcast_to(key1, count.shape), count + key2
  for group in range(5):
    for turn in rotations[group % 2]:
      a = a + b
      b = a ^ (lax.shift_left(b, turn) | lax.shift_right_logical(b, 32 - turn))
    a = a + schedule[(group + 1) % 3]
    b = b + schedule[(group + 2) % 3] + (group + 1)
  return a ^ b


def _first_best(rows):
  """Returns (f32[M, 1] the largest logit, i32[M, 1] the first token that has it)."""

  def step(carry, _, logits, ids):
    peak, token = carry
    best = logits.max(-1, keepdims=True)
    first = jnp.where(logits == best, ids, _NONE).min(-1, keepdims=True)
    return jnp.maximum(peak, best), jnp.where(best > peak, first, token)

  like = _like(rows)
  return rows.fold(step, (jnp.full(like, -jnp.inf, jnp.float32), jnp.zeros(like, jnp.int32)))


def _like(rows):
  return (jax.eval_shape(rows.ids, 0).shape[0], 1)


def _scale(rows, temperature):
  return rows._replace(read=lambda i: rows.read(i) / temperature)


def _warp(rows, floor, greedy, argmax):
  """Returns the rows with -inf below the floor, and everywhere but the argmax if greedy."""

  def read(i):
    logits = rows.read(i)
    one_hot = jnp.where(rows.ids(i) == argmax, 0.0, -jnp.inf)
    return jnp.where(greedy, one_hot, jnp.where(logits >= floor, logits, -jnp.inf))

  return rows._replace(read=read)


def _log_probs(rows, top, tokens):
  """Returns (log-normaliser f32[M, 1], K of f32[M, 1] the log-probabilities of the tokens)."""

  def step(carry, _, logits, ids):
    total, found = carry
    total = total + jnp.exp(logits - top).sum(-1, keepdims=True)
    found = tuple(
      jnp.maximum(old, jnp.where(ids == token, logits, -jnp.inf).max(-1, keepdims=True))
      for old, token in zip(found, tokens, strict=True)
    )
    return total, found

  nothing = jnp.full(top.shape, -jnp.inf, jnp.float32)
  total, found = rows.fold(step, (jnp.zeros(top.shape, jnp.float32), (nothing,) * len(tokens)))
  log_normalizer = top + jnp.log(total)
  return log_normalizer, tuple(logit - log_normalizer for logit in found)


def _draft_law(laws, draft_normalizer, tokens):
  """Returns (chunk, ids) -> f32[M, n], the drafter's law; of a draft that is certain, a 1."""

  def law(i, ids):
    if laws is None:
      return jnp.where(ids == tokens[0], 1.0, 0.0)
    return jnp.exp(laws.read(i) - draft_normalizer)

  return law


def _excess(rows, log_normalizer, draft):
  """Returns f32[M, 1], sum of max(p - q, 0): the probability that a draft is rejected."""

  def step(total, i, logits, ids):
    left = jnp.maximum(jnp.exp(logits - log_normalizer) - draft(i, ids), 0)
    return total + left.sum(-1, keepdims=True)

  return rows.fold(step, jnp.zeros(log_normalizer.shape, jnp.float32))


def _sample(rows, log_normalizer, draft, residual, keys):
  """Returns i32[M, 1], the argmax of noise plus the logarithm of the law or of its residual."""

  def step(carry, i, logits, ids):
    if residual is not None:
      left = jnp.maximum(jnp.exp(logits - log_normalizer) - draft(i, ids), 0)
      logits = jnp.where(residual, jnp.log(left), logits)
    noisy = logits + gumbel(keys, ids)
    peak, token = carry
    best = noisy.max(-1, keepdims=True)
    first = jnp.where(noisy == best, ids, _NONE).min(-1, keepdims=True)
    return jnp.maximum(peak, best), jnp.where(best > peak, first, token)

  shape = log_normalizer.shape
  start = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
  return rows.fold(step, start)[1]


# --- Thresholds ----------------------------------------------------------------------------------


def _floor(rows, warp, top):
  """Returns f32[M, 1], the scaled logit below which tokens are excluded; -inf excludes none.

  Tokens that tie with the last one kept are kept too.
  """
  floor = jnp.full(top.shape, -jnp.inf, jnp.float32)
  if warp.top_k is not None:
    wanted = warp.top_k.astype(jnp.float32)
    active = (warp.top_k > 0) & (warp.temperature > 0)
    found = _bisect(
      rows, lambda x: x, lambda x: jnp.where(x > -jnp.inf, 1.0, 0.0), wanted, top, active
    )
    floor = jnp.where(active, _least(rows, lambda x: x >= found), floor)
  if warp.top_p is not None:
    active = (warp.top_p < 1) & (warp.temperature > 0)
    floor = jnp.where(active, _top_p_floor(rows, warp.top_p, top, floor, active), floor)
  if warp.min_p is not None:
    lowest = top + jnp.log(warp.min_p)
    floor = jnp.where(warp.min_p > 0, jnp.maximum(floor, lowest), floor)
  return floor


def _top_p_floor(rows, top_p, top, floor, active):
  def weight(x):
    return jnp.where(x >= floor, jnp.exp(x - top), 0)

  def add(total, _, x, ids):
    del ids
    return total + weight(x).sum(-1, keepdims=True)

  total = rows.fold(add, jnp.zeros(top.shape, jnp.float32))

  def law(x):
    return weight(x) / total

  lowest = _bisect(rows, law, law, top_p, 1 / total, active)

  return _least(rows, lambda x: law(x) >= lowest)


def _least(rows, keep):
  """Returns f32[M, 1], the least of the logits that `keep` is true of."""

  def step(least, _, x, ids):
    del ids
    return jnp.minimum(least, jnp.where(keep(x), x, jnp.inf).min(-1, keepdims=True))

  return rows.fold(step, jnp.full(_like(rows), jnp.inf, jnp.float32))


def _bisect(rows, score, weight, wanted, largest, active):
  """Returns f32[M, 1], the largest f with sum(weight where score >= f) >= wanted, in active rows.

  Bisection over the ordered integers that floats map to; a row is done when no integer is left, or
  when exactly what is wanted was gathered, which selects the same tokens.
  """
  low = jnp.where(active, _LOWEST_BITS, 0)
  high = jnp.where(active, ordered_bits(largest) + 1, 1)

  def is_open(low, high):
    return jnp.max(jnp.where(low + 1 < high, 1, 0)) > 0

  def halve(carry):
    low, high, _ = carry
    middle = (low & high) + lax.shift_right_arithmetic(low ^ high, 1)  # without overflow
    floor = from_ordered_bits(middle)

    def add(total, _, x, ids):
      del ids
      return total + jnp.where(score(x) >= floor, weight(x), 0).sum(-1, keepdims=True)

    gathered = rows.fold(add, jnp.zeros(wanted.shape, jnp.float32))
    enough = gathered >= wanted
    closed = low + 1 >= high
    low = jnp.where(enough & ~closed, middle, low)
    high = jnp.where(closed, high, jnp.where(gathered == wanted, middle + 1, high))
    high = jnp.where(enough | closed, high, middle)
    return low, high, is_open(low, high)

  low, _, _ = lax.while_loop(lambda carry: carry[2], halve, (low, high, is_open(low, high)))
  return from_ordered_bits(low)


def ordered_bits(scores: jax.Array) -> jax.Array:
  """Returns i32[...] that sort as the floats f32[...] do."""
  bits = lax.bitcast_convert_type(scores, jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def from_ordered_bits(bits: jax.Array) -> jax.Array:
  """Returns f32[...], what `ordered_bits` made i32[...] of."""
  return lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), jnp.float32)

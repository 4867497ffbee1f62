"""What is known of a law after part of its vocabulary: the step that the kernels share.

Axes: `M` positions, `n` tokens of a block of the vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LOWEST = -1e30  # finite: nothing seen so far weighs exactly nothing, and gives no NaN
_NONE = 2**30


class State(NamedTuple):
  """The law so far, each [M, 1]."""

  peak: jax.Array  # f32 the largest logit
  second: jax.Array  # f32 the second largest
  token: jax.Array  # i32 the first largest
  total: jax.Array  # f32 sum of exp(logits - peak)
  moment: jax.Array  # f32 sum of exp(logits - peak) * (logits - peak)

  @staticmethod
  def dtypes() -> list[Any]:
    """Returns the dtypes of the fields."""
    return [jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32]

  @classmethod
  def empty(cls, shape: tuple[int, ...]) -> 'State':
    """Returns the state before any token."""
    lowest = jnp.full(shape, _LOWEST, jnp.float32)
    zero = jnp.zeros(shape, jnp.float32)
    return cls(lowest, lowest, jnp.zeros(shape, jnp.int32), zero, zero)


def update(state: State, logits: jax.Array, ids: jax.Array) -> State:
  """Returns the state after logits f32[M, n] of tokens ids i32[M, n], larger than all before."""
  best = logits.max(-1, keepdims=True)
  token = jnp.where(logits == best, ids, _NONE).min(-1, keepdims=True)
  runner_up = jnp.where(ids == token, -jnp.inf, logits).max(-1, keepdims=True)
  above = best > state.peak
  peak = jnp.maximum(state.peak, best)
  second = jnp.where(above, jnp.maximum(state.peak, runner_up), jnp.maximum(state.second, best))
  shrink, drop = jnp.exp(state.peak - peak), state.peak - peak
  weights = jnp.exp(logits - peak)
  moment = jnp.where(weights > 0, weights * (logits - peak), 0).sum(-1, keepdims=True)
  return State(
    peak=peak,
    second=second,
    token=jnp.where(above, token, state.token),
    total=state.total * shrink + weights.sum(-1, keepdims=True),
    moment=(state.moment + state.total * drop) * shrink + moment,
  )


def merge(parts: State) -> State:
  """Returns the state, each [M], after all parts of the vocabulary, each [Z, M] and in order."""
  peak = parts.peak.max(0)
  winner = jnp.argmax(parts.peak, axis=0)[None]  # the first that has the peak
  others = jnp.arange(parts.peak.shape[0])[:, None] != winner
  runner_up = jnp.where(others, parts.peak, parts.second).max(0)
  drop = parts.peak - peak[None]
  shrink = jnp.exp(drop)
  return State(
    peak=peak,
    second=jnp.maximum(runner_up, jnp.take_along_axis(parts.second, winner, axis=0)[0]),
    token=jnp.take_along_axis(parts.token, winner, axis=0)[0],
    total=(parts.total * shrink).sum(0),
    moment=((parts.moment + parts.total * drop) * shrink).sum(0),
  )

"""Tokens per call and speed-up of chains, trees and controllers.

Axes: `B` any leading axes, `G` draft positions, `N` tree nodes, `M` measured points.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from decodax.theory.common import promote


def expected_tokens(alpha: ArrayLike, draft_length: ArrayLike) -> jax.Array:
  """Returns f[B], the tokens per call of a chain whose drafts are each accepted with `alpha`.

  This is the sum of alpha**i for i from 0 to `draft_length`, to full precision and with a finite
  gradient everywhere in [0, 1].

  Args:
    alpha: f[] or f[B], the acceptance of a draft whose predecessors were accepted.
    draft_length: i[] or i[B], drafts per call, at least 0; it may be traced.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, equation 1.
  """
  alpha, draft_length = promote(alpha, draft_length)
  num_terms = draft_length + 1
  small = alpha < 0.5
  low = jnp.where(small, alpha, 0.25)
  high = jnp.where(small, 0.75, alpha)
  # Near 1 both the value and the gradient of (1 - a**n) / (1 - a) cancel; n f(n log a) / f(log a)
  # with f(x) = (exp(x) - 1) / x does not.
  log_high = jnp.log(high)
  stable = num_terms * _relative_exp(num_terms * log_high) / _relative_exp(log_high)
  return jnp.where(small, (1 - low**num_terms) / (1 - low), stable)


def expected_tokens_by_depth(acceptance: ArrayLike) -> jax.Array:
  """Returns f[B], the tokens per call of a chain whose acceptance depends on the position.

  Args:
    acceptance: f[B, G], entry i the probability that draft i is accepted given that all earlier
      ones were (the conditional acceptance).

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, equation 1, without
  its assumption that every position is accepted alike.
  """
  (acceptance,) = promote(acceptance)
  return 1 + jnp.sum(jnp.cumprod(acceptance, axis=-1), axis=-1)


def expected_tokens_controlled(acceptance: ArrayLike, continuation: ArrayLike) -> jax.Array:
  """Returns f[B], the tokens per call of a chain whose length a controller decides.

  Exact if both inputs are conditioned as below, however much the controller and the acceptance
  have to do with each other.

  Args:
    acceptance: f[B, G], entry i the probability that draft i is accepted given that it was made
      and that all earlier ones were accepted.
    continuation: f[B, G], entry i the probability that draft i is made given that all earlier
      ones were made and accepted.

  Source: our own, from Fast Inference from Transformers via Speculative Decoding, 2211.17192,
  equation 1.
  """
  acceptance, continuation = promote(acceptance, continuation)
  return expected_tokens_by_depth(acceptance * continuation)


def path_probabilities(parents: ArrayLike, acceptance: ArrayLike) -> jax.Array:
  """Returns f[B, N], the probability that a node is on the accepted path; 1 at the root.

  Takes about log2(N) vectorised steps, by pointer doubling.

  Args:
    parents: i[N] or i[B, N], -1 at the root (node 0), else the node's parent.
    acceptance: f[B, N], the probability that this very child is the accepted one, given that its
      parent is on the path. The root's entry is not read.

  Raises:
    ValueError: the two disagree about N.

  Source: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, 2402.12374, the
  positional acceptance model of its section on tree construction.
  """
  (reach,) = promote(acceptance)
  parents = jnp.asarray(parents)
  num_nodes = reach.shape[-1]
  if parents.shape[-1] != num_nodes:
    raise ValueError(
      f'parents and acceptance must agree about the number of nodes: got {parents.shape=} and '
      f'{reach.shape=}.'
    )
  ancestor = jnp.broadcast_to(parents, reach.shape)
  reach = reach.at[..., 0].set(1)
  # After j steps `reach` covers the last 2**j edges of the node's path, and `ancestor` is where
  # that stretch begins.
  for _ in range(max(num_nodes - 1, 1).bit_length()):
    above = jnp.take_along_axis(reach, jnp.maximum(ancestor, 0), axis=-1)
    further = jnp.take_along_axis(ancestor, jnp.maximum(ancestor, 0), axis=-1)
    reach = jnp.where(ancestor >= 0, reach * above, reach)
    ancestor = jnp.where(ancestor >= 0, further, ancestor)
  return reach


def expected_tokens_tree(parents: ArrayLike, acceptance: ArrayLike) -> jax.Array:
  """Returns f[B], the tokens per call of a draft tree: the sum of its path probabilities.

  Args:
    parents: i[N] or i[B, N], -1 at the root (node 0), else the node's parent.
    acceptance: f[B, N], as for `path_probabilities`.

  Raises:
    ValueError: the two disagree about N.

  Source: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, 2402.12374, the
  expected number of tokens of a tree.
  """
  return jnp.sum(path_probabilities(parents, acceptance), axis=-1)


def walltime_speedup(alpha: ArrayLike, cost_ratio: ArrayLike, draft_length: ArrayLike) -> jax.Array:
  """Returns f[B], the speed-up over plain decoding if a target call costs the same at any width.

  Args:
    alpha: f[] or f[B], the acceptance of a draft whose predecessors were accepted.
    cost_ratio: f[] or f[B], time of one draft step in units of one target call.
    draft_length: i[] or i[B], drafts per call, at least 0.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, theorem 3.8.
  """
  alpha, cost_ratio, draft_length = promote(alpha, cost_ratio, draft_length)
  return expected_tokens(alpha, draft_length) / (draft_length * cost_ratio + 1)


class CostCurve(NamedTuple):
  """Measured time of one target call as a function of how many tokens it reads."""

  block_sizes: jax.Array | np.ndarray  # i[M] or f[M] strictly increasing, at least 1
  times_ms: jax.Array | np.ndarray  # f[M]


def call_time_ms(curve: CostCurve, block_size: ArrayLike) -> jax.Array:
  """Returns f[B], the time of a call on `block_size` tokens, linear between measured sizes.

  Outside of the measured sizes the result is NaN: a guess would pass for a measurement.

  Args:
    curve: the measured curve.
    block_size: i[] or f[B], tokens that the call reads.
  """
  sizes, times, block_size = promote(curve.block_sizes, curve.times_ms, block_size)
  return jnp.interp(block_size, sizes, times, left=jnp.nan, right=jnp.nan)


def walltime_general(
  tokens_per_call: ArrayLike,
  curve: CostCurve,
  *,
  block_size: ArrayLike,
  num_draft_steps: ArrayLike,
  draft_step_ms: ArrayLike,
  overhead_ms: ArrayLike = 0.0,
) -> jax.Array:
  """Returns f[B], the speed-up over plain decoding under a measured cost curve.

  For targets whose time grows with the width of a call: on CPU, in large batches, with experts.

  Args:
    tokens_per_call: f[] or f[B].
    curve: time of a target call against its width; it must cover width 1, which is plain decoding.
    block_size: i[] or f[B], tokens that a target call reads: G + 1 for a chain, N for a tree.
    num_draft_steps: i[] or f[B], draft steps per call; fractional for a controller's mean.
    draft_step_ms: f[] or f[B], time of one draft step.
    overhead_ms: f[] or f[B], whatever else a round costs.

  Returns NaN where the curve was not measured.

  Source: our own, from Fast Inference from Transformers via Speculative Decoding, 2211.17192,
  theorem 3.8.
  """
  tokens, steps, step_ms, overhead = promote(
    tokens_per_call, num_draft_steps, draft_step_ms, overhead_ms
  )
  round_ms = steps * step_ms + call_time_ms(curve, block_size) + overhead
  return tokens * call_time_ms(curve, 1) / round_ms


def ops_factor(alpha: ArrayLike, ops_ratio: ArrayLike, draft_length: ArrayLike) -> jax.Array:
  """Returns f[B], arithmetic operations per emitted token in units of those of plain decoding.

  Args:
    alpha: f[] or f[B], the acceptance of a draft whose predecessors were accepted.
    ops_ratio: f[] or f[B], operations of one draft step in units of one target token.
    draft_length: i[] or i[B], drafts per call, at least 0.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, theorem 3.11.
  """
  alpha, ops_ratio, draft_length = promote(alpha, ops_ratio, draft_length)
  return (draft_length * ops_ratio + draft_length + 1) / expected_tokens(alpha, draft_length)


def worth_it(alpha: ArrayLike, cost_ratio: ArrayLike) -> jax.Array:
  """Returns bool[B], whether some draft length beats plain decoding; one draft then does already.

  If so, the gain is at least `walltime_speedup(alpha, cost_ratio, 1)`; if not, every draft length
  loses or breaks even.

  Args:
    alpha: f[] or f[B], the acceptance of a draft whose predecessors were accepted.
    cost_ratio: f[] or f[B], time of one draft step in units of one target call.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, corollary 3.9.
  """
  alpha, cost_ratio = promote(alpha, cost_ratio)
  return alpha > cost_ratio


def optimal_draft_length(
  alpha: ArrayLike, cost_ratio: ArrayLike, max_length: int
) -> tuple[jax.Array, jax.Array]:
  """Returns i32[B], the draft length of highest speed-up, and f[B], that speed-up.

  Among equals the shortest is chosen; 0, with speed-up 1, means: do not draft.

  Args:
    alpha: f[] or f[B], the acceptance of a draft whose predecessors were accepted.
    cost_ratio: f[] or f[B], time of one draft step in units of one target call.
    max_length: the longest draft to consider; static.

  Raises:
    ValueError: `max_length` is negative.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, section 3.5.
  """
  if max_length < 0:
    raise ValueError(f'max_length must be at least 0, got {max_length=}.')
  alpha, cost_ratio = jnp.broadcast_arrays(*promote(alpha, cost_ratio))
  lengths = jnp.broadcast_to(jnp.arange(max_length + 1), (*alpha.shape, max_length + 1))
  speedup = walltime_speedup(alpha[..., None], cost_ratio[..., None], lengths)
  return jnp.argmax(speedup, axis=-1).astype(jnp.int32), jnp.max(speedup, axis=-1)


def stationary_law(transitions: ArrayLike) -> jax.Array:
  """Returns f[B, M], the law over states that a Markov chain keeps.

  Args:
    transitions: f[B, M, M], entry [d, m] the probability of state m after state d. There must be
      one stationary law only; with several the linear system is singular and the result is not
      finite or not meaningful.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the steady state of the dynamic sparse tree.
  """
  (transitions,) = promote(transitions)
  identity = jnp.eye(transitions.shape[-1], dtype=transitions.dtype)
  system = jnp.broadcast_to(identity, transitions.shape) - transitions + 1
  ones = jnp.ones((*transitions.shape[:-1], 1), transitions.dtype)
  return jnp.linalg.solve(jnp.swapaxes(system, -1, -2), ones)[..., 0]


def markov_tree_value(transitions: ArrayLike, tokens_per_call: ArrayLike) -> jax.Array:
  """Returns f[B], the long-run tokens per call if the next round's tree depends on this one's end.

  Args:
    transitions: f[B, M, M], as for `stationary_law`.
    tokens_per_call: f[B, M], of a round in each state.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the steady state of the dynamic sparse tree.
  """
  transitions, tokens = promote(transitions, tokens_per_call)
  return jnp.sum(stationary_law(transitions) * tokens, axis=-1)


def _relative_exp(x: jax.Array) -> jax.Array:
  """(exp(x) - 1) / x, smooth through 0."""
  near = jnp.abs(x) < 1
  small = jnp.where(near, x, 0)
  series = jnp.ones_like(x)
  for i in range(18, 1, -1):
    series = 1 + series * small / i
  far = jnp.where(near, 1, x)
  return jnp.where(near, series, jnp.expm1(far) / far)

"""What decoding faster than one token per forward pass can gain: closed forms, bounds and fits.

Axes: `B` any leading axes, `G` draft positions, `N` tree nodes, `V` vocabulary, `K` drafts of one
node, `M` measured points, `F` factors of a fit.

p is always the target's law, q the draft's, and here a law is a probability vector. Every function
is pure and vectorised over its leading axes, and computes in the dtype of its inputs, though never
in less than float32. *Acceptance* is the probability, in [0, 1], that at least one draft of a node
is kept. *Tokens per call* are emitted tokens per forward pass of the target: the accepted drafts
and the one token that every pass yields anyway. Times are milliseconds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

# --- One draft ---------------------------------------------------------------------------------


def overlap(p: ArrayLike, q: ArrayLike) -> jax.Array:
  """Returns f[B], the overlap of two laws: the best acceptance that a single draft can have.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.

  Raises:
    ValueError: the shapes differ.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, theorem 3.5.
  """
  p, q = _laws(p, q)
  return jnp.sum(jnp.minimum(p, q), axis=-1)


def total_variation(p: ArrayLike, q: ArrayLike) -> jax.Array:
  """Returns f[B], half the L1 distance of two laws f[B, V]: 1 minus their overlap.

  Raises:
    ValueError: the shapes differ.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, definition 3.2.
  """
  p, q = _laws(p, q)
  return jnp.sum(jnp.abs(p - q), axis=-1) / 2


def coupled_acceptance(p: ArrayLike, q: ArrayLike) -> jax.Array:
  """Returns f[B], how often argmax(log p + g) and argmax(log q + g) agree on shared Gumbel noise g.

  This is the acceptance of coupled verification. It lies between (1 - TV) / (1 + TV) and 1 - TV.
  One sort by p / q turns the double sum of the definition into two cumulative sums.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.

  Raises:
    ValueError: the shapes differ.

  Source: Coupling without Communication and Drafter-Invariant Speculative Decoding, 2408.07978,
  section on Gumbel sampling.
  """
  p, q = _sorted_by_ratio(*_laws(p, q))  # q / p falls
  # Token v wins both races with odds p_v : sum of p over the tokens that p favours at least as
  # much as v; and likewise for q.
  p_favoured = jnp.cumsum(p[..., ::-1], axis=-1)[..., ::-1]
  q_favoured = jnp.cumsum(q, axis=-1) - q
  both = p * q
  odds = q * p_favoured + p * q_favoured
  return jnp.sum(jnp.where(both > 0, both / jnp.where(both > 0, odds, 1), 0), axis=-1)


class LenientOutput(NamedTuple):
  """What lenient verification does, exactly."""

  law: jax.Array  # f[B, V] the law of the emitted token
  acceptance: jax.Array  # f[B]
  total_variation: jax.Array  # f[B] distance of `law` from the target's law


def lenient_output(p: ArrayLike, q: ArrayLike, leniency: ArrayLike) -> LenientOutput:
  """Returns the law that lenient verification emits, its acceptance and its distance from p.

  A draft x is kept with probability min(1, p(x) / (leniency * q(x))), and a rejection is replaced
  by a draw from the normalised positive part of p - leniency * q. No token becomes more likely
  than p / leniency.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.
    leniency: f[] or f[B] in (0, 1]; 1 is lossless. Values outside give meaningless results.

  Raises:
    ValueError: the shapes of p and q differ.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, appendix on
  lenience; the closed form of the output is our own.
  """
  p, q = _laws(p, q)
  leniency = jnp.asarray(leniency, p.dtype)
  leniency = leniency[..., None] if leniency.ndim else leniency
  kept = jnp.minimum(q, p / leniency)
  acceptance = jnp.sum(kept, axis=-1)
  law = kept + (1 - acceptance)[..., None] * _normalize(jnp.maximum(p - leniency * q, 0))
  return LenientOutput(law, acceptance, total_variation(p, law))


# --- Tokens per call and speed-up --------------------------------------------------------------


def expected_tokens(alpha: ArrayLike, draft_length: ArrayLike) -> jax.Array:
  """Returns f[B], the tokens per call of a chain whose drafts are each accepted with `alpha`.

  This is the sum of alpha**i for i from 0 to `draft_length`, to full precision and with a finite
  gradient everywhere in [0, 1].

  Args:
    alpha: f[] or f[B], the acceptance of a draft whose predecessors were accepted.
    draft_length: i[] or i[B], drafts per call, at least 0; it may be traced.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, equation 1.
  """
  alpha, draft_length = _promote(alpha, draft_length)
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
  (acceptance,) = _promote(acceptance)
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
  acceptance, continuation = _promote(acceptance, continuation)
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
  (reach,) = _promote(acceptance)
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
  alpha, cost_ratio, draft_length = _promote(alpha, cost_ratio, draft_length)
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
  sizes, times, block_size = _promote(curve.block_sizes, curve.times_ms, block_size)
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
  tokens, steps, step_ms, overhead = _promote(
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
  alpha, ops_ratio, draft_length = _promote(alpha, ops_ratio, draft_length)
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
  alpha, cost_ratio = _promote(alpha, cost_ratio)
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
  alpha, cost_ratio = jnp.broadcast_arrays(*_promote(alpha, cost_ratio))
  lengths = jnp.broadcast_to(jnp.arange(max_length + 1), (*alpha.shape, max_length + 1))
  speedup = walltime_speedup(alpha[..., None], cost_ratio[..., None], lengths)
  return jnp.argmax(speedup, axis=-1).astype(jnp.int32), jnp.max(speedup, axis=-1)


# --- Several drafts of one node: the optimum ---------------------------------------------------


def optimal_acceptance_with_replacement(p: ArrayLike, q: ArrayLike, num_drafts: int) -> jax.Array:
  """Returns f[B], the highest acceptance of any lossless rule on `num_drafts` i.i.d. drafts.

  For every set H of tokens, an accepted token lies in H, which the target does with p(H), or some
  draft lies outside of H. The optimum is the least of these bounds, and it is found among the
  prefixes of the vocabulary sorted by q / p. One sort: O(V log V).

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the law that each draft is drawn from.
    num_drafts: at least 1; static.

  Raises:
    ValueError: the shapes differ, or `num_drafts` is less than 1.

  Source: Towards Optimal Multi-draft Speculative Decoding, 2502.18779, the dual problem and its
  solution for sampling with replacement.
  """
  p, q = _sorted_by_ratio(*_laws(p, q))
  _check_num_drafts(num_drafts)
  return _least_bound(p, 1 - (1 - _mass_after(q)) ** num_drafts)


def optimal_acceptance_without_replacement(
  p: ArrayLike, q: ArrayLike, num_drafts: int, *, num_quadrature_nodes: int = 256
) -> jax.Array:
  """Returns f[B], the highest acceptance of any lossless rule on drafts without replacement.

  The bound of `optimal_acceptance_with_replacement`, with the drafts being the first `num_drafts`
  of a race in which token v arrives at rate q(v). Two drafts have a closed form. For more, the
  probability that all of them lie in H is an integral over the arrival of the first token outside
  of H; its integrand is the Poisson-binomial law of the number of arrivals in H, carried along the
  sorted vocabulary at fixed times, so that one pass serves all prefixes: O(V log V + V T K) work
  and O(T K) memory for T quadrature nodes. If q has fewer than `num_drafts` tokens, there are
  that many fewer drafts.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the law that the drafts are drawn from, one after another, without replacement.
    num_drafts: at least 1; static.
    num_quadrature_nodes: times at which the integrand is evaluated, if there are more than two
      drafts. With 256 the error is below 1e-12 in float64 up to eight drafts.

  Raises:
    ValueError: the shapes differ, or `num_drafts` is less than 1.

  Source: Towards Optimal Multi-draft Speculative Decoding, 2502.18779, the dual problem; the
  closed form for two drafts and the quadrature are our own.
  """
  p, q = _sorted_by_ratio(*_laws(p, q))
  _check_num_drafts(num_drafts)
  if num_drafts == 1:
    some_outside = _mass_after(q)
  elif num_drafts == 2:
    others = _mass_of_others(q)
    odds = jnp.cumsum(q / jnp.where(others > 0, others, 1) * (others > 0), axis=-1)
    some_outside = _mass_after(q) * (1 + odds)
  else:
    some_outside = _some_draft_outside(q, num_drafts, num_quadrature_nodes)
  return _least_bound(p, some_outside)


# --- Several drafts of one node: the rules -----------------------------------------------------


def specinfer_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> jax.Array:
  """Returns f[B], the acceptance of multi-step verification of `num_drafts` i.i.d. drafts.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the law that each draft is drawn from.
    num_drafts: at least 1; static.

  Raises:
    ValueError: the shapes differ, or `num_drafts` is less than 1.

  Source: SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based
  Speculative Inference and Verification, 2305.09781, multi-step speculative sampling.
  """
  p, q = _laws(p, q)
  _check_num_drafts(num_drafts)

  def reject(_, carry):
    residual, rejected = carry
    return _residual(residual, q), rejected * (1 - overlap(residual, q))

  start = p, jnp.ones(p.shape[:-1], p.dtype)
  return 1 - lax.fori_loop(0, num_drafts, reject, start)[1]


def multi_step_acceptance(p: ArrayLike, laws: ArrayLike) -> jax.Array:
  """Returns f[B], the acceptance of multi-step verification of one draft from each of K drafters.

  Args:
    p: f[B, V], the target's law.
    laws: f[B, K, V], the laws the drafts are drawn from, independently, in the order of trial.

  Raises:
    ValueError: the shapes do not fit.

  Source: SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based
  Speculative Inference and Verification, 2305.09781, multi-step speculative sampling.
  """
  p, laws = _promote(p, laws)
  if laws.ndim != p.ndim + 1 or laws.shape[:-2] + laws.shape[-1:] != p.shape:
    raise ValueError(f'laws must be [B, K, V] for p [B, V]: got {p.shape=} and {laws.shape=}.')

  def reject(carry, q):
    residual, rejected = carry
    return (_residual(residual, q), rejected * (1 - overlap(residual, q))), None

  start = p, jnp.ones(p.shape[:-1], p.dtype)
  return 1 - lax.scan(reject, start, jnp.moveaxis(laws, -2, 0))[0][1]


def kseq_factor(p: ArrayLike, q: ArrayLike, num_drafts: int) -> jax.Array:
  """Returns f[B], the factor rho in [1, num_drafts] by which k-SEQ divides its ratios.

  It is the smallest for which the rule is lossless, found by bisection from above, so that the
  residual stays non-negative; the gradient is that of the implicit function.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the law that each draft is drawn from.
    num_drafts: at least 1; static.

  Raises:
    ValueError: the shapes differ, or `num_drafts` is less than 1.

  Source: SpecTr: Fast Speculative Decoding via Optimal Transport, 2310.15141, k-SEQ and
  the equation that fixes its factor.
  """
  p, q = _laws(p, q)
  _check_num_drafts(num_drafts)

  def gap(rho, p, q):
    beta = _kseq_overlap(p, q, rho)
    return 1 - (1 - beta) ** num_drafts - rho * beta

  fixed_p, fixed_q = lax.stop_gradient((p, q))

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2
    too_small = gap(middle, fixed_p, fixed_q) > 0
    return jnp.where(too_small, middle, low), jnp.where(too_small, high, middle)

  low = jnp.ones(p.shape[:-1], p.dtype)
  _, rho = lax.fori_loop(0, 60, halve, (low, low * num_drafts))
  rho = lax.stop_gradient(rho)
  # One Newton step that leaves the value alone and has the gradient of the implicit function.
  _, slope = jax.jvp(lambda r: gap(r, fixed_p, fixed_q), (rho,), (jnp.ones_like(rho),))
  step = -gap(rho, p, q) / jnp.where(slope < 0, lax.stop_gradient(slope), -1)
  return rho + (step - lax.stop_gradient(step))


def kseq_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> jax.Array:
  """Returns f[B], the acceptance of k-SEQ on `num_drafts` i.i.d. drafts.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the law that each draft is drawn from.
    num_drafts: at least 1; static.

  Raises:
    ValueError: the shapes differ, or `num_drafts` is less than 1.

  Source: SpecTr: Fast Speculative Decoding via Optimal Transport, 2310.15141, k-SEQ.
  """
  p, q = _laws(p, q)
  return 1 - (1 - _kseq_overlap(p, q, kseq_factor(p, q, num_drafts))) ** num_drafts


def greedy_draft_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> jax.Array:
  """Returns f[B], the acceptance if all drafts but the last are q's most probable tokens.

  The last one is drawn from the rest of q. This is the optimum for drafts made in this way. Ties
  in q go to the smaller token id.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.
    num_drafts: from 1 to V; static.

  Raises:
    ValueError: the shapes differ, or `num_drafts` is out of range.

  Source: Towards Optimal Multi-draft Speculative Decoding, 2502.18779, greedy draft sampling.
  """
  p, q = _laws(p, q)
  _check_num_drafts(num_drafts)
  vocab_size = p.shape[-1]
  if num_drafts > vocab_size:
    raise ValueError(f'There are only {vocab_size} tokens to draft, got {num_drafts=}.')
  _, top = lax.top_k(q, num_drafts - 1)
  rest = jnp.put_along_axis(q, top, jnp.zeros(top.shape, q.dtype), axis=-1, inplace=False)
  p_rest = jnp.put_along_axis(p, top, jnp.zeros(top.shape, p.dtype), axis=-1, inplace=False)
  p_top = jnp.sum(jnp.take_along_axis(p, top, axis=-1), axis=-1)
  return p_top + overlap(p_rest, _normalize(rest))


def recursive_rejection_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> jax.Array:
  """Returns f[B], the acceptance of recursive rejection sampling without replacement, exactly.

  Follows every sequence of rejected drafts, hence only for small vocabularies; for the others
  there is `recursive_rejection_acceptance_sampled`.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the law that the drafts are drawn from, one after another, without replacement.
    num_drafts: at least 1; static.

  Raises:
    ValueError: the shapes differ, `num_drafts` is less than 1, or V**num_drafts exceeds 2**24.

  Source: Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without
  Replacement, 2402.14160, recursive rejection sampling.
  """
  p, q = _laws(p, q)
  _check_num_drafts(num_drafts)
  vocab_size = p.shape[-1]
  if vocab_size**num_drafts > 2**24:
    raise ValueError(
      f'An exact recursion over {vocab_size} tokens and {num_drafts} drafts would hold '
      f'{vocab_size}**{num_drafts} numbers per row; use recursive_rejection_acceptance_sampled.'
    )
  return _recursive_rejection(p, q, num_drafts)


def recursive_rejection_acceptance_sampled(
  rng_key: jax.Array, p: ArrayLike, q: ArrayLike, num_drafts: int, *, num_samples: int
) -> tuple[jax.Array, jax.Array]:
  """Returns f[B] and f[B]: an unbiased estimate of that acceptance, and its standard error.

  For vocabularies that `recursive_rejection_acceptance` is too slow for.
  Draws sequences of rejected drafts and adds up the exact acceptance along each, so one draft has
  no error at all and the error for more is small. One sample after another: O(B V) memory.

  Args:
    rng_key: one random key; rows get independent draws.
    p: f[B, V], the target's law.
    q: f[B, V], the law that the drafts are drawn from, one after another, without replacement.
    num_drafts: at least 1; static.
    num_samples: sequences to draw per row, at least 2; static.

  Raises:
    ValueError: the shapes differ, `num_drafts` is less than 1, or `num_samples` less than 2.

  Source: Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without
  Replacement, 2402.14160, recursive rejection sampling; the estimator is our own.
  """
  p, q = _laws(p, q)
  _check_num_drafts(num_drafts)
  if num_samples < 2:
    raise ValueError(f'A standard error takes at least 2 samples, got {num_samples=}.')

  def reject(carry, key):
    target, draft, rejected = carry
    refused = jnp.maximum(draft - target, 0)  # in proportion to the law of a rejected draft
    token = jax.random.categorical(key, jnp.log(refused), axis=-1)
    rest = jnp.where(jax.nn.one_hot(token, p.shape[-1], dtype=bool), 0, draft)
    rejected = rejected * (1 - overlap(target, draft))
    return (_residual(target, draft), _normalize(rest), rejected), None

  def sample(key):
    start = p, q, jnp.ones(p.shape[:-1], p.dtype)
    return 1 - lax.scan(reject, start, jax.random.split(key, num_drafts))[0][2]

  samples = lax.map(sample, jax.random.split(rng_key, num_samples))
  return jnp.mean(samples, axis=0), jnp.std(samples, axis=0, ddof=1) / num_samples**0.5


# --- Trees that depend on the last round -------------------------------------------------------


def stationary_law(transitions: ArrayLike) -> jax.Array:
  """Returns f[B, M], the law over states that a Markov chain keeps.

  Args:
    transitions: f[B, M, M], entry [d, m] the probability of state m after state d. There must be
      one stationary law only; with several the linear system is singular and the result is not
      finite or not meaningful.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the steady state of the dynamic sparse tree.
  """
  (transitions,) = _promote(transitions)
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
  transitions, tokens = _promote(transitions, tokens_per_call)
  return jnp.sum(stationary_law(transitions) * tokens, axis=-1)


# --- Fits and estimates ------------------------------------------------------------------------


class LogLinearFit(NamedTuple):
  """A fitted law y = slope * log10(x) + intercept. Errors are standard errors."""

  slope: jax.Array  # f[B] change of y for ten times x
  intercept: jax.Array  # f[B]
  slope_interval: jax.Array  # f[B, 2]
  intercept_interval: jax.Array  # f[B, 2]
  slope_error: jax.Array  # f[B]
  residual_error: jax.Array  # f[B] standard deviation of y around the line


def fit_loglinear(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> LogLinearFit:
  """Returns the least-squares fit of y = a log10(x) + b, with confidence intervals.

  Suits acceptance, tokens per call or speed against the drafter's training tokens, its capacity,
  or the batch size. Intervals are Student's; with two points nothing is left to estimate the
  error from, and they are infinite.

  Args:
    x: f[B, M], positive.
    y: f[B, M].
    confidence: coverage of the intervals, in (0, 1).

  Raises:
    ValueError: the shapes differ, M is less than 2, or `confidence` is out of range.

  Source: Scaling Laws for Speculative Decoding, 2505.07858, the log-linear laws.
  """
  x, y = _promote(x, y)
  num_points = x.shape[-1] if x.ndim else 0
  if x.shape != y.shape or num_points < 2:
    raise ValueError(
      f'x and y must have the same shape [..., M] with M at least 2: got {x.shape=} and {y.shape=}.'
    )
  if not 0 < confidence < 1:
    raise ValueError(f'confidence must lie strictly between 0 and 1, got {confidence=}.')
  log_x = jnp.log10(x)
  mean_x = jnp.mean(log_x, axis=-1)
  mean_y = jnp.mean(y, axis=-1)
  dx = log_x - mean_x[..., None]
  spread = jnp.sum(dx**2, axis=-1)
  slope = jnp.sum(dx * (y - mean_y[..., None]), axis=-1) / spread
  intercept = mean_y - slope * mean_x
  residuals = y - slope[..., None] * log_x - intercept[..., None]
  freedom = num_points - 2
  variance = jnp.sum(residuals**2, axis=-1) / freedom if freedom else jnp.full_like(slope, jnp.inf)
  slope_error = jnp.sqrt(variance / spread)
  intercept_error = jnp.sqrt(variance * (1 / num_points + mean_x**2 / spread))
  quantile = _student_quantile(confidence, freedom, slope.dtype) if freedom else 1.0
  return LogLinearFit(
    slope=slope,
    intercept=intercept,
    slope_interval=_interval(slope, quantile * slope_error),
    intercept_interval=_interval(intercept, quantile * intercept_error),
    slope_error=slope_error,
    residual_error=jnp.sqrt(variance),
  )


def combine_loglinear(
  fits: Sequence[LogLinearFit],
  x: ArrayLike,
  *,
  reference_x: ArrayLike,
  reference_y: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
  """Returns f[B] and f[B]: y predicted from F factors at once, and its standard error.

  Each fit varied one factor and held the others; their contributions relative to one measured
  reference point are added. The error counts the slopes' errors, as independent, and neither the
  error of the reference nor what an additive law misses.

  Args:
    fits: one fit per factor, each with scalar (f[]) entries.
    x: f[B, F], the factors to predict at.
    reference_x: f[F], the factors of the reference point.
    reference_y: f[], y measured there.

  Raises:
    ValueError: the number of factors disagrees.

  Source: Scaling Laws for Speculative Decoding, 2505.07858, where the factors are joined.
  """
  x, reference_x, reference_y = _promote(x, reference_x, reference_y)
  if not len(fits) == x.shape[-1] == reference_x.shape[-1]:
    raise ValueError(
      f'There must be one fit per factor: got {len(fits)} fits, {x.shape=} and '
      f'{reference_x.shape=}.'
    )
  slopes = jnp.stack([fit.slope for fit in fits])
  errors = jnp.stack([fit.slope_error for fit in fits])
  decades = jnp.log10(x) - jnp.broadcast_to(jnp.log10(reference_x), x.shape)
  error = jnp.sqrt(decades**2 @ errors**2)
  return reference_y + decades @ slopes, error


class InformationSurplus(NamedTuple):
  """What a hidden state tells about later tokens beyond what the next token tells. All in nats."""

  surplus: jax.Array  # f[B]
  standard_error: jax.Array  # f[B]
  cross_entropy_without: jax.Array  # f[B] of the predictor that sees the next token only
  cross_entropy_with: jax.Array  # f[B] of the one that sees the hidden state too


def information_surplus(
  log_probs_without: ArrayLike, log_probs_with: ArrayLike
) -> InformationSurplus:
  """Returns an estimate, from held-out text, of I(hidden; later tokens | next token), in nats.

  This is what drafters of several tokens live on. It is the gain in held-out log-likelihood of
  the later tokens when a predictor is shown the hidden state. If the predictor without it is as
  good as can be, the estimate is, up to sampling error, a lower bound; a poor one inflates it, so
  look at both cross-entropies.

  Args:
    log_probs_without: f[B, M], natural log-probability of the later tokens of each of M held-out
      positions, predicted from the next token alone.
    log_probs_with: f[B, M], the same positions, predicted from the hidden state too.

  Raises:
    ValueError: the shapes differ, or M is less than 2.

  Source: A Markov Categorical Framework for Language Modeling, 2507.19247, the information
  surplus; the estimator is our own.
  """
  without, with_hidden = _promote(log_probs_without, log_probs_with)
  if without.shape != with_hidden.shape or not without.ndim or without.shape[-1] < 2:
    raise ValueError(
      'Both predictors must be judged on the same positions, at least 2 of them: got '
      f'{without.shape=} and {with_hidden.shape=}.'
    )
  gain = with_hidden - without
  return InformationSurplus(
    surplus=jnp.mean(gain, axis=-1),
    standard_error=jnp.std(gain, axis=-1, ddof=1) / gain.shape[-1] ** 0.5,
    cross_entropy_without=-jnp.mean(without, axis=-1),
    cross_entropy_with=-jnp.mean(with_hidden, axis=-1),
  )


# --- Shared pieces -----------------------------------------------------------------------------


def _promote(*values: ArrayLike) -> tuple[jax.Array, ...]:
  """The values as arrays of their common dtype, at least float32."""
  dtype = jnp.result_type(*values)
  if not jnp.issubdtype(dtype, jnp.floating):
    dtype = jnp.result_type(float)
  dtype = jnp.promote_types(dtype, jnp.float32)
  return tuple(jnp.asarray(value, dtype) for value in values)


def _laws(p: ArrayLike, q: ArrayLike) -> tuple[jax.Array, jax.Array]:
  p, q = _promote(p, q)
  if p.shape != q.shape or not p.ndim:
    raise ValueError(
      f'p and q must be laws of the same shape [..., V]: got {p.shape=} and {q.shape=}.'
    )
  return p, q


def _check_num_drafts(num_drafts: int) -> None:
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1, got {num_drafts=}.')


def _normalize(weights: jax.Array) -> jax.Array:
  """The law in proportion to the weights; all zeros if they are."""
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)


def _residual(p: jax.Array, q: jax.Array) -> jax.Array:
  return _normalize(jnp.maximum(p - q, 0))


def _relative_exp(x: jax.Array) -> jax.Array:
  """(exp(x) - 1) / x, smooth through 0."""
  near = jnp.abs(x) < 1
  small = jnp.where(near, x, 0)
  series = jnp.ones_like(x)
  for i in range(18, 1, -1):
    series = 1 + series * small / i
  far = jnp.where(near, 1, x)
  return jnp.where(near, series, jnp.expm1(far) / far)


def _sorted_by_ratio(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both laws with the tokens in falling order of q / p."""
  rising = jnp.where(q > 0, p / jnp.where(q > 0, q, 1), jnp.inf)
  order = jnp.argsort(lax.stop_gradient(rising), axis=-1)
  return jnp.take_along_axis(p, order, axis=-1), jnp.take_along_axis(q, order, axis=-1)


def _mass_after(q: jax.Array) -> jax.Array:
  """f[B, V], the mass of the entries behind each; summed from the end, where it is small."""
  from_here = jnp.cumsum(q[..., ::-1], axis=-1)[..., ::-1]
  return jnp.concatenate([from_here[..., 1:], jnp.zeros_like(q[..., :1])], axis=-1)


def _mass_of_others(q: jax.Array) -> jax.Array:
  """f[B, V], 1 - q, to full precision where q is near 1."""
  is_top = jax.nn.one_hot(jnp.argmax(q, axis=-1), q.shape[-1], dtype=bool)
  rest = jnp.sum(jnp.where(is_top, 0, q), axis=-1, keepdims=True)
  return jnp.where(is_top, rest, 1 - q)


def _least_bound(p: jax.Array, some_outside: jax.Array) -> jax.Array:
  """min over prefixes H of p(H) + P(some draft outside of H), the empty prefix giving 1."""
  bounds = jnp.cumsum(p, axis=-1) + some_outside
  return jnp.minimum(jnp.min(bounds, axis=-1), 1)


def _some_draft_outside(q: jax.Array, num_drafts: int, num_nodes: int) -> jax.Array:
  """f[B, V], the probability that some draft lies behind the prefix that ends with each entry.

  With T the first arrival outside of the prefix, at rate r, and N(t) the arrivals within it up to
  time t, this is P(N(T) < num_drafts), the integral of r exp(-r t) P(N(t) < num_drafts) over t.
  The trapezoidal rule in s, t = exp(s - exp(-s)), converges exponentially and covers rates down
  to 1e-18; what arrives later than that counts as never.
  """
  first, last = -3.7, 45.0
  s = jnp.linspace(first, last, num_nodes, dtype=q.dtype)
  times = jnp.exp(s - jnp.exp(-s))
  weights = times * (1 + jnp.exp(-s)) * ((last - first) / (num_nodes - 1))

  def add_token(counts, token):
    rate, outside = (x[..., None] for x in token)
    shape = (*rate.shape[:-1], num_nodes)
    t = jnp.broadcast_to(times, shape)
    arrived = -jnp.expm1(-rate * t)[..., None]
    one_more = jnp.concatenate([jnp.zeros_like(counts[..., :1]), counts[..., :-1]], axis=-1)
    counts = counts * (1 - arrived) + one_more * arrived
    too_few = jnp.sum(counts, axis=-1)
    survival = jnp.exp(-outside * t)
    body = jnp.sum(outside * survival * too_few * jnp.broadcast_to(weights, shape), axis=-1)
    tail = jnp.where(outside[..., 0] > 0, survival[..., -1] * too_few[..., -1], 0)
    return counts, body + tail

  start = jnp.zeros((*q.shape[:-1], num_nodes, num_drafts), q.dtype).at[..., 0].set(1)
  tokens = jnp.moveaxis(q, -1, 0), jnp.moveaxis(_mass_after(q), -1, 0)
  return jnp.moveaxis(lax.scan(add_token, start, tokens)[1], 0, -1)


def _kseq_overlap(p: jax.Array, q: jax.Array, rho: jax.Array) -> jax.Array:
  return jnp.sum(jnp.minimum(q, p / rho[..., None]), axis=-1)


def _recursive_rejection(p: jax.Array, q: jax.Array, num_drafts: int) -> jax.Array:
  first = overlap(p, q)
  if num_drafts == 1:
    return first
  shape = (*q.shape, q.shape[-1])
  without = jnp.where(jnp.eye(q.shape[-1], dtype=bool), 0, jnp.broadcast_to(q[..., None, :], shape))
  residual = jnp.broadcast_to(_residual(p, q)[..., None, :], shape)
  later = _recursive_rejection(residual, _normalize(without), num_drafts - 1)
  return first + jnp.sum(jnp.maximum(q - p, 0) * later, axis=-1)


def _student_quantile(confidence: float, freedom: int, dtype) -> jax.Array:
  """f[], the t that |T| exceeds with probability 1 - confidence; T Student's with `freedom`."""
  half = jnp.asarray(freedom / 2, dtype)

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2  # t = sqrt(freedom) tan(middle)
    beyond = jax.scipy.special.betainc(half, jnp.asarray(0.5, dtype), jnp.cos(middle) ** 2)
    too_small = beyond > 1 - confidence
    return jnp.where(too_small, middle, low), jnp.where(too_small, high, middle)

  bracket = jnp.zeros((), dtype), jnp.asarray(jnp.pi / 2, dtype)
  low, high = lax.fori_loop(0, 60, halve, bracket)
  return freedom**0.5 * jnp.tan((low + high) / 2)


def _interval(centre: jax.Array, radius: jax.Array) -> jax.Array:
  return jnp.stack([centre - radius, centre + radius], axis=-1)

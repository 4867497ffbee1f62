"""How often one of several drafts of a node is kept: the optimum, and what each rule reaches.

Axes: `B` any leading axes, `V` vocabulary, `K` drafts of one node.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from decodax.theory.common import as_laws
from decodax.theory.common import normalize
from decodax.theory.common import promote
from decodax.theory.common import sorted_by_ratio
from decodax.theory.one_draft import overlap


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
  p, q = sorted_by_ratio(*as_laws(p, q))
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
  p, q = sorted_by_ratio(*as_laws(p, q))
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
  p, q = as_laws(p, q)
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
  p, laws = promote(p, laws)
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
  p, q = as_laws(p, q)
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
  p, q = as_laws(p, q)
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
  p, q = as_laws(p, q)
  _check_num_drafts(num_drafts)
  vocab_size = p.shape[-1]
  if num_drafts > vocab_size:
    raise ValueError(f'There are only {vocab_size} tokens to draft, got {num_drafts=}.')
  _, top = lax.top_k(q, num_drafts - 1)
  rest = jnp.put_along_axis(q, top, jnp.zeros(top.shape, q.dtype), axis=-1, inplace=False)
  p_rest = jnp.put_along_axis(p, top, jnp.zeros(top.shape, p.dtype), axis=-1, inplace=False)
  p_top = jnp.sum(jnp.take_along_axis(p, top, axis=-1), axis=-1)
  return p_top + overlap(p_rest, normalize(rest))


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
  p, q = as_laws(p, q)
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
  p, q = as_laws(p, q)
  _check_num_drafts(num_drafts)
  if num_samples < 2:
    raise ValueError(f'A standard error takes at least 2 samples, got {num_samples=}.')

  def reject(carry, key):
    target, draft, rejected = carry
    refused = jnp.maximum(draft - target, 0)  # in proportion to the law of a rejected draft
    token = jax.random.categorical(key, jnp.log(refused), axis=-1)
    rest = jnp.where(jax.nn.one_hot(token, p.shape[-1], dtype=bool), 0, draft)
    rejected = rejected * (1 - overlap(target, draft))
    return (_residual(target, draft), normalize(rest), rejected), None

  def sample(key):
    start = p, q, jnp.ones(p.shape[:-1], p.dtype)
    return 1 - lax.scan(reject, start, jax.random.split(key, num_drafts))[0][2]

  samples = lax.map(sample, jax.random.split(rng_key, num_samples))
  return jnp.mean(samples, axis=0), jnp.std(samples, axis=0, ddof=1) / num_samples**0.5


def _check_num_drafts(num_drafts: int) -> None:
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1, got {num_drafts=}.')


def _residual(p: jax.Array, q: jax.Array) -> jax.Array:
  return normalize(jnp.maximum(p - q, 0))


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
  later = _recursive_rejection(residual, normalize(without), num_drafts - 1)
  return first + jnp.sum(jnp.maximum(q - p, 0) * later, axis=-1)

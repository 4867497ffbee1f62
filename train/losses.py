"""Losses between a target's law p and a draft's law q, position weights, and how sums are taken.

A loss of one row of logits returns one number; nothing here averages. `Mean` carries a sum and what
to divide it by, so that batches split over devices or micro-batches add up exactly. Logits of a
whole batch, f32[B, T, V], are the largest array of a training step and are never built: `by_chunk`
goes over the tokens a few at a time and forgets them until the backward pass.

Logits are f32[..., V]; losses act on the last axis. The exact acceptance probability of lossless
speculative sampling is `sum(min(p, q)) = 1 - total variation`.

Axes: `B` rows, `T` tokens, `D` width, `V` vocabulary, `Vd` draft vocabulary, `K` draft depth.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

CHUNK = 128  # tokens of a row whose logits exist at the same time

Divergence = Callable[[jax.Array, jax.Array], jax.Array]
"""(target logits f32[..., V], draft logits f32[..., V]) -> f32[...]"""


class Mean(NamedTuple):
  """A mean that is not divided yet, so that several can be added."""

  total: jax.Array  # f32[] weighted sum
  weight: jax.Array  # f32[] sum of weights

  @property
  def value(self) -> jax.Array:
    """f32[]; 0 if nothing was counted."""
    return self.total / jnp.maximum(self.weight, 1e-9)


def masked(values: jax.Array, weights: jax.Array) -> Mean:
  """Returns the mean of values[B, T] over weights[B, T]; where a weight is 0 a value may be NaN."""
  weights = weights.astype(jnp.float32)
  return Mean(jnp.where(weights > 0, values * weights, 0.0).sum(), weights.sum())


# --- One row of logits -------------------------------------------------------------------------


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns f32[...], -log q(label). `labels` i32[...]."""
  picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def forward_kl(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Returns KL(p || q): the soft cross entropy less the entropy of p."""
  log_p, log_q = _log_laws(p_logits, q_logits)
  return jnp.sum(_times_log(log_p, log_p) - _times_log(log_p, log_q), axis=-1)


def soft_cross_entropy(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Returns -sum p log q; its gradient in q is that of `forward_kl`."""
  log_p, log_q = _log_laws(p_logits, q_logits)
  return -jnp.sum(_times_log(log_p, log_q), axis=-1)


def reverse_kl(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Returns KL(q || p)."""
  return forward_kl(q_logits, p_logits)


def jensen_shannon(p_logits: jax.Array, q_logits: jax.Array, *, beta: float = 0.5) -> jax.Array:
  """Returns beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

  Source: DistillSpec, arXiv:2310.08461; GKD, arXiv:2306.13649, equation 1.
  """
  log_p, log_q = _log_laws(p_logits, q_logits)
  log_m = jnp.logaddexp(log_p + np.log(beta), log_q + np.log(1 - beta))
  from_p = jnp.sum(_times_log(log_p, log_p) - _times_log(log_p, log_m), axis=-1)
  from_q = jnp.sum(_times_log(log_q, log_q) - _times_log(log_q, log_m), axis=-1)
  return beta * from_p + (1 - beta) * from_q


def total_variation(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Returns half of sum |p - q|, the probability that a draft is rejected."""
  p, q = jax.nn.softmax(p_logits), jax.nn.softmax(q_logits)
  return 0.5 * jnp.abs(p - q).sum(-1)


def acceptance(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Returns sum min(p, q), the probability that a draft is accepted."""
  return jnp.minimum(jax.nn.softmax(p_logits), jax.nn.softmax(q_logits)).sum(-1)


def negative_log_acceptance(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Returns -log of the acceptance: total variation that also trains from far away.

  Source: LK Losses, arXiv:2602.23881.
  """
  return -jnp.log(jnp.maximum(acceptance(p_logits, q_logits), 1e-20))


def lk_hybrid(p_logits: jax.Array, q_logits: jax.Array, *, eta: float = 3.0) -> jax.Array:
  """Returns w KL(p || q) + (1 - w) TV with w = exp(-eta acceptance), w without gradient.

  Source: LK Losses, arXiv:2602.23881.
  """
  distance = total_variation(p_logits, q_logits)
  share = lax.stop_gradient(jnp.exp(-eta * (1 - distance)))
  return share * forward_kl(p_logits, q_logits) + (1 - share) * distance


def top_k_cross_entropy(p_logits: jax.Array, q_logits: jax.Array, *, k: int = 10) -> jax.Array:
  """Returns -sum p log q over the k likeliest tokens of the target.

  Source: HASS, arXiv:2408.15766, equation 1.
  """
  log_p, top = lax.top_k(jax.nn.log_softmax(p_logits), k)
  log_q = jnp.take_along_axis(jax.nn.log_softmax(q_logits), top, axis=-1)
  return -jnp.sum(jnp.exp(log_p) * log_q, axis=-1)


def list_mle(p_logits: jax.Array, q_logits: jax.Array, *, k: int = 10) -> jax.Array:
  """Returns -log probability that q's scores rank the target's k likeliest tokens as it does.

  Source: ViSpec, arXiv:2509.15235.
  """
  _, top = lax.top_k(p_logits, k)
  scores = jnp.take_along_axis(q_logits, top, axis=-1)
  tails = lax.associative_scan(jnp.logaddexp, scores, reverse=True, axis=scores.ndim - 1)
  return jnp.sum(tails - scores, axis=-1)


def smooth_l1(predicted: jax.Array, wanted: jax.Array, *, knee: float = 1.0) -> jax.Array:
  """Returns f32[...], the mean over the last axis of Huber's loss divided by its knee."""
  error = jnp.abs(predicted.astype(jnp.float32) - wanted.astype(jnp.float32))
  small = 0.5 * jnp.square(error) / knee
  return jnp.where(error < knee, small, error - 0.5 * knee).mean(-1)


DIVERGENCES: Mapping[str, Divergence] = {
  'forward_kl': forward_kl,
  'reverse_kl': reverse_kl,
  'jensen_shannon': jensen_shannon,
  'total_variation': total_variation,
  'negative_log_acceptance': negative_log_acceptance,
  'lk_hybrid': lk_hybrid,
  'top_k_cross_entropy': top_k_cross_entropy,
  'list_mle': list_mle,
}


def get_divergence(name: str) -> Divergence:
  """Returns a loss between two laws by name.

  Raises:
    ValueError: if there is none of this name.
  """
  if name not in DIVERGENCES:
    raise ValueError(f'unknown divergence {name!r}; there are {", ".join(DIVERGENCES)}')
  return DIVERGENCES[name]


def _log_laws(p_logits, q_logits):
  return jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)


def _times_log(log_weight, log_value):
  """Returns exp(log_weight) * log_value with 0 log 0 = 0."""
  finite = jnp.where(jnp.isneginf(log_weight), 0.0, log_value)
  return jnp.exp(log_weight) * finite


# --- Whole batches, a few tokens at a time -----------------------------------------------------


class Comparison(NamedTuple):
  """A draft's law against the target's, token by token."""

  loss: jax.Array  # f32[B, T]
  correct: jax.Array  # f32[B, T] 1 where both have the same likeliest token
  acceptance: jax.Array  # f32[B, T] sum min(p, q), p over the whole vocabulary
  covered: jax.Array  # f32[B, T] 1 where the target's likeliest token is in the draft vocabulary


def by_chunk(fn: Callable[..., Any], *arrays: Any, chunk: int = CHUNK) -> Any:
  """Returns fn(*arrays) computed for `chunk` tokens at a time, and again in the backward pass.

  Args:
    fn: maps pytrees of [B, c, ...] to a pytree of [B, c, ...], each token for itself. It may close
      over parameters; gradients reach them.
    *arrays: pytrees of [B, T, ...].
    chunk: tokens of a row at a time.
  """
  length = jax.tree.leaves(arrays)[0].shape[1]
  size = min(chunk, length)
  count = -(-length // size)

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :length]

  step = jax.checkpoint(lambda _, chunks: (None, fn(*chunks)))
  _, out = lax.scan(step, None, jax.tree.map(split, arrays))
  return jax.tree.map(join, out)


class Summary(NamedTuple):
  """What is needed of the target's whole law beside its logits of a draft vocabulary."""

  log_total: jax.Array  # f32[B, T] log of the sum of exponentials of all logits
  best: jax.Array  # i32[B, T] the likeliest token


def summarize(
  p_fn: Callable[[jax.Array], jax.Array], p_hidden: jax.Array, *, chunk: int = CHUNK
) -> Summary:
  """Returns the summary of the laws of hidden f[B, T, D]; without gradient.

  Args:
    p_fn: hidden f[..., D] -> logits f32[..., V].
    p_hidden: f[B, T, D].
    chunk: tokens of a row at a time.
  """

  def one(hidden):
    logits = p_fn(hidden).astype(jnp.float32)
    return Summary(jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1))

  return lax.stop_gradient(by_chunk(one, lax.stop_gradient(p_hidden), chunk=chunk))


def compare(
  p_fn: Callable[[jax.Array], jax.Array],
  q_fn: Callable[[jax.Array], jax.Array],
  p_hidden: jax.Array,
  q_hidden: jax.Array,
  *,
  divergence: Divergence = forward_kl,
  labels: jax.Array | None = None,
  keep: jax.Array | None = None,
  summary: Summary | None = None,
  chunk: int = CHUNK,
) -> Comparison:
  """Returns the loss and the agreement of two laws without building [B, T, V].

  Args:
    p_fn: hidden f[..., D] -> the target's logits f32[..., V], mostly `target.unembed`.
    q_fn: hidden f[..., Dq] -> the draft's logits f32[..., V], or f32[..., Vd] with `keep`.
    p_hidden: f[B, T, D].
    q_hidden: f[B, T, Dq].
    divergence: the loss between the two laws; not used with `labels`.
    labels: i32[B, T], learn these tokens (hard cross entropy) in place of the target's law.
    keep: i32[Vd] ascending, the target ids of a draft vocabulary. The loss compares with p
      restricted to it; `correct` and `acceptance` judge the draft by the whole p.
    summary: of p at each token. Then `p_fn` gives the logits of `keep` only, f32[..., Vd], which
      saves most of the work where several drafts are compared with the same laws.
    chunk: tokens of a row at a time.
  """
  if summary is not None and keep is None:
    raise ValueError('a summary goes with a draft vocabulary: give keep')
  no_labels = jnp.zeros(p_hidden.shape[:2], jnp.int32)

  def one(p_hidden, q_hidden, labels_here, whole):
    p_logits = lax.stop_gradient(p_fn(p_hidden).astype(jnp.float32))
    q_logits = q_fn(q_hidden).astype(jnp.float32)
    if whole is None:
      whole = Summary(jax.nn.logsumexp(p_logits, axis=-1), jnp.argmax(p_logits, axis=-1))
      p_kept = p_logits if keep is None else p_logits[..., keep]
    else:
      p_kept = p_logits
    if labels is None:
      loss = divergence(p_kept, q_logits)
    else:
      loss = _label_loss(q_logits, labels_here, keep)
    return Comparison(loss, *_agreement(whole, p_kept, lax.stop_gradient(q_logits), keep))

  labels_or_none = no_labels if labels is None else labels
  return by_chunk(one, p_hidden, q_hidden, labels_or_none, summary, chunk=chunk)


def label_losses(
  logits_fn: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  labels: jax.Array,
  *,
  chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """Returns (-log q(label), 1 where the label is the likeliest token), each f32[B, T].

  Args:
    logits_fn: hidden f[..., D] -> logits f32[..., V].
    hidden: f[B, T, D].
    labels: i32[B, T].
    chunk: tokens of a row at a time.
  """

  def one(hidden, labels):
    logits = logits_fn(hidden).astype(jnp.float32)
    right = jnp.argmax(logits, axis=-1) == labels
    return cross_entropy(logits, labels), right.astype(jnp.float32)

  return by_chunk(one, hidden, labels, chunk=chunk)


def _label_loss(q_logits, labels, keep):
  """Returns -log q(label); 0 for labels outside the draft vocabulary, which cannot be learnt."""
  if keep is None:
    return cross_entropy(q_logits, labels)
  index = jnp.clip(jnp.searchsorted(keep, labels), 0, keep.shape[0] - 1)
  return jnp.where(keep[index] == labels, cross_entropy(q_logits, index), 0.0)


def _agreement(whole: Summary, p_kept, q_logits, keep):
  """Returns (correct, acceptance, covered), each f32[...]."""
  drafted = jnp.argmax(q_logits, axis=-1)
  covered = jnp.ones_like(drafted, bool)
  if keep is not None:
    drafted = keep[drafted]
    covered = keep[jnp.clip(jnp.searchsorted(keep, whole.best), 0, len(keep) - 1)] == whole.best
  p = jnp.exp(p_kept - whole.log_total[..., None])
  overlap = jnp.minimum(p, jax.nn.softmax(q_logits)).sum(-1)
  return (drafted == whole.best).astype(jnp.float32), overlap, covered.astype(jnp.float32)


# --- Weights of draft positions ----------------------------------------------------------------


def geometric_weights(num: int, beta: float) -> np.ndarray:
  """Returns f32[K], beta^k for k = 0..K-1 (Medusa, EAGLE-3: 0.8; Clover-2: 0.7)."""
  return np.float32(beta) ** np.arange(num, dtype=np.float32)


def exponential_weights(num: int, gamma: float) -> np.ndarray:
  """Returns f32[K], exp(-k / gamma) for k = 0..K-1 (DFlash: 4 or 7, its anchor not counted)."""
  return np.exp(-np.arange(num) / gamma).astype(np.float32)


def survival_weights(losses: jax.Array, mask: jax.Array, *, smoothing: float = 0.5) -> jax.Array:
  """Returns f32[..., K]: how much each position of a block matters for how far a draft gets.

  It is the smoothed probability that the draft survives up to this position and each later one,
  summed; without gradient.

  Args:
    losses: f32[..., K], hard cross entropies, so that exp(-loss) is a probability.
    mask: [..., K], 0 where there is no position.
    smoothing: 0 trusts the probabilities, 1 ignores them.

  Source: D-PACE, as in vllm-project/speculators.
  """
  mask = mask.astype(jnp.float32)
  kept = jnp.where(mask > 0, (1 - smoothing) * jnp.exp(-losses) + smoothing, 1.0)
  reach = jnp.cumprod(kept, axis=-1) * mask
  return lax.stop_gradient(jnp.flip(jnp.cumsum(jnp.flip(reach, -1), -1), -1) * mask)


# --- Metrics -----------------------------------------------------------------------------------


def depth_metrics(
  correct: Sequence[jax.Array],
  weights: Sequence[jax.Array],
  acceptances: Sequence[jax.Array] = (),
) -> dict[str, Mean]:
  """Returns the metrics by depth, the depth counted from 1.

  `accuracy/k` is the fraction of drafts at depth k that are the target's likeliest token, whatever
  came before; `conditional/k` the same where all before were; `reach/k` the fraction of drafts
  whose first k are. `tokens_per_call` turns the last into the simulated tokens/call. With
  `acceptances` there is `acceptance/k`, the mean of sum min(p, q).

  Args:
    correct: for each depth f32[B, T], 1 where the draft is the target's likeliest token, indexed
      by where the draft starts.
    weights: for each depth f32[B, T], 1 where the token drafted is supervised.
    acceptances: for each depth f32[B, T], or nothing.
  """
  found, so_far, valid = {}, jnp.ones_like(correct[0]), jnp.ones_like(weights[0])
  for index, (right, weight) in enumerate(zip(correct, weights, strict=True), 1):
    valid = valid * (weight > 0)
    found[f'accuracy/{index}'] = masked(right, weight)
    found[f'conditional/{index}'] = masked(right, valid * so_far)
    so_far = so_far * right
    found[f'reach/{index}'] = masked(so_far, valid)
  for index, overlap in enumerate(acceptances, 1):
    found[f'acceptance/{index}'] = masked(overlap, weights[index - 1])
  return found


def tokens_per_call(metrics: Mapping[str, float]) -> float | None:
  """Returns 1 + the sum of `reach/k`: tokens/call of greedy chains if drafts saw true tokens.

  It is teacher-forced and so optimistic; None if the metrics have no depths.
  """
  reached = [value for name, value in metrics.items() if name.startswith('reach/')]
  return 1.0 + float(sum(reached)) if reached else None

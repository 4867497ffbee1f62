"""Fuzzy verification: keep a draft where target and draft laws are close enough.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Evidence
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import chain_verdict
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import compared_logits
from decodax.verifiers.laws import law_at
from decodax.verifiers.laws import log_law
from decodax.verifiers.laws import longest_prefix
from decodax.verifiers.laws import per_row
from decodax.verifiers.laws import probability_of


def _kl(log_p, log_q):
  """Returns KL(p || q) of laws given by their logarithms float[..., V]."""
  ratio = jnp.where(log_p > -jnp.inf, log_p - log_q, 0)
  return jnp.sum(jnp.exp(log_p) * ratio, axis=-1)


def _js(log_p, log_q):
  return (_kl_to_mean(log_p, log_q) + _kl_to_mean(log_q, log_p)) / 2


def _kl_to_mean(log_p, log_q):
  """Returns KL(p || (p + q) / 2), exactly 0 for equal laws."""
  log_ratio = jnp.where(log_p > -jnp.inf, log_q - log_p, 0)
  excess = jnp.maximum(log_ratio, 0) + jnp.log1p(jnp.expm1(-jnp.abs(log_ratio)) / 2)
  return -jnp.sum(jnp.exp(log_p) * excess, axis=-1)


def _tv(log_p, log_q):
  return jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2


METRICS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  'kl': _kl,
  'reverse_kl': lambda log_p, log_q: _kl(log_q, log_p),
  'js': _js,
  'tv': _tv,
}


def divergence(
  target_logits: jax.Array, draft_logits: jax.Array, metric: str, *, top_k: int | None = None
) -> jax.Array:
  """Returns float[...], how far apart two laws are, from logits float[..., V] of each.

  Args:
    target_logits: of p.
    draft_logits: of q.
    metric: 'kl' is KL(p || q), 'reverse_kl' is KL(q || p), both up to infinity; 'js' is the mean of
      the KL divergences from p and from q to their mean, at most log 2; 'tv' is the total
      variation, at most 1. In nats.
    top_k: compare only the k tokens that p finds likeliest, and all others as one.

  Raises:
    ValueError: for an unknown metric.
  """
  if metric not in METRICS:
    raise ValueError(f'metric must be one of {sorted(METRICS)}: {metric=}')
  log_p, log_q = log_law(target_logits), log_law(draft_logits)
  if top_k is not None and top_k < log_p.shape[-1]:
    log_p, kept = lax.top_k(log_p, top_k)
    log_q = jnp.take_along_axis(log_q, kept, axis=-1)
    log_p, log_q = _with_rest(log_p), _with_rest(log_q)
  return METRICS[metric](log_p, log_q)


def chain_divergences(
  proposal: Proposal,
  target_logits: jax.Array,
  evidence: Evidence,
  metric: str,
  *,
  top_k: int | None = None,
) -> jax.Array:
  """Returns float[B, D], the `divergence` of the laws behind each draft of a chain.

  They are the laws tokens are drawn from; in rows at temperature 0 those of temperature 1. One node
  is compared after the other, so that what it takes stays small.
  """
  laws = proposal.laws
  assert laws is not None

  def compare(node):
    compared = compared_logits(node, target_logits, evidence)
    return divergence(compared, laws[:, node], metric, top_k=top_k)

  return lax.map(compare, jnp.arange(laws.shape[1] - 1)).T


def fuzzy(
  threshold: float | jax.Array = 0.1, *, metric: str = 'js', top_k: int | None = None
) -> Verifier:
  """Returns the verifier that accepts a draft where the divergence of p and q is small.

  A position is accepted if `divergence(p, q)` is at most the threshold, whatever token was drafted.
  The token after the last accepted draft is drawn from p. So each position with a draft emits
  either q or p as they are. The laws compared are those that tokens are drawn from. In rows at
  temperature 0 they are the models' own laws at temperature 1, and a draft that is the target's
  argmax passes too.

  Lossy (every accepted position follows the draft's law instead of the target's). With threshold 0
  drafts pass only where p = q: lossless.

  Args:
    threshold: f[] or f[B], in nats for the KL divergences and JS; may be traced. The paper's 0.4
      belongs to another average than the Jensen-Shannon divergence used here.
    metric: see `divergence`.
    top_k: see `divergence`.

  Raises:
    ValueError: for a negative threshold, or an unknown metric.

  Source: Fuzzy Speculative Decoding for a Tunable Accuracy-Runtime Tradeoff, arXiv:2502.20704.
  """
  check_knob('threshold', threshold, 0, float('inf'))
  if metric not in METRICS:
    raise ValueError(f'metric must be one of {sorted(METRICS)}: {metric=}')

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    distance = chain_divergences(proposal, target_logits, evidence, metric, top_k=top_k)
    greedy = evidence.sampling.temperature[:, None] == 0
    matches = greedy & (probability_of(target_logits, proposal.tokens[:, 1:]) > 0)
    accepted = (distance <= per_row(threshold, distance)) | matches
    num_accepted = longest_prefix(accepted & proposal.valid[:, 1:])
    next_token = keys.pick(law_at(target_logits, num_accepted), num_accepted + 1)
    return chain_verdict(num_accepted, next_token, max_depth)

  return Verifier(
    name='fuzzy',
    exactness="lossy: emits the draft's law where it is close to the target's",
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=frozenset({Candidates.SAMPLED}),
    needs_laws=True,
    chains_only=True,
    needs_evidence=True,
  )


def _with_rest(log_law_of_some):
  """Returns float[..., k + 1] with the logarithm of the missing mass appended."""
  rest = 1 - jnp.exp(log_law_of_some).sum(-1, keepdims=True)
  return jnp.concatenate([log_law_of_some, jnp.log(jnp.maximum(rest, 0))], axis=-1)

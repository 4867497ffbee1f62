"""Typical acceptance: keep a draft that the target finds plausible enough, on chains and trees.

Axes: `B` batch, `N` nodes, `D` depth, `V` vocabulary.
"""

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import ancestor_mask
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import law_at
from decodax.verifiers.laws import logit_of
from decodax.verifiers.laws import per_row

_TINY = 1e-5  # inside the entropy's logarithm, as the published thresholds were tuned


def typical_threshold(entropy: jax.Array, epsilon: jax.Array, delta: jax.Array) -> jax.Array:
  """Returns float[B, N], min(epsilon, delta exp(-H)), from the entropy H in nats, float[B, N]."""
  return jnp.minimum(epsilon, delta * jnp.exp(-entropy))


def typical(epsilon: float | jax.Array = 0.3, delta: float | jax.Array = 0.09) -> Verifier:
  """Returns the verifier that accepts draft x where p(x) > min(epsilon, delta exp(-H(p))).

  Of all paths of accepted drafts it keeps the longest, and of several the one whose tokens have the
  largest product of probabilities. The token after the path is drawn from the target, so the first
  token of every round is the target's own. Draft laws play no part, nor does how drafts are chosen.

  Lossy (a draft that is plausible at all is emitted whether or not the target would have drawn it).
  At temperature 0 the output is that of greedy decoding. With both knobs infinite nothing is
  accepted: lossless, without any gain.

  Args:
    epsilon: f[] or f[B], a probability that is always enough; may be traced.
    delta: f[] or f[B], scales the bar that sinks with the entropy H; may be traced.

  Raises:
    ValueError: if one of them is negative.

  Source: Medusa, arXiv:2401.10774, section 2.3.1.
  """
  check_knob('epsilon', epsilon, 0, float('inf'))
  check_knob('delta', delta, 0, float('inf'))

  def verify(
    keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
  ) -> Verdict:
    parents = jnp.maximum(proposal.parents, 0)
    normalizer, entropy = _parent_laws(proposal, target_logits)
    bar = typical_threshold(entropy, per_row(epsilon, entropy), per_row(delta, entropy))
    normalizer, bar = (jnp.take_along_axis(a, parents, axis=1) for a in (normalizer, bar))
    log_p = logit_of(target_logits, proposal.tokens, parents) - normalizer
    above = jnp.exp(log_p) > bar
    accepted = proposal.valid & (above | (proposal.parents < 0))
    path, num_accepted = _best_path(proposal, accepted, log_p, max_depth)
    end = jnp.take_along_axis(path, num_accepted[:, None], axis=1)[:, 0]
    next_token = keys.pick(law_at(target_logits, end), num_accepted + 1)
    return Verdict(path, num_accepted, next_token)

  return Verifier(
    name='typical',
    exactness='lossy: plausible drafts are kept, whatever the target would have drawn',
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=frozenset(Candidates),
  )


def _parent_laws(proposal, logits):
  """Returns the logarithm of each law's normalizer and its entropy, each float[B, N].

  One node after the other, and only those that have children: most nodes of a tree have none.
  """

  def summarise(node):
    law = logits[:, node]
    normalizer = jax.nn.logsumexp(law, axis=-1)
    p = jnp.exp(law - normalizer[:, None])
    return normalizer, -jnp.sum(p * jnp.log(p + _TINY), axis=-1)

  def visit(node):
    wanted = jnp.any(proposal.valid & (proposal.parents == node))
    zeros = jnp.zeros(logits.shape[:1], logits.dtype)
    return lax.cond(wanted, summarise, lambda node: (zeros, zeros), node)

  normalizer, entropy = lax.map(visit, jnp.arange(logits.shape[1]))
  return normalizer.T, entropy.T


def _best_path(proposal, accepted, log_p, max_depth):
  """Returns (path i32[B, D + 1], num_accepted i32[B]) of the longest, likeliest accepted path."""
  above = ancestor_mask(proposal.parents)  # every node is its own ancestor
  depth = above.sum(-1, dtype=jnp.int32) - 1
  reached = jnp.all(accepted[:, None] | ~above, axis=-1)
  drafted = accepted & (proposal.parents >= 0)
  score = jnp.sum(jnp.where(above & drafted[:, None], log_p[:, None], 0), axis=-1)
  num_accepted = jnp.max(jnp.where(reached, depth, 0), axis=-1)
  longest = reached & (depth == num_accepted[:, None])
  end = jnp.argmax(jnp.where(longest, score, -jnp.inf), axis=-1)
  on_path = jnp.take_along_axis(above, end[:, None, None], axis=1)
  at_depth = depth[:, None] == jnp.arange(max_depth + 1)[None, :, None]
  return jnp.argmax(on_path & at_depth, axis=-1).astype(jnp.int32), num_accepted

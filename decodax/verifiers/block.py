"""Block verification of a chain: judge the drafts together, not one by one.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import chain_verdict
from decodax.verifiers.laws import draft_law_at
from decodax.verifiers.laws import draft_probabilities
from decodax.verifiers.laws import law_at
from decodax.verifiers.laws import log_law
from decodax.verifiers.laws import residual


def path_weights(proposal: Proposal, target_logits: jax.Array) -> jax.Array:
  """Returns float[B, D + 1], w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i))."""
  p, q = draft_probabilities(proposal, target_logits)
  weights = [jnp.ones_like(p[:, 0])]
  for depth in range(p.shape[1]):
    p_i, q_i = p[:, depth], q[:, depth]
    weights.append(jnp.minimum(weights[-1] * p_i, q_i) / jnp.where(q_i > 0, q_i, 1))
  return jnp.stack(weights, axis=1)


def stop_probabilities(
  proposal: Proposal, target_logits: jax.Array, weights: jax.Array
) -> jax.Array:
  """Returns float[B, D], the probability h_i of stopping at draft i if no later one was chosen.

  With s_i the sum of max(w_i p - q, 0) over the laws that follow draft i, h_i = s_i / (s_i + 1 -
  w_i); at the last draft of a row it is w_i, and beyond it 0.
  """
  assert proposal.laws is not None
  p, q = jnp.exp(log_law(target_logits)), jnp.exp(log_law(proposal.laws))  # summed as they come
  left = jnp.maximum(weights[:, :, None] * p - q, 0).sum(-1)
  total = left + 1 - weights
  inner = jnp.where(total > 0, left / jnp.where(total > 0, total, 1), 0)
  followed = jnp.pad(proposal.valid[:, 1:], ((0, 0), (0, 1)))
  return jnp.where(proposal.valid, jnp.where(followed, inner, weights), 0)[:, 1:]


def verify_block(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the longest prefix whose own decision is to stop there, and a token that corrects it.

  The decisions are independent, so that an early draft may fail alone and be kept with a later
  one. After i accepted drafts the next token is drawn from norm(max(w_i p - q, 0)), or from p if
  there are no more.

  Lossless (law-identical): the output has the target's law if every draft was drawn from its law
  in `proposal.laws`. No rule for one chain accepts more on average; speculative sampling, which
  accepts the same for a single draft, never does. It needs fresh noise in every round, since the
  decisions look past the tokens that are kept.

  Source: Block Verification Accelerates Speculative Decoding, arXiv:2403.10444, algorithm 2.
  """
  weights = path_weights(proposal, target_logits)
  chance = stop_probabilities(proposal, target_logits, weights)
  num_accepted = jnp.zeros_like(proposal.tokens[:, 0])
  for depth in range(max_depth, 0, -1):  # from the end: what comes before a success is moot
    tested = jnp.where(num_accepted == 0, chance[:, depth - 1], 0)
    num_accepted = jnp.where(keys.accepts(tested, depth), depth, num_accepted)
  weight = jnp.take_along_axis(weights, num_accepted[:, None], axis=1)
  p = law_at(target_logits, num_accepted)
  law = residual(weight * p, draft_law_at(proposal, num_accepted, p))
  return chain_verdict(num_accepted, keys.pick(law, num_accepted + 1), max_depth)


block = Verifier(
  name='block',
  exactness='law-identical',
  verify=verify_block,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SAMPLED}),
  needs_laws=True,
  chains_only=True,
)

"""Near-best verification: accept a draft that is among the target's best and close to the best.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import children_of
from decodax.trees import walk
from decodax.types import Candidates
from decodax.types import Evidence
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import logit_of
from decodax.verifiers.laws import per_row


def near_best(top: int | jax.Array = 5, gap: float | jax.Array = 3.0) -> Verifier:
  """Returns the verifier that accepts a draft of rank at most `top` within `gap` of the best.

  Rank and gap, the difference of log-probabilities, are those of the target before temperature and
  truncation. Of several such children the first is taken. Where there is none, the token is plain
  sampling's.

  Lossy (a runner-up is emitted where it was drafted). At temperature 0 with top = 1 or gap = 0:
  lossless (token-identical), but for ties.

  Args:
    top: i[] or i[B] >= 1; may be traced.
    gap: f[] or f[B] >= 0 in nats; may be traced.

  Raises:
    ValueError: if a knob is out of range.

  Source: GAD++, the relaxed criterion of generalised aggressive decoding, arXiv:2205.10350, section
  3.2.3; SpecDec, arXiv:2203.16487, equation 11.
  """
  check_knob('top', top, 1, float('inf'))
  check_knob('gap', gap, 0, float('inf'))

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    acceptable = _acceptable(proposal, evidence.logits, top, gap)

    def choose(node, depth):
      logits = jnp.take_along_axis(target_logits, node[:, None, None], axis=1)[:, 0]
      drawn = keys.pick_coupled(logits, depth + 1)
      fits = children_of(proposal, node) & acceptable
      child = jnp.argmax(fits, axis=-1)
      token = jnp.take_along_axis(proposal.tokens, child[:, None], axis=1)[:, 0]
      return jnp.where(fits.any(-1), token, drawn)

    return walk(choose, proposal, max_depth)

  return Verifier(
    name='near_best',
    exactness='lossy: runners-up of the target are emitted where they were drafted',
    verify=verify,
    draft_noise=RoundKeys.coupled_gumbel,
    supports=frozenset(Candidates),
    needs_evidence=True,
  )


def _acceptable(proposal, logits, top, gap):
  """Returns bool[B, N]: is each node among its parent's best and close enough to the very best?"""
  parents = jnp.maximum(proposal.parents, 0)
  own = logit_of(logits, proposal.tokens, parents)
  best = jnp.take_along_axis(logits.max(-1), parents, axis=1)

  def rank(node):
    law = jnp.take_along_axis(logits, parents[:, node, None, None], axis=1)[:, 0]
    return (law > own[:, node, None]).sum(-1)

  better = jax.lax.map(rank, jnp.arange(own.shape[1])).T
  return (better < per_row(top, better)) & (best - own <= per_row(gap, own))

"""Trusting verification: emit what the drafter vouches for, verify the rest.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import children_of
from decodax.trees import walk
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier


def verify_trusting(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path of drafts that are trusted or that plain sampling would draw.

  Where a node has a trusted child, that child (the first of several) is emitted. Elsewhere the
  token is plain sampling's, drafted or not, as in `coupled`.

  Lossy (a trusted draft is emitted whatever the target says of it). Without trusted drafts:
  lossless (token-identical).

  Source: emission of unverified spans in Lexical Unit Decoding, arXiv:2405.15208, and of unsettled
  iterates in CEED-VLA, arXiv:2506.13725.
  """

  def choose(node, depth):
    logits = jnp.take_along_axis(target_logits, node[:, None, None], axis=1)[:, 0]
    drawn = keys.pick_coupled(logits, depth + 1)
    if proposal.trusted is None:
      return drawn
    trusted = children_of(proposal, node) & proposal.trusted
    child = jnp.argmax(trusted, axis=-1)
    token = jnp.take_along_axis(proposal.tokens, child[:, None], axis=1)[:, 0]
    return jnp.where(trusted.any(-1), token, drawn)

  return walk(choose, proposal, max_depth)


trusting = Verifier(
  name='trusting',
  exactness='lossy: drafts that the drafter trusts are emitted unverified',
  verify=verify_trusting,
  draft_noise=RoundKeys.coupled_gumbel,
  supports=frozenset(Candidates),
)

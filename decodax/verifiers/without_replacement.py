"""Recursive rejection sampling: try drafts that were drawn without replacement, in their order.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax

from decodax.noise import RoundKeys
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.siblings import IN_TURN
from decodax.verifiers.siblings import residual_rule
from decodax.verifiers.siblings import walk_siblings


def verify_without_replacement(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path of accepted children and a token from what is left of the last node's law.

  A child x is accepted with probability min(1, P(x) / Q(x)); a refusal turns P, at first p, into
  norm(max(P - Q, 0)), and then takes x out of Q, at first q. A child that repeats a sibling, or
  that q cannot have given, is passed over.

  Lossless (law-identical): the output has the target's law if the children of a node were drawn
  one after another, without replacement, from its law in `proposal.laws`, f[B, N, V] logits, and
  stand in that order. Independent draws will do, as repeated ones are passed over. Whether a node
  exists may depend on all that was drawn before it, in other branches too, but not on its own
  token.

  Source: Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without
  Replacement, arXiv:2402.14160, recursive rejection sampling; Sequoia: Scalable, Robust, and
  Hardware-aware Speculative Decoding, arXiv:2402.12374, sampling without replacement.
  """
  rule = residual_rule(proposal, target_logits, own_laws=False, replacement=False)
  return walk_siblings(rule, keys, proposal, max_depth=max_depth)


without_replacement = Verifier(
  name='without_replacement',
  exactness='law-identical',
  verify=verify_without_replacement,
  draft_noise=RoundKeys.draft_gumbel,
  supports=IN_TURN,
  needs_laws=True,
)

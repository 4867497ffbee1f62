"""Multi-step speculative sampling: try independent drafts in turn, each against what is left of p.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.siblings import residual_rule
from decodax.verifiers.siblings import walk_siblings


def verify_specinfer(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path of accepted children and a token from what is left of the last node's law.

  A child x is accepted with probability min(1, P(x) / q(x)); a refusal turns P, at first p, into
  norm(max(P - q, 0)). A token that was refused once has P = 0, so repeated drafts are wasted.

  Lossless (law-identical): the output has the target's law if all children of a node were drawn
  independently from its law in `proposal.laws`, f[B, N, V] logits.

  Source: SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based
  Speculative Inference and Verification, arXiv:2305.09781, multi-step speculative sampling.
  """
  rule = residual_rule(proposal, target_logits, own_laws=False, replacement=True)
  return walk_siblings(rule, keys, proposal, max_depth=max_depth)


def verify_specinfer_drafters(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns what `verify_specinfer` does, for children that each have a law of their own.

  Lossless (law-identical): the output has the target's law if every node i was drawn from
  `proposal.laws[b, i]`, independently of its siblings. Siblings may come in any order, a random
  one too, that does not depend on their tokens.

  Source: SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based
  Speculative Inference and Verification, arXiv:2305.09781, multi-step speculative sampling.
  """
  rule = residual_rule(proposal, target_logits, own_laws=True, replacement=True)
  return walk_siblings(rule, keys, proposal, max_depth=max_depth)


specinfer = Verifier(
  name='specinfer',
  exactness='law-identical',
  verify=verify_specinfer,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SAMPLED, Candidates.IID}),
  needs_laws=True,
)

specinfer_drafters = Verifier(
  name='specinfer_drafters',
  exactness='law-identical',
  verify=verify_specinfer_drafters,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SEVERAL_DRAFTERS}),
  needs_laws=True,
)

"""Greedy verification: a draft is accepted where it is the target's argmax.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax

from decodax import sampling
from decodax.noise import RoundKeys
from decodax.trees import follow
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier


def verify_greedy(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the longest path of argmax tokens, and the argmax that ends it.

  Lossless (token-identical): the output is that of plain greedy decoding for any proposal,
  provided that a forward pass over N tokens has the same argmax as one over a single token. Ties
  go to the lowest id.

  Source: Blockwise Parallel Decoding, arXiv:1811.03115, section 3; trees: SpecInfer,
  arXiv:2305.09781.
  """
  del keys
  return follow(sampling.argmax(target_logits), proposal, max_depth)


greedy = Verifier(
  name='greedy',
  exactness='token-identical',
  verify=verify_greedy,
  draft_noise=RoundKeys.coupled_gumbel,
  supports=frozenset(Candidates),
)

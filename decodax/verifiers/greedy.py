"""Greedy verification: a draft is accepted where it is the target's argmax.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax import sampling
from decodax.noise import RoundKeys
from decodax.trees import walk
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

  def choose(node, depth):  # only nodes that are reached are read
    del depth
    logits = jnp.take_along_axis(target_logits, node[:, None, None], axis=1)[:, 0]
    return sampling.argmax(logits)

  return walk(choose, proposal, max_depth)


greedy = Verifier(
  name='greedy',
  exactness='token-identical',
  verify=verify_greedy,
  draft_noise=RoundKeys.coupled_gumbel,
  supports=frozenset(Candidates),
)

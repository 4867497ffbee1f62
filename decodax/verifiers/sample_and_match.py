"""Sample and match: draw every token from the target, and keep the drafts that match.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax

from decodax.noise import RoundKeys
from decodax.trees import walk
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import law_at


def verify_sample_and_match(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path along which each draft equals a token freshly drawn from the target.

  Lossless (law-identical): what is emitted are the target's own draws, whatever was drafted. A
  draft is accepted with probability p(draft), so sum_v p(v) q(v) for one that was drawn from q:
  with q known, a rule that uses it accepts more. `coupled` is the same rule with noise keyed by
  position, for outputs that do not depend on the drafter at all.

  Source: SpecInfer, arXiv:2305.09781, naive sampling; REST, arXiv:2311.08252, section 3.3.
  """

  def choose(node, depth):
    return keys.pick(law_at(target_logits, node), depth + 1)

  return walk(choose, proposal, max_depth)


sample_and_match = Verifier(
  name='sample_and_match',
  exactness='law-identical',
  verify=verify_sample_and_match,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset(Candidates),
)

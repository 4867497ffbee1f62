"""Coupled verification: sample every token as plain sampling would, and keep the drafts that match.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import walk
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier


def verify_coupled(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path along which each draft equals the token that plain sampling draws.

  The token after position t is `argmax(log p + g_t)` with Gumbel noise g_t keyed by the row and by
  t alone, and it is what is emitted, drafted or not.

  Lossless (token-identical): with the same keys the output is that of plain sampling, whatever the
  drafter. A draft is accepted with probability p(draft) if it does not depend on g_t; a drafter
  that samples from q with the same g_t is accepted with probability
  `sum_v 1 / sum_w max(p_w / p_v, q_w / q_v)`, at least (1 - TV) / (1 + TV).

  Source: Coupling without Communication and Drafter-Invariant Speculative Decoding,
  arXiv:2408.07978; deterministic trees as in SpecInfer, arXiv:2305.09781.
  """

  def choose(node, depth):
    logits = jnp.take_along_axis(target_logits, node[:, None, None], axis=1)[:, 0]
    return keys.pick_coupled(logits, depth + 1)

  return walk(choose, proposal, max_depth)


coupled = Verifier(
  name='coupled',
  exactness='token-identical',
  verify=verify_coupled,
  draft_noise=RoundKeys.coupled_gumbel,
  supports=frozenset(Candidates),
)

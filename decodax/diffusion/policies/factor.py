"""Fill as many slots as their certainty allows: the more slots, the surer each must be.

Axes: `B` batch, `W` window slots.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import by_rank
from decodax.diffusion.scores import longest_prefix
from decodax.diffusion.scores import ranks
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def factor(f: float | jax.Array = 1.0) -> Policy:
  """Returns the policy that fills the n surest slots, for the largest n with (n + 1)(1 - p_n) < f.

  p_n is the n-th largest confidence. With f = 1 the most probable tokens of the slots taken apart
  are the most probable ones taken together, whatever the joint law.

  Lossy (at f <= 1 the greedy choice is the joint one, but the network is asked less often than
  after every token). At f = 0 it fills one slot per step.

  Args:
    f: f[] or f[B]; may be traced.

  Raises:
    ValueError: if f < 0.

  Source: Fast-dLLM, arXiv:2505.22618, theorem 1 and section 3.3.
  """
  check_knob('f', f, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    del params
    rank = ranks(view.confidence, view.eligible)
    sure = by_rank(view.confidence, rank)
    number = jnp.arange(1, sure.shape[1] + 1, dtype=sure.dtype)[None]
    ok = ((number + 1) * (1 - sure) < per_row(f, sure)) & by_rank(view.eligible, rank)
    return Selection(view.eligible & (rank < longest_prefix(ok)[:, None]), state)

  return Policy('factor', 'lossy: asks the network less often', no_state, select)

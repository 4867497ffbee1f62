"""Fill every slot the network is sure enough of.

Axes: `B` batch, `W` window slots.
"""

import jax

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def threshold(tau: float | jax.Array = 0.9) -> Policy:
  """Returns the policy that fills the slots whose candidate has probability at least `tau`.

  Lossy (slots filled together are taken as independent). Above 1 it fills one slot per step.

  Args:
    tau: f[] or f[B], a probability; may be traced.

  Raises:
    ValueError: if tau < 0.

  Source: Fast-dLLM, arXiv:2505.22618, section 3.3.
  """
  check_knob('tau', tau, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    del params
    return Selection(view.confidence >= per_row(tau, view.confidence), state)

  return Policy('threshold', 'lossy: slots filled together count as independent', no_state, select)


def entropy_threshold(bound: float | jax.Array = 0.5) -> Policy:
  """Returns the policy that fills the slots whose entropy is at most `bound` nats.

  Lossy, as `threshold`. Below 0 it fills one slot per step.

  Source: dParallel, arXiv:2509.26488 (its decoding rule); arXiv:2510.19990.
  """

  def select(params, state, view: View) -> Selection:
    del params
    return Selection(view.summary.entropy <= per_row(bound, view.confidence), state)

  return Policy(
    'entropy-threshold', 'lossy: slots filled together count as independent', no_state, select
  )

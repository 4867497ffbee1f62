"""Fill mediocre slots next to very sure ones.

Axes: `B` batch, `W` window slots.
"""

import jax
from jax import lax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def local_leap(
  kappa: float | jax.Array = 0.9, relaxed: float | jax.Array = 0.75, radius: int = 4
) -> Policy:
  """Returns the policy that asks for `kappa`, and only for `relaxed` near a slot that has it.

  Near is at most `radius` slots away. Only masked slots make others easier, not filled ones.

  Lossy, as `threshold`, which it is with radius 0 or relaxed = kappa.

  Args:
    kappa: f[] or f[B], a probability; may be traced.
    relaxed: f[] or f[B], a probability; may be traced.
    radius: in slots.

  Raises:
    ValueError: if a knob is negative.

  Source: LocalLeap, arXiv:2510.07081, section 4.
  """
  check_knob('kappa', kappa, 0, float('inf'))
  check_knob('relaxed', relaxed, 0, float('inf'))
  check_knob('radius', radius, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    del params
    sure = per_row(kappa, view.confidence)
    anchors = (view.eligible & (view.confidence >= sure)).astype(jnp.int32)
    span = 2 * radius + 1
    near = lax.reduce_window(anchors, 0, lax.max, (1, span), (1, 1), 'SAME') > 0
    wanted = jnp.where(near, jnp.minimum(per_row(relaxed, view.confidence), sure), sure)
    return Selection(view.confidence >= wanted, state)

  return Policy('local-leap', 'lossy: slots filled together count as independent', no_state, select)

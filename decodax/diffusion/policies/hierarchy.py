"""Fill the best slot of every masked run, so that what is filled together lies apart.

Axes: `B` batch, `W` window slots.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def hierarchy(tau: float | jax.Array = 0.9, low: float | jax.Array = 0.4) -> Policy:
  """Returns the policy that fills slots above `tau`, and in each masked run its best above `low`.

  Lossy, as `threshold`, which it is with low above 1.

  Args:
    tau: f[] or f[B], a probability; may be traced.
    low: f[] or f[B], a probability; may be traced.

  Raises:
    ValueError: if a knob is negative.

  Source: hierarchical decoding in dInfer, arXiv:2510.08666.
  """
  check_knob('tau', tau, 0, float('inf'))
  check_knob('low', low, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    del params
    confidence = jnp.where(view.eligible, view.confidence, -1)
    starts = view.eligible & ~jnp.pad(view.eligible[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(starts, axis=1)
    same = (run[:, :, None] == run[:, None, :]) & view.eligible[:, None, :]
    index = jnp.arange(run.shape[1])
    mine, other = confidence[:, :, None], confidence[:, None, :]
    earlier = (index[None, :] < index[:, None])[None]
    beaten = jnp.any(same & ((other > mine) | ((other == mine) & earlier)), axis=-1)
    best = ~beaten & (confidence > per_row(low, confidence))
    return Selection((confidence >= per_row(tau, confidence)) | best, state)

  return Policy('hierarchy', 'lossy: slots filled together count as independent', no_state, select)

"""Dimple's confident decoding: a threshold, and a schedule where nothing reaches it.

Axes: `B` batch, `W` window slots.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import score_fn
from decodax.diffusion.scores import top
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def dimple(
  num_steps: int, tau: float | jax.Array = 0.95, score: str = 'confidence', *, eps: float = 1e-3
) -> Policy:
  """Returns the policy that fills slots above `tau`, and else what the schedule owes.

  Where no slot passes, let r be the share of the block that is masked: at the first time s of the
  grid below r, and not before the next step, with floor(m (1 - s / r)) >= 1, that many of the m
  masks are filled by score. The last step fills all.

  Lossy, as `threshold`; above 1 it is a static sampler.

  Args:
    num_steps: steps per block at most.
    tau: f[] or f[B], a probability; may be traced.
    score: order where nothing passes, see `decodax.diffusion.scores.SCORES`.
    eps: where time ends.

  Raises:
    ValueError: if num_steps < 1, tau < 0, or there is no such score.

  Source: Dimple, arXiv:2505.16990, section 4.1, and its released sampler.
  """
  if num_steps < 1:
    raise ValueError(f'a block takes at least one step: {num_steps=}')
  check_knob('tau', tau, 0, float('inf'))
  score_of = score_fn(score)
  times = jnp.linspace(1, eps, num_steps + 1)

  def select(params, state, view: View) -> Selection:
    del params
    sure = view.eligible & (view.confidence > per_row(tau, view.confidence))
    masks = view.eligible.sum(-1)
    left = masks / jnp.maximum(view.num_masks, 1)  # f32[B]
    owed = jnp.floor(masks[:, None] * (1 - times[None] / jnp.maximum(left, eps)[:, None]))
    index = jnp.arange(num_steps + 1)[None]
    later = (times[None] < left[:, None]) & (index > view.step[:, None]) & (owed >= 1)
    first = jnp.argmax(later, axis=1)
    count = jnp.take_along_axis(owed, first[:, None], axis=1)[:, 0].astype(jnp.int32)
    count = jnp.where(later.any(-1), count, masks)
    count = jnp.where(view.step + 1 >= num_steps, masks, jnp.maximum(count, 1))
    scheduled = top(score_of(view), view.eligible, count)
    last = (view.step + 1 >= num_steps)[:, None]
    return Selection(jnp.where(sure.any(-1, keepdims=True) & ~last, sure, scheduled), state)

  return Policy(
    'dimple',
    'lossy: slots filled together count as independent',
    no_state,
    select,
    max_steps=lambda width: num_steps,
  )

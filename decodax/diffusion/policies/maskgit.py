"""MaskGIT's sampler: a cosine schedule, and an order that starts noisy and ends certain.

Axes: `B` batch, `W` window slots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from decodax.diffusion.keys import Purpose
from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import top
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
  'cosine': lambda ratio: jnp.cos(jnp.pi / 2 * ratio),
  'linear': lambda ratio: 1 - ratio,
  'square': lambda ratio: 1 - ratio**2,
  'cubic': lambda ratio: 1 - ratio**3,
}
"""name -> (share of the steps done) -> share of the slots that stay masked."""


def maskgit(
  num_steps: int, *, schedule: str = 'cosine', choice_temperature: float | jax.Array = 0.0
) -> Policy:
  """Returns the sampler whose step i leaves floor(m schedule((i + 1) / num_steps)) of m masks.

  At least one mask stays in every step but the last, and at least one slot is filled. The order is
  that of log p + choice_temperature (1 - ratio) Gumbel noise, p being the candidate's probability.

  Args:
    num_steps: steps per block.
    schedule: a name in `SCHEDULES`.
    choice_temperature: f[] or f[B]; may be traced.

  Raises:
    ValueError: if num_steps < 1, there is no such schedule, or choice_temperature < 0.

  Source: MaskGIT, arXiv:2202.04200, section 3.2, and its released sampler.
  """
  if num_steps < 1:
    raise ValueError(f'a block takes at least one step: {num_steps=}')
  if schedule not in SCHEDULES:
    raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)}: {schedule!r}')
  check_knob('choice_temperature', choice_temperature, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    del params
    ratio = jnp.minimum((view.step + 1) / num_steps, 1.0)
    share = jnp.maximum(SCHEDULES[schedule](ratio), 1e-6)
    masks = view.eligible.sum(-1)
    stay = jnp.floor(view.num_masks * share).astype(jnp.int32)
    stay = jnp.where(view.step + 1 >= num_steps, 0, jnp.clip(stay, 1, jnp.maximum(masks - 1, 1)))
    noise = view.keys.gumbel(view.tokens.shape[1:], Purpose.ORDER)
    heat = per_row(choice_temperature, noise) * (1 - ratio)[:, None]
    score = jnp.log(view.confidence) + heat * noise
    return Selection(top(score, view.eligible, masks - stay), state)

  return Policy(
    f'maskgit-{schedule}',
    'the static sampler itself',
    no_state,
    select,
    max_steps=lambda width: num_steps,
    guarded=False,
  )

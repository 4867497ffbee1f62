"""Draft wide, keep narrow: fill boldly, and take back what a second look finds doubtful.

Axes: `B` batch, `W` window slots.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.scores import or_best
from decodax.diffusion.scores import probability_of
from decodax.diffusion.scores import summarize
from decodax.diffusion.scores import top
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def wino(
  draft: float | jax.Array = 0.6,
  verify: float | jax.Array = 0.9,
  *,
  fewest: int = 5,
  most: int = 20,
) -> Policy:
  """Returns the policy that fills above `draft` and reopens below `verify`.

  Each forward runs a shadow of the window beside it: masks that see everything but the slot they
  stand for. What a shadow gives to the token in its slot is the second opinion on it. A step that
  fills a single slot reopens none, and a step reopens fewer slots than the one before filled, so
  the block gets filled. At most 0.7 of the masks, held within `fewest` and `most`, are filled.

  Lossy (what is kept passed a threshold, not the law). A block takes at most twice its slots in
  forwards; then what is left is filled as it is.

  Args:
    draft: f[] or f[B], a probability; may be traced.
    verify: f[] or f[B], a probability; may be traced. At 0 nothing is reopened.
    fewest: slots that may always be filled together.
    most: slots that are filled together at most.

  Raises:
    ValueError: if a knob is negative, or not 1 <= fewest <= most.

  Source: WINO, arXiv:2507.18578, section 3.
  """
  check_knob('draft', draft, 0, float('inf'))
  check_knob('verify', verify, 0, float('inf'))
  if not 1 <= fewest <= most:
    raise ValueError(f'need 1 <= fewest <= most: {fewest=}, {most=}')

  def init(batch_size, width, vocab_size):
    del width, vocab_size
    return jnp.full((batch_size,), 30, jnp.int32)  # how many the step before filled

  def select(params, state, view: View) -> Selection:
    del params
    assert view.shadow is not None
    cap = jnp.clip((0.7 * view.eligible.sum(-1)).astype(jnp.int32), fewest, most)
    sure = view.eligible & (view.confidence > per_row(draft, view.confidence))
    fill = or_best(top(view.confidence, sure, cap), view.confidence, view.eligible)
    num_filled = fill.sum(-1, dtype=jnp.int32)
    opinion = probability_of(view.shadow, summarize(view.shadow), view.tokens)
    doubtful = view.editable & (opinion < per_row(verify, opinion))
    reopen = top(-opinion, doubtful, jnp.maximum(state - 1, 0))
    reopen = reopen & (num_filled > 1)[:, None]
    return Selection(fill, num_filled, revoke=reopen)

  return Policy(
    'wino',
    'lossy: what is kept passed a threshold',
    init,
    select,
    max_steps=lambda width: 2 * width,
    revokes=True,
    wants_shadow=True,
  )

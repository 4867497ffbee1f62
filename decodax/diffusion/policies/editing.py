"""Token editing: fill boldly, and overwrite what the network no longer believes.

Axes: `B` batch, `W` window slots.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.scores import or_best
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def editing(
  fill: float | jax.Array = 0.7, edit: float | jax.Array = 0.5, *, max_post_steps: int = 16
) -> Policy:
  """Returns the policy that fills masks above `fill` and replaces tokens by others above `edit`.

  Nothing goes back to MASK. A block is left once it is full and a forward changes nothing, or
  `max_post_steps` forwards after it got full.

  Lossy (tokens are overwritten, not drawn). With edit >= 1 it is `threshold`.

  Args:
    fill: f[] or f[B], a probability; may be traced.
    edit: f[] or f[B], a probability; may be traced.
    max_post_steps: forwards that a full block may still be edited for.

  Raises:
    ValueError: if a knob is negative.

  Source: LLaDA2.1, arXiv:2602.08676.
  """
  check_knob('fill', fill, 0, float('inf'))
  check_knob('edit', edit, 0, float('inf'))
  check_knob('max_post_steps', max_post_steps, 0, float('inf'))

  def init(batch_size, width, vocab_size):
    del width, vocab_size
    return jnp.zeros((batch_size,), jnp.int32)  # forwards since the block got full

  def select(params, state, view: View) -> Selection:
    del params
    sure = view.confidence >= per_row(fill, view.confidence)
    filled = or_best(sure, view.confidence, view.eligible)
    changed = view.candidates != view.tokens
    edits = view.editable & changed & (view.confidence > per_row(edit, view.confidence))
    was_full = ~view.eligible.any(-1)
    post = state + was_full
    some = jnp.any(edits, axis=-1)
    quiet = was_full & ~some
    off = jnp.broadcast_to(jnp.asarray(edit) >= 1, some.shape)
    hold = ~off & ~quiet & (post < max_post_steps)
    return Selection(filled | edits, post, hold=hold)

  return Policy(
    'editing',
    'lossy: tokens are overwritten',
    init,
    select,
    max_steps=lambda width: width + max_post_steps,
    revokes=True,
  )

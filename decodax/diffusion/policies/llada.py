"""LLaDA's sampler: a fixed number of slots in every step, the surest (or random ones) first.

Axes: `B` batch, `W` window slots.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import score_fn
from decodax.diffusion.scores import top
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View


def llada(
  num_steps: int | jax.Array, score: str = 'confidence', *, late_ids: Sequence[int] = ()
) -> Policy:
  """Returns the sampler that fills a block in `num_steps` steps, as evenly as it goes.

  Of m masks at a block's start, step i fills m // num_steps slots, one more in the first
  m % num_steps steps: those with the largest score. What is filled stays.

  With as many steps as slots it fills one slot per step: the reference for the others. With
  score='left_to_right' that is greedy decoding of the network, token by token.

  Args:
    num_steps: steps per block, i32[]; may be traced. More steps than slots are as many as slots.
    score: name of a score, see `decodax.diffusion.scores.SCORES`.
    late_ids: tokens that are filled in only when nothing else is left, such as the end of text: a
      canvas decoded in one block is else ended early.

  Raises:
    ValueError: if num_steps < 1, or there is no such score.

  Source: LLaDA, arXiv:2502.09992, algorithms 4 and 5.
  """
  if isinstance(num_steps, int) and num_steps < 1:
    raise ValueError(f'a block takes at least one step: {num_steps=}')
  score_of = score_fn(score)

  def select(params, state, view: View) -> Selection:
    del params
    value = score_of(view)
    if len(late_ids):
      late = jnp.isin(view.candidates, jnp.asarray(late_ids, jnp.int32))
      value = jnp.where(late, -jnp.inf, value)
    count = num_to_fill(view.num_masks, jnp.minimum(num_steps, view.num_masks), view.step)
    return Selection(top(value, view.eligible, count), state)

  return Policy(f'llada-{score}', 'the static sampler itself', no_state, select)


def num_to_fill(num_masks: jax.Array, num_steps: jax.Array, step: jax.Array) -> jax.Array:
  """Returns i32[B], how many of num_masks i32[B] slots step i32[B] of num_steps fills."""
  num_steps = jnp.maximum(num_steps, 1)
  return num_masks // num_steps + (step < num_masks % num_steps)

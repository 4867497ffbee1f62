"""D2F: several blocks in flight, a later one started before the earlier one is done.

Axes: `B` batch, `W` window slots, `K` small blocks of a window.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def pipelined(
  size: int,
  tau: float | jax.Array = 0.9,
  *,
  start_at: float | jax.Array = 0.1,
  press_at: float | jax.Array = 0.95,
) -> Policy:
  """Returns D2F's pipeline: the window's blocks of `size` slots are worked on side by side.

  A block is started once `start_at` of the block before it is filled, and every block before that
  one has been started. Started blocks fill the slots whose confidence is at least `tau`. Once
  `press_at` of the block before it is filled, a block must fill its surest slot in every step, as
  the first block must; until then it may fill none. The window is the loop's block: choose
  `fixed_blocks(K * size)`.

  Lossy, as `threshold` in blocks of `size`, which it is for a network in which every token sees
  every other, with start_at = press_at = 1.

  Args:
    size: slots of a block.
    tau: f[] or f[B], a probability; may be traced.
    start_at: f[] or f[B], a share in 0..1; may be traced.
    press_at: f[] or f[B], a share in 0..1; may be traced.

  Raises:
    ValueError: if size < 1, tau < 0, or a share is outside of 0..1.

  Source: Discrete Diffusion Forcing, arXiv:2508.09192, section 4.3.
  """
  if size < 1:
    raise ValueError(f'a block needs at least one slot: {size=}')
  check_knob('tau', tau, 0, float('inf'))
  check_knob('start_at', start_at, 0, 1)
  check_knob('press_at', press_at, 0, 1)

  def select(params, state, view: View) -> Selection:
    del params
    filled = _filled(view.eligible, size)
    before = jnp.pad(filled[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
    started = jnp.cumprod(before >= per_row(start_at, before), axis=1, dtype=jnp.int32) > 0
    pressed = started & (before >= per_row(press_at, before))
    open_slots = view.eligible & _of_slots(started, size, view)
    sure = open_slots & (view.confidence >= per_row(tau, view.confidence))
    surest = open_slots & _of_slots(pressed, size, view) & _is_best(view, size)
    none = ~_of_slots(_blocks(sure, size).any(-1), size, view)
    return Selection(sure | (surest & none), state)

  return Policy('pipelined', 'lossy: slots filled together count as independent', no_state, select)


def _blocks(slots: jax.Array, size: int, fill: bool | float = False) -> jax.Array:
  """Returns [B, K, size] of slots [B, W]; the last block is filled up with `fill`."""
  rest = -slots.shape[1] % size
  slots = jnp.pad(slots, ((0, 0), (0, rest)), constant_values=fill)
  return slots.reshape(slots.shape[0], -1, size)


def _filled(eligible: jax.Array, size: int) -> jax.Array:
  """Returns f32[B, K], which share of each block's slots has nothing left to fill."""
  return 1 - _blocks(eligible, size).mean(-1)


def _of_slots(blocks: jax.Array, size: int, view: View) -> jax.Array:
  """Returns [B, W], for each slot the value of its block in blocks [B, K]."""
  return jnp.repeat(blocks, size, axis=1)[:, : view.tokens.shape[1]]


def _is_best(view: View, size: int) -> jax.Array:
  """Returns bool[B, W], the surest slot of each block that is left to fill, the first of equals."""
  score = _blocks(jnp.where(view.eligible, view.confidence, -1.0), size, -1.0)
  best = jnp.arange(size)[None, None] == jnp.argmax(score, axis=-1)[:, :, None]
  return best.reshape(best.shape[0], -1)[:, : view.tokens.shape[1]]

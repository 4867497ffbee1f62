"""Fill the slots that are sure and whose laws have stopped moving.

Axes: `B` batch, `W` window slots, `V` vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row

_TINY = 1e-12  # inside the logarithms, as probabilities may be 0


class _History(NamedTuple):
  laws: jax.Array  # f32[B, W, V] the previous step's; all zeros at a block's start
  moved: jax.Array  # f32[B, W, n] the last n divergences


def klass(
  tau: float | jax.Array = 0.9, max_kl: float | jax.Array = 0.01, *, history: int = 2
) -> Policy:
  """Returns the policy that fills slots above `tau` whose last `history` steps moved little.

  A step moved a slot by KL(law now || law before), in nats; all of the last `history` must be below
  `max_kl`. The first step of a block has nothing to compare with and moves everything.

  Lossy, as `threshold`, which it is with an infinite max_kl. Its state is one float per slot and
  token of the vocabulary.

  Args:
    tau: f[] or f[B], a probability; may be traced.
    max_kl: f[] or f[B], nats; may be traced.
    history: how many steps must have been quiet.

  Raises:
    ValueError: if a knob is negative, or history < 1.

  Source: KLASS, arXiv:2511.05664, algorithm 1.
  """
  check_knob('tau', tau, 0, float('inf'))
  check_knob('max_kl', max_kl, 0, float('inf'))
  if history < 1:
    raise ValueError(f'history must be at least 1: {history=}')

  def init(batch_size, width, vocab_size):
    return _History(
      laws=jnp.zeros((batch_size, width, vocab_size), jnp.float32),
      moved=jnp.full((batch_size, width, history), 1e30, jnp.float32),
    )

  def select(params, state: _History, view: View) -> Selection:
    del params
    laws = jnp.exp(view.logits - view.summary.log_normalizer[:, :, None])
    moved = jnp.sum(laws * (jnp.log(laws + _TINY) - jnp.log(state.laws + _TINY)), axis=-1)
    moved = jnp.concatenate([state.moved[:, :, 1:], moved[:, :, None]], axis=-1)
    quiet = jnp.all(moved < per_row(max_kl, moved), axis=-1)
    sure = view.confidence >= per_row(tau, view.confidence)
    return Selection(quiet & sure, _History(laws, moved))

  return Policy('klass', 'lossy: slots filled together count as independent', init, select)

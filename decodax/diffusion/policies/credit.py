"""Let a token that has been the best guess for several steps pass the bar earlier.

Axes: `B` batch, `W` window slots, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.scores import summarize
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def credit(
  tau: float | jax.Array = 0.9,
  *,
  fusion: float | jax.Array = 0.7,
  exponent: float | jax.Array = 0.2,
  decay: float | jax.Array = 0.8,
) -> Policy:
  """Returns the threshold policy on logits raised by fusion * log(1 + credit of the token).

  In every step of a block a slot's credits shrink by `decay`, and its best token earns
  p ** exponent, before the threshold is asked. Tokens are the best ones of the raised logits.

  Lossy, as `threshold`, which it is with fusion = 0 at temperature 0. Its state is one float per
  slot and token of the vocabulary.

  Args:
    tau: f[] or f[B], a probability; may be traced.
    fusion: f[] or f[B], weight of the credit in the logits; may be traced.
    exponent: f[] or f[B], below 1 it favours unsure tokens; may be traced.
    decay: f[] or f[B]; may be traced.

  Raises:
    ValueError: if tau, fusion or exponent is negative, or decay is not in [0, 1].

  Source: CreditDecoding, arXiv:2510.06133, section 3; defaults from its released engine.
  """
  check_knob('tau', tau, 0, float('inf'))
  check_knob('fusion', fusion, 0, float('inf'))
  check_knob('exponent', exponent, 0, float('inf'))
  check_knob('decay', decay, 0, 1)

  def init(batch_size, width, vocab_size):
    return jnp.zeros((batch_size, width, vocab_size), jnp.float32)

  def select(params, state, view: View) -> Selection:
    del params
    earned = view.summary.top ** per_row(exponent, view.summary.top)
    is_best = jnp.arange(state.shape[-1])[None, None] == view.summary.best[:, :, None]
    gain = jnp.where(is_best & view.eligible[:, :, None], earned[:, :, None], 0)
    state = state * per_row(decay, state) + gain
    fused = summarize(view.logits + per_row(fusion, state) * jnp.log1p(state))
    tokens = jnp.where(fused.best == view.summary.best, view.candidates, fused.best)
    passes = fused.top >= per_row(tau, fused.top)
    best = jnp.argmax(jnp.where(view.eligible, fused.top, -1), axis=-1)
    surest = jnp.arange(passes.shape[1])[None] == best[:, None]
    return Selection((passes | surest) & view.eligible, state, tokens=tokens)

  return Policy('credit', 'lossy: slots filled together count as independent', init, select)

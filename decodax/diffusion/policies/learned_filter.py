"""Learn2PD: a small network says which predictions are already final.

Axes: `B` batch, `W` window slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import or_best
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


class Filter(NamedTuple):
  """A network with one hidden layer over the confidences of a window of W slots."""

  inner: jax.Array  # f32[W, W]
  inner_bias: jax.Array  # f32[W]
  outer: jax.Array  # f32[W, W]
  outer_bias: jax.Array  # f32[W]


def init_filter(key: jax.Array, width: int) -> Filter:
  """Returns a random filter for windows of `width` slots: 2 W (W + 1) parameters."""
  keys = jax.random.split(key)
  inner, outer = (jax.random.normal(k, (width, width)) / width**0.5 for k in keys)
  return Filter(inner, jnp.zeros(width), outer, jnp.zeros(width))


def filter_logits(params: Filter, confidence: jax.Array) -> jax.Array:
  """Returns f32[B, W], the logit that each slot's prediction is final."""
  hidden = jax.nn.relu(confidence @ params.inner + params.inner_bias[None])
  return hidden @ params.outer + params.outer_bias[None]


class Observed(NamedTuple):
  """What an oracle saw and did in its last step."""

  confidence: jax.Array  # f32[B, W]
  right: jax.Array  # bool[B, W] is the candidate the final token?
  eligible: jax.Array  # bool[B, W]


def oracle() -> Policy:
  """Returns the policy that fills exactly the slots whose candidate is already the final token.

  `Params.policy` is the final sequence, i32[B, L]. Where no candidate is right, the most confident
  slot is filled with its final token. It cannot be used without knowing the answer: it is the bound
  that learned filters strive for, and what they are trained on. Its state tells what it saw.

  Reproduces the final sequence.

  Source: Learn2PD, arXiv:2509.25188, section 3 (extremely greedy parallel decoding).
  """

  def init(batch_size, width, vocab_size):
    del vocab_size
    none = jnp.zeros((batch_size, width), bool)
    return Observed(jnp.zeros((batch_size, width)), none, none)

  def select(params, state, view: View) -> Selection:
    del state
    last = params.shape[1] - 1
    final = jnp.take_along_axis(params, jnp.minimum(view.positions, last), axis=1)
    right = view.candidates == final
    seen = Observed(view.confidence, right, view.eligible)
    commit = or_best(right & view.eligible, view.confidence, view.eligible)
    return Selection(commit, seen, tokens=final)

  return Policy('oracle', 'reproduces the final sequence', init, select)


def learned_filter(tau: float | jax.Array = 0.96) -> Policy:
  """Returns the policy that fills the slots a `Filter` holds for final with at least `tau`.

  The filter is `Params.policy`. It sees the confidence of every slot of the window, filled ones
  too, and is bound to the width it was trained at.

  Lossy (the filter may err). It fills at least one slot per step.

  Args:
    tau: f[] or f[B], a probability; may be traced.

  Raises:
    ValueError: if tau < 0, or when it is used, if the filter is for another width.

  Source: Learn2PD, arXiv:2509.25188, section 3.
  """
  check_knob('tau', tau, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    width = view.tokens.shape[1]
    if not isinstance(params, Filter) or params.inner.shape != (width, width):
      raise ValueError(
        f'learned_filter needs a Filter of width {width} in Params.policy: it is bound to the '
        f'blocks it was trained in'
      )
    chance = jax.nn.sigmoid(filter_logits(params, view.confidence))
    final = view.eligible & (chance >= per_row(tau, chance))
    return Selection(or_best(final, view.confidence, view.eligible), state)

  return Policy('learned-filter', 'lossy: the filter may err', no_state, select)

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

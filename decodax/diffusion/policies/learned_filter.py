"""Learn2PD: a small network says which predictions are already final.

Axes: `B` batch, `W` window slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.diffusion.policies.pair_filter import PairFilter
from decodax.diffusion.policies.pair_filter import gather_evidence
from decodax.diffusion.policies.pair_filter import pair_filter_logits
from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import by_rank
from decodax.diffusion.scores import longest_prefix
from decodax.diffusion.scores import or_best
from decodax.diffusion.scores import ranks
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


def learned_filter(tau: float | jax.Array = 0.96, *, joint: bool = False) -> Policy:
  """Returns the policy that fills the slots a filter holds for final with at least `tau`.

  The filter is `Params.policy`: a `Filter`, as published, sees the confidence of every slot of the
  window, filled ones too, and is bound to the width it was trained at. A `PairFilter`, which is
  ours, sees in addition what every two slots make of each other's tokens, at any width.

  Lossy (the filter may err). It fills at least one slot per step.

  Args:
    tau: f[] or f[B], a probability; may be traced.
    joint: fill the surest slots by the filter as long as the product of their probabilities is at
      least `tau`, in place of all whose own one is. Then `tau` bounds the risk of a step, however
      many slots it fills. This is ours.

  Raises:
    ValueError: if tau < 0, or when it is used, if there is no filter or one for another width.

  Source: Learn2PD, arXiv:2509.25188, section 3, without pairs and `joint`.
  """
  check_knob('tau', tau, 0, float('inf'))

  def select(params, state, view: View) -> Selection:
    chance = jax.nn.sigmoid(_logits_of(params, view))
    if joint:
      rank = ranks(chance, view.eligible)
      together = jnp.cumprod(jnp.where(by_rank(view.eligible, rank), by_rank(chance, rank), 0), 1)
      count = longest_prefix(together >= per_row(tau, chance))
      final = view.eligible & (rank < count[:, None])
    else:
      final = view.eligible & (chance >= per_row(tau, chance))
    return Selection(or_best(final, view.confidence, view.eligible), state)

  return Policy('learned-filter', 'lossy: the filter may err', no_state, select)


def _logits_of(params, view: View) -> jax.Array:
  if isinstance(params, PairFilter):
    return pair_filter_logits(params, gather_evidence(view))
  width = view.tokens.shape[1]
  if not isinstance(params, Filter) or params.inner.shape != (width, width):
    raise ValueError(
      f'learned_filter needs a PairFilter, or a Filter of width {width}, in Params.policy: a '
      f'Filter is bound to the blocks it was trained in'
    )
  return filter_logits(params, view.confidence)

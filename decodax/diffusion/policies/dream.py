"""Dream's sampler: a time grid decides how many slots, a score decides which.

Axes: `B` batch, `W` window slots, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.diffusion.keys import Purpose
from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import probability_of
from decodax.diffusion.scores import score_fn
from decodax.diffusion.scores import summarize
from decodax.diffusion.scores import top
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def dream(
  num_steps: int,
  score: str = 'entropy',
  *,
  order_temperature: float | jax.Array = 0.0,
  clean: bool = False,
  eps: float = 1e-3,
) -> Policy:
  """Returns the sampler that goes from time 1 to `eps` in `num_steps` equal steps.

  A step from t to s fills floor(m (1 - s / t)) of the m masks that are left, and the last step all.
  That may be none in early steps: the number of steps is fixed, not the work in each.

  Args:
    num_steps: steps per block.
    score: 'confidence' (the original's maskgit_plus), 'margin' (topk_margin), 'entropy', or any
      other in `decodax.diffusion.scores.SCORES`.
    order_temperature: f[] or f[B]; above 0 slots are drawn without replacement with weights
      softmax(score / order_temperature). May be traced.
    clean: take scores from the law at temperature 1; else from the law that tokens are drawn from.
    eps: where time ends.

  Raises:
    ValueError: if num_steps < 1, there is no such score, or order_temperature < 0.

  Source: Dream 7B, arXiv:2508.15487, and its released sampler.
  """
  _check_steps(num_steps)
  check_knob('order_temperature', order_temperature, 0, float('inf'))
  score_of = score_fn(score)

  def select(params, state, view: View) -> Selection:
    del params
    value = score_of(view if clean else _as_drawn(view))
    heat = per_row(order_temperature, value)
    noise = view.keys.gumbel(value.shape[1:], Purpose.ORDER)
    value = jnp.where(heat > 0, value / jnp.where(heat > 0, heat, 1) + noise, value)
    keep, last = _kept(view.step, num_steps, eps)
    masks = view.eligible.sum(-1)
    count = jnp.where(last, masks, jnp.floor(masks * (1 - keep)).astype(jnp.int32))
    return Selection(top(value, view.eligible, count), state)

  return Policy(
    f'dream-{score}',
    'the static sampler itself',
    no_state,
    select,
    max_steps=lambda width: num_steps,
    guarded=False,
  )


def ancestral(num_steps: int, *, eps: float = 1e-3) -> Policy:
  """Returns ancestral sampling of a masked diffusion: every mask is revealed on its own.

  In a step from t to s each mask takes its token with probability 1 - s / t, and in the last step
  with probability 1. The law of the number of masks left is that of the reverse process.

  Source: MDLM, arXiv:2406.07524, section 3; Dream's `origin`.
  """
  _check_steps(num_steps)

  def select(params, state, view: View) -> Selection:
    del params
    keep, last = _kept(view.step, num_steps, eps)
    draw = view.keys.uniform(view.tokens.shape[1:], Purpose.REVEAL)
    reveal = (draw >= keep[:, None]) | last[:, None]
    return Selection(reveal & view.eligible, state)

  return Policy(
    'ancestral',
    'the static sampler itself',
    no_state,
    select,
    max_steps=lambda width: num_steps,
    guarded=False,
  )


def first_hitting() -> Policy:
  """Returns the sampler that reveals one mask per step, chosen at random.

  Law-identical to ancestral sampling in infinitely many steps, in as many as there are slots.

  Source: Masked Diffusion Models are Secretly Time-Agnostic Masked Models, arXiv:2409.02908; Block
  Diffusion, arXiv:2503.09573.
  """

  def select(params, state, view: View) -> Selection:
    del params
    order = view.keys.uniform(view.tokens.shape[1:], Purpose.ORDER)
    return Selection(top(order, view.eligible, 1), state)

  return Policy('first-hitting', 'law of the reverse process', no_state, select)


def _kept(step, num_steps, eps):
  """Returns (s / t f32[B], bool[B]: is it the last step?) of step i32[B]."""
  times = jnp.linspace(1, eps, num_steps + 1)
  step = jnp.minimum(step, num_steps - 1)
  return times[step + 1] / times[step], step >= num_steps - 1


def _as_drawn(view):
  """Returns the view with summary and confidence of the laws that candidates are drawn from."""
  summary = summarize(view.laws)
  return view._replace(
    summary=summary, confidence=probability_of(view.laws, summary, view.candidates)
  )


def _check_steps(num_steps):
  if num_steps < 1:
    raise ValueError(f'a block takes at least one step: {num_steps=}')

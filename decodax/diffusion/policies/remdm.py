"""ReMDM: reveal and mask again, so that more steps mean better text.

Axes: `B` batch, `W` window slots.
"""

import jax
import jax.numpy as jnp
import numpy as np

from decodax.diffusion.keys import Purpose
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row

VARIANTS = ('cap', 'rescale', 'confidence', 'loop')


def remdm(
  num_steps: int,
  eta: float | jax.Array = 0.02,
  variant: str = 'cap',
  *,
  loop_from: float = 0.55,
  loop_to: float = 0.05,
  loop_alpha: float = 0.9,
) -> Policy:
  """Returns the sampler that masks filled slots again with probability sigma, from t to s.

  With alpha_t = 1 - t and sigma_max = min(1, (1 - alpha_s) / alpha_t): a filled slot becomes MASK
  with probability sigma; a masked one takes its token with probability
  (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). The share of masks at each time is that of the
  process without remasking, whatever sigma. With eta = 0 it is ancestral sampling.

  * cap: sigma = min(eta, sigma_max).
  * rescale: sigma = eta sigma_max.
  * confidence: each filled slot has sigma_max times the softmax, over the filled slots, of minus
    the probability its token had when it was written. `eta` is not used.
  * loop: alpha rises to `loop_alpha` until time `loop_from`, stays there until `loop_to` while
    slots are revealed and masked again with min(eta, sigma_max), then rises to 1.

  Marginals of the reverse process; as a law of texts it is another one than without remasking.

  Args:
    num_steps: steps per block.
    eta: f[] or f[B]; may be traced.
    variant: one of the above.
    loop_from: time, of 'loop'.
    loop_to: time, of 'loop'.
    loop_alpha: share of filled slots, of 'loop'.

  Raises:
    ValueError: if num_steps < 1, eta is not in [0, 1], or there is no such variant.

  Source: ReMDM, arXiv:2503.00307, equations 6 to 9 and section 4.
  """
  if num_steps < 1:
    raise ValueError(f'a block takes at least one step: {num_steps=}')
  if variant not in VARIANTS:
    raise ValueError(f'variant must be one of {", ".join(VARIANTS)}: {variant!r}')
  check_knob('eta', eta, 0, 1)
  alphas, in_loop = _schedule(num_steps, variant, loop_from, loop_to, loop_alpha)

  def init(batch_size, width, vocab_size):
    del vocab_size
    return jnp.zeros((batch_size, width), jnp.float32)  # probabilities when written

  def select(params, state, view: View) -> Selection:
    del params
    step = jnp.minimum(view.step, num_steps - 1)
    now, then = jnp.asarray(alphas)[step][:, None], jnp.asarray(alphas)[step + 1][:, None]
    highest = jnp.minimum(jnp.where(now > 0, (1 - then) / jnp.where(now > 0, now, 1), 1), 1)
    rate = per_row(eta, view.confidence)
    if variant == 'rescale':
      sigma = rate * highest
    elif variant == 'confidence':
      doubt = jnp.where(view.editable, -state, -jnp.inf)
      share = jax.nn.softmax(jnp.where(view.editable.any(-1, keepdims=True), doubt, 0), axis=-1)
      sigma = jnp.where(view.editable, highest * share, 0)
    else:
      looping = jnp.asarray(in_loop)[step][:, None]
      sigma = jnp.where(looping, jnp.minimum(rate, highest), 0)
    reveal = (then - (1 - sigma) * now) / jnp.maximum(1 - now, 1e-9)
    shape = view.tokens.shape[1:]
    fill = view.eligible & (view.keys.uniform(shape, Purpose.REVEAL) < reveal)
    fill = fill | (view.eligible & (view.step >= num_steps - 1)[:, None])
    reopen = view.editable & (view.keys.uniform(shape, Purpose.REVOKE) < sigma)
    written = jnp.where(fill, view.confidence, state)
    hold = view.step < num_steps - 1  # a block that is full may open again
    return Selection(fill, written, revoke=reopen, hold=hold)

  return Policy(
    f'remdm-{variant}',
    'marginals of the reverse process',
    init,
    select,
    max_steps=lambda width: num_steps,
    guarded=False,
    revokes=True,
  )


def _schedule(num_steps, variant, loop_from, loop_to, loop_alpha):
  """Returns (alpha f32[num_steps + 1], bool[num_steps]: may slots be masked again?)."""
  time = 1 - np.arange(num_steps + 1) / num_steps
  if variant != 'loop':
    return (1 - time).astype(np.float32), np.ones(num_steps, bool)
  rise = loop_alpha * (1 - time) / (1 - loop_from)
  finish = loop_alpha + (1 - loop_alpha) * (loop_to - time) / loop_to
  alpha = np.where(time > loop_from, rise, np.where(time > loop_to, loop_alpha, finish))
  in_loop = (time[:-1] <= loop_from) & (time[1:] > loop_to)
  return np.clip(alpha, 0, 1).astype(np.float32), in_loop

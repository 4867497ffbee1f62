"""The Optax chain: clipping, AdamW, a schedule; and the average of weights."""

import jax
import jax.numpy as jnp
import optax

from decodax.types import PyTree
from train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns step -> learning rate: a linear warm-up, then down to `final_fraction` of the peak."""
  peak, warmup = config.learning_rate, min(config.warmup_steps, num_steps)
  rest = max(num_steps - warmup, 1)
  if config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
  elif config.schedule == 'linear':
    after = optax.linear_schedule(peak, peak * config.final_fraction, rest)
  else:
    after = optax.constant_schedule(peak)
  if not warmup:
    return after
  # The first step already learns: it is 1 / warmup of the peak.
  before = optax.linear_schedule(peak / warmup, peak, warmup)
  return optax.join_schedules([before, after], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Returns the chain; weight decay leaves vectors (norms, biases) alone."""
  parts = []
  if config.clip_value is not None:
    parts.append(optax.clip(config.clip_value))
  if config.clip_norm is not None:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  parts.append(
    optax.adamw(
      make_schedule(config, num_steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
  )
  return optax.chain(*parts)


def update_average(average: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
  """Returns the exponential average after `step` steps (from 0); early on it forgets faster.

  The decay is at most (1 + step) / (10 + step), so that the start does not weigh on it.
  """
  count = step.astype(jnp.float32)
  keep = jnp.minimum(decay, (1 + count) / (10 + count))
  return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, params)

"""One training step for every objective: a tape of the frozen target, a loss, an update.

Everything is one pure function of (state, target parameters, batch), jitted by `train.main` on a
mesh. Random numbers are a function of the seed and of the step, so a state is all there is to save.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from decodax.types import PyTree
from models.transformer import Transformer
from train.config import TrainConfig
from train.losses import Mean
from train.objective import Objective
from train.optimizer import make_optimizer
from train.optimizer import make_schedule
from train.optimizer import update_average
from train.tape import Batch
from train.tape import Tape
from train.tape import make_tape


class TrainState(NamedTuple):
  """Everything a run carries from step to step, and all that a checkpoint holds of it."""

  step: jax.Array  # i32[] steps done
  params: nnx.State  # what is trained, in float32
  fixed: nnx.State  # the head's other variables
  optimizer: PyTree
  average: nnx.State | tuple  # exponential average of params; () without


class StepInfo(NamedTuple):
  """What a step reports."""

  step: jax.Array  # i32[] the step that was made, from 0
  loss: jax.Array  # f32[]
  gradient_norm: jax.Array  # f32[] before clipping
  learning_rate: jax.Array  # f32[]
  num_supervised: jax.Array  # f32[] tokens
  finite: jax.Array  # bool[] if not, the state was left as it was
  metrics: dict[str, Mean]


class Learner(NamedTuple):
  """An objective bound to the structure of its head and target."""

  config: TrainConfig
  objective: Objective
  head_graph: Any
  target_graph: Any  # None without a target
  taps: tuple[int, ...]

  def merge(self, params: nnx.State, fixed: nnx.State) -> nnx.Module:
    """Returns the head."""
    return nnx.merge(self.head_graph, params, fixed)

  def target(self, target_params: PyTree) -> Transformer | None:
    """Returns the target."""
    return None if self.target_graph is None else nnx.merge(self.target_graph, target_params)

  def best_params(self, state: TrainState) -> nnx.State:
    """Returns what is to be decoded with and exported: the average if there is one."""
    return state.params if isinstance(state.average, tuple) else state.average

  def head(self, state: TrainState) -> nnx.Module:
    """Returns the head that is decoded with and exported."""
    return self.merge(self.best_params(state), state.fixed)


def make_learner(
  config: TrainConfig,
  objective: Objective,
  target: Transformer | None,
  token_counts: np.ndarray,
) -> tuple[Learner, Callable[[], TrainState]]:
  """Returns the learner and a function that makes the state of step 0.

  The function is pure, so it may be jitted with the shardings wanted.
  """
  taps = () if target is None else tuple(objective.taps(target.config))
  abstract = nnx.eval_shape(lambda: objective.init(nnx.Rngs(0), target, 0 * token_counts))
  head_graph, _, _ = nnx.split(abstract, objective.trainable, ...)
  target_graph = None if target is None else nnx.split(target)[0]

  def init():
    head = objective.init(nnx.Rngs(config.seed), target, token_counts)
    _, params, fixed = nnx.split(head, objective.trainable, ...)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return new_state(config, params, fixed)

  return Learner(config, objective, head_graph, target_graph, taps), init


def new_state(config: TrainConfig, params: nnx.State, fixed: nnx.State) -> TrainState:
  """Returns the state of step 0 for these parameters, which must be float32."""
  optimizer = make_optimizer(config.optimizer, config.num_steps)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    fixed=fixed,
    optimizer=optimizer.init(params),
    average=() if config.optimizer.ema_decay is None else jax.tree.map(jnp.copy, params),
  )


def make_step_fn(
  learner: Learner, compute_dtype: Any
) -> Callable[[TrainState, PyTree, Batch, Any], tuple[TrainState, StepInfo]]:
  """Returns (state, target_params, batch, features) -> (state, info); pure, not jitted.

  `features` is None, or the (hidden, taps) of a batch that was taped before, see
  `train.tape_cache`.
  """
  config, objective = learner.config, learner.objective
  optimizer = make_optimizer(config.optimizer, config.num_steps)
  schedule = make_schedule(config.optimizer, config.num_steps)

  def micro(state, target_params, batch, features, key):
    """Returns (gradients of the sum of losses, Loss) of one micro-batch."""
    target = learner.target(target_params)
    step = state.step
    if objective.rewrite is not None:
      head = learner.merge(_cast(state.params, compute_dtype), state.fixed)
      rewrite_key, key = jax.random.split(key)
      batch = lax.stop_gradient(objective.rewrite(head, target, batch, rewrite_key, step))
    if features is None:
      tape = make_tape(target, batch, learner.taps)
    else:
      hidden, taps = jax.tree.map(lambda x: x.astype(compute_dtype), features)
      tape = Tape(*batch, hidden=hidden, taps=taps)

    def total(params):
      head = learner.merge(_cast(params, compute_dtype), state.fixed)
      loss = objective.loss(head, target, tape, key, step)
      return loss.total.astype(jnp.float32), lax.stop_gradient(loss)

    fn = jax.checkpoint(total) if config.remat else total
    return jax.grad(fn, has_aux=True)(state.params)

  def step_fn(state, target_params, batch, features=None):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    gradients, loss = _accumulate(
      micro, config.accumulation, state, target_params, batch, features, key
    )
    weight = jnp.maximum(loss.weight, 1e-9)
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    norm, mean = optax.tree.norm(gradients), loss.total / weight
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if config.optimizer.ema_decay is not None:
      average = update_average(average, params, config.optimizer.ema_decay, state.step)
    new = state._replace(
      step=state.step + 1, params=params, optimizer=optimizer_state, average=average
    )
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    info = StepInfo(
      step=state.step,
      loss=mean,
      gradient_norm=norm,
      learning_rate=jnp.asarray(schedule(state.step)),
      num_supervised=batch.loss_mask.sum(dtype=jnp.float32),
      finite=finite,
      metrics=dict(loss.metrics),
    )
    return new, info

  return step_fn


def _accumulate(micro, num, state, target_params, batch, features, key):
  """Returns the sums of gradients and losses over `num` micro-batches, one after another."""
  if num == 1:
    return micro(state, target_params, batch, features, jax.random.fold_in(key, 0))

  def split(x):  # micro-batch i takes every num-th row, so that each device keeps its own
    return x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)

  parts = jax.tree.map(split, (batch, features))
  first = jax.tree.map(lambda x: x[0], parts)
  like = jax.eval_shape(lambda: micro(state, target_params, *first, key))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

  def body(carry, inputs):
    index, part = inputs
    found = micro(state, target_params, *part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, carry, found), None

  sums, _ = lax.scan(body, zeros, (jnp.arange(num), parts))
  return sums


def _cast(params, dtype):
  """Returns the parameters in the compute dtype; gradients come back in float32."""
  return jax.tree.map(lambda x: x.astype(dtype), params)

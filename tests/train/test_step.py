"""One step: micro-batches add up, nothing reaches the target, bad numbers leave the state alone."""

import dataclasses
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.config import TransformerConfig
from models.transformer import Transformer
from tests.train.conftest import OPTIONS
from train import losses
from train.config import OptimizerConfig
from train.config import TrainConfig
from train.config import load_config
from train.config import override
from train.objective import Loss
from train.objective import Objective
from train.objective import get_objective
from train.optimizer import make_optimizer
from train.optimizer import make_schedule
from train.optimizer import update_average
from train.step import make_learner
from train.step import make_step_fn
from train.tape import Batch
from train.tape import make_tape
from train.tape import supervised

_VOCAB, _ROWS, _LENGTH = 40, 8, 16


class _Probe(nnx.Module):
  """A head that copies the target's law through one matrix, with ids that are not trained."""

  def __init__(self, size, *, rngs):
    self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (size, size)))
    self.ids = nnx.Variable(jnp.arange(3))


def _probe_objective(noise: float = 0.0) -> Objective:
  def init(rngs, target, token_counts):
    del token_counts
    return _Probe(target.config.hidden_size, rngs=rngs)

  def loss(head, target, tape, rng_key, step):
    del step
    hidden = tape.hidden + noise * jax.random.normal(rng_key, tape.hidden.shape)
    found = losses.compare(
      target.unembed, target.unembed, tape.hidden, hidden @ head.kernel[...], chunk=8
    )
    weights = supervised(tape, 1)
    total = losses.masked(found.loss, weights)
    return Loss(total.total, total.weight, losses.depth_metrics([found.correct], [weights]))

  return Objective(init=init, loss=loss)


def _batch(seed=0) -> Batch:
  rng = np.random.default_rng(seed)
  segments = np.ones((_ROWS, _LENGTH), np.int32)
  segments[:, 9:] = 2
  segments[::3, 13:] = 0  # rows of unequal weight
  positions = np.broadcast_to(np.r_[0:9, 0:7], segments.shape).astype(np.int32)
  tokens = rng.integers(1, _VOCAB, segments.shape).astype(np.int32)
  return Batch(*map(jnp.asarray, (tokens, positions, segments, segments > 0)))


def _target():
  config = TransformerConfig(
    vocab_size=_VOCAB, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=24,
  )  # fmt: skip
  return Transformer(config, rngs=nnx.Rngs(1))


def _setup(objective=None, **changes: Any):
  optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, **changes.pop('optimizer', {}))
  config = TrainConfig('probe', num_steps=10, batch_size=_ROWS, optimizer=optimizer, **changes)
  target = _target()
  learner, init = make_learner(
    config, objective or _probe_objective(), target, np.ones(_VOCAB, np.int64)
  )
  return jax.jit(make_step_fn(learner, jnp.float32)), init(), nnx.state(target)


def test_micro_batches_give_the_same_step():
  found = []
  for accumulation in (1, 4):
    step_fn, state, target = _setup(accumulation=accumulation)
    state, info = step_fn(state, target, _batch())
    found.append((state.params, info.loss, info.metrics))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found)


def test_the_loss_is_a_mean_over_tokens_not_over_rows():
  step_fn, state, target = _setup()
  batch = _batch()
  _, info = step_fn(state, target, batch)
  totals, weights = 0.0, 0.0
  for row in range(_ROWS):
    one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
    _, part = step_fn(state, target, one)
    weight = supervised(one, 1).sum().item()
    totals, weights = totals + float(part.loss) * float(weight), weights + weight
  assert float(info.loss) == pytest.approx(totals / weights, rel=1e-5)


def test_what_is_not_a_parameter_is_left_alone_and_the_loss_falls():
  step_fn, state, target = _setup()
  before = state.fixed
  first = 0.0
  for _ in range(10):
    state, info = step_fn(state, target, _batch())
    first = first or float(info.loss)
  jax.tree.map(np.testing.assert_array_equal, state.fixed, before)
  assert float(info.loss) < 0.7 * first
  assert int(state.step) == 10


def test_no_gradient_reaches_the_target():
  objective, target = _probe_objective(), _target()
  graph, params = nnx.split(target)
  head = objective.init(nnx.Rngs(0), target, np.ones(_VOCAB))

  def total(params):
    tape = make_tape(nnx.merge(graph, params), _batch())
    assert tape.hidden is not None
    loss = objective.loss(head, target, tape, jax.random.key(0), jnp.int32(0))
    return tape.hidden.sum() + loss.total

  assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(jax.grad(total)(params)))


def test_a_loss_that_is_not_a_number_changes_nothing():
  step_fn, state, target = _setup(optimizer={'ema_decay': 0.5})
  broken = jax.tree.map(lambda x: x * jnp.nan if x.ndim > 1 else x, target)
  after, info = step_fn(state, broken, _batch())
  assert not bool(info.finite)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_random_numbers_depend_on_the_step_alone():
  step_fn, state, target = _setup(_probe_objective(noise=1.0))
  (a, first), (b, second) = (step_fn(state, target, _batch()) for _ in range(2))
  assert float(first.loss) == float(second.loss)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  later = state._replace(step=state.step + 1)
  assert float(step_fn(later, target, _batch())[1].loss) != float(first.loss)


def test_remat_changes_nothing():
  states = []
  for remat in (False, True):
    step_fn, state, target = _setup(remat=remat)
    states.append(step_fn(state, target, _batch())[0].params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *states)


def test_bfloat16_computes_with_float32_masters():
  target = _target()
  config = TrainConfig('probe', num_steps=10, batch_size=_ROWS)
  learner, init = make_learner(config, _probe_objective(), target, np.ones(_VOCAB, np.int64))
  cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(target))
  state, info = jax.jit(make_step_fn(learner, jnp.bfloat16))(init(), cast, _batch())
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
  assert info.loss.dtype == jnp.float32 and bool(info.finite)


def test_a_rewritten_batch_is_what_the_tape_reads():
  def rewrite(head, target, batch, rng_key, step):
    del head, target, rng_key, step
    return batch._replace(tokens=jnp.full_like(batch.tokens, 3))

  plain, state, target = _setup()
  other, _, _ = _setup(_probe_objective()._replace(rewrite=rewrite))
  threes = _batch()._replace(tokens=jnp.full((_ROWS, _LENGTH), 3, jnp.int32))
  got, want = other(state, target, _batch())[1].loss, plain(state, target, threes)[1].loss
  assert float(got) == pytest.approx(float(want), rel=1e-6)


# --- Optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'middle'), [('cosine', 0.55), ('linear', 0.55), ('constant', 1)])
def test_schedules_warm_up_and_come_down(name, middle):
  schedule: Any = make_schedule(
    OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=10, final_fraction=0.1), 110
  )
  assert float(schedule(0)) == pytest.approx(0.2)
  assert float(schedule(10)) == pytest.approx(2.0)
  assert float(schedule(60)) == pytest.approx(2.0 * middle)
  assert float(schedule(110)) == pytest.approx(2.0 if name == 'constant' else 0.2)


def test_clipping_and_decay_are_in_the_chain():
  config = OptimizerConfig(
    learning_rate=1.0, warmup_steps=0, schedule='constant', weight_decay=0.5, clip_value=1e-3
  )
  optimizer = make_optimizer(config, 10)
  params = {'matrix': jnp.ones((2, 2)), 'vector': jnp.ones(2)}
  state = optimizer.init(params)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates: Any = optimizer.update(zero, state, params)[0]
  np.testing.assert_allclose(updates['matrix'], -0.5)  # decay alone
  np.testing.assert_allclose(updates['vector'], 0.0)
  huge = jax.tree.map(lambda x: x * 1e9, params)
  _, state = optimizer.update(huge, state, params)
  moment = optax.tree.get(state, 'mu')['matrix']
  assert float(moment.max()) <= 1e-3


def test_the_average_forgets_the_start():
  average = jnp.zeros(())
  for step in range(50):
    average = update_average(average, jnp.ones(()), 0.999, jnp.int32(step))
  assert float(average) > 0.99


# --- Configurations ------------------------------------------------------------------------------


def test_settings_are_overridden_by_name():
  config = override(
    load_config('tiny_target'),
    ['num_steps=7', 'optimizer.learning_rate=1', 'data.sources=a.txt,b.txt', 'options.num_layers=2',
     'data.max_tokens=100', 'optimizer.ema_decay=0.9', 'optimizer.clip_norm=None',
     'eval.temperatures=0,1'],
  )  # fmt: skip
  assert config.num_steps == 7 and config.optimizer.learning_rate == 1.0
  assert config.data.sources == ('a.txt', 'b.txt') and config.options['num_layers'] == 2
  assert config.data.max_tokens == 100 and config.optimizer.clip_norm is None
  assert config.eval.temperatures == (0.0, 1.0)


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ('num_step=7', "unknown setting 'num_step'; nearest: num_steps"),
    ('num_steps', 'takes key=value'),
    ('num_steps=many', "num_steps must be int: 'many'"),
    ('optimizer=1', 'optimizer is a group of settings'),
    ('optimizer.lr=1', "unknown setting 'optimizer.lr'"),
    ('num_steps.x=1', 'num_steps is one value'),
    ('num_steps=0', 'num_steps must be at least 1'),
    ('batch_size=15', None),  # allowed: one micro-batch
    ('accumulation=3', 'batch_size must be a multiple of accumulation'),
    ('optimizer.schedule=step', 'optimizer.schedule must be'),
    ('compute_dtype=float16', 'compute_dtype must be'),
  ],
)
def test_bad_settings_are_named(setting, message):
  config = load_config('tiny_target')
  if message is None:
    assert override(config, [setting]).batch_size == 15
    return
  with pytest.raises(ValueError, match=message):
    override(config, [setting])


def test_bad_names_are_named(tmp_path):
  with pytest.raises(ValueError, match='no such configuration: tiny_targt; nearest: tiny_target'):
    load_config('tiny_targt')
  (tmp_path / 'empty.py').write_text('x = 1')
  with pytest.raises(ValueError, match='must have a function get_config'):
    load_config(str(tmp_path / 'empty.py'))
  with pytest.raises(ValueError, match="unknown objective 'eagle9'; there are"):
    get_objective('eagle9')
  with pytest.raises(ValueError, match='has no option width; it has hidden_size'):
    get_objective('language_model', {'width': 3})


def test_every_configuration_names_what_it_needs():
  for path in sorted((pathlib.Path(__file__).parents[2] / 'train' / 'configs').glob('[a-z]*.py')):
    config = load_config(path.stem)
    get_objective(config.objective, config.options)
    text = path.read_text()
    assert f'--config {path.stem}' in text and 'Expect' in text, path
    assert dataclasses.is_dataclass(config)


def test_options_of_the_tests_are_those_of_the_objective():
  get_objective('language_model', OPTIONS)

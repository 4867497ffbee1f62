"""Objectives of the heads: what they learn is what drafting does, at the right token, and nothing
else.

Axes: `B` rows, `T` tokens, `D` depths.
"""

import functools
import json
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from decodax.types import Params
from models.heads import HEADS
from models.heads import head_expander
from tests.decodax import zoo as loop_zoo
from tests.models.heads import zoo
from train import export
from train import losses
from train.objective import Objective
from train.objective import get_objective
from train.objectives import acceptance
from train.objectives import draft_lm
from train.tape import Batch
from train.tape import make_tape

OPTIONS: dict[str, dict[str, Any]] = {
  'medusa': dict(num_heads=3),
  'hydra': dict(num_heads=3),
  'hydra++': dict(num_heads=3, prefix=True, num_layers=2, divergence='forward_kl', dropout=0.1),
  'eagle': dict(num_drafts=3),
  'eagle3': dict(steps=3, draft_vocab_size=16),
  'kangaroo': dict(exit_layer=1),
  'draft_lm': dict(hidden_size=32, draft_vocab_size=16, divergence='forward_kl'),
}
NAMES = sorted(OPTIONS)
ROWS, LENGTH = 4, 32


def _objective(name, **changes):
  return get_objective(name.removesuffix('++'), {**OPTIONS[name], **changes})


def _batch(seed=0, *, split=None) -> Batch:
  """Rows of two documents that meet at `split`; the first tokens of each are not supervised."""
  rng = np.random.default_rng(seed)
  split = LENGTH // 2 if split is None else split
  index = np.arange(LENGTH)
  place = np.where(index < split, index, index - split)
  return Batch(
    tokens=jnp.asarray(rng.integers(0, zoo.VOCAB_SIZE, (ROWS, LENGTH)), jnp.int32),
    positions=jnp.asarray(np.tile(place, (ROWS, 1)), jnp.int32),
    segments=jnp.asarray(np.tile(1 + (index >= split), (ROWS, 1)), jnp.int32),
    loss_mask=jnp.asarray(np.tile(place >= 2, (ROWS, 1))),
  )


def _start(name, target=None, **changes) -> tuple[Objective, Any, Any]:
  objective = _objective(name, **changes)
  target = zoo.target() if target is None else target
  head = objective.init(nnx.Rngs(1), target, zoo.COUNTS)
  return objective, head, target


def _loss_fn(objective, head, target):
  """Returns jitted (params, batch, key) -> ((loss, metrics), gradients), and the start params."""
  graph, params, rest = nnx.split(head, objective.trainable, ...)
  target_graph, target_state = nnx.split(target)

  def loss(params, batch, key):
    frozen = nnx.merge(target_graph, target_state)
    tape = make_tape(frozen, batch, objective.taps(frozen.config))
    found = objective.loss(nnx.merge(graph, params, rest), frozen, tape, key, jnp.int32(0))
    metrics = {name: mean.value for name, mean in found.metrics.items()}
    return found.total / jnp.maximum(found.weight, 1e-9), metrics

  # Without optimisation: they run for milliseconds and compile for seconds.
  fn = jax.jit(
    jax.value_and_grad(loss, has_aux=True),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  return fn, params


@functools.cache
def _trained(name, steps=60):
  """Returns (losses by step, gradients of step 0, metrics at the end, head) on one batch."""
  objective, head, target = _start(name)
  fn, params = _loss_fn(objective, head, target)
  optimizer = optax.adam(3e-3)
  state, batch, history, first = optimizer.init(params), _batch(), [], None
  metrics = {}
  for step in range(steps):
    (loss, metrics), gradients = fn(params, batch, jax.random.key(step))
    first = gradients if first is None else first
    updates, state = optimizer.update(gradients, state)
    params = optax.apply_updates(params, updates)
    history.append(float(loss))
  nnx.update(head, params)
  return history, first, jax.device_get(metrics), head


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_falls_and_every_parameter_learns(name):
  history, gradients, metrics, _ = _trained(name)
  assert np.isfinite(history).all() and history[-1] < 0.8 * history[0]
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients)
    if g.size and not np.any(g)
  ]
  assert still == []
  depths = {'kangaroo': 1, 'draft_lm': 1}.get(name, 3)
  assert {f'accuracy/{k}' for k in range(1, depths + 1)} <= set(metrics)


@pytest.mark.parametrize('name', ['eagle', 'eagle3', 'hydra++', 'kangaroo', 'draft_lm', 'medusa'])
def test_training_computes_the_laws_that_drafting_computes(name):
  """The acceptance by depth that is reported is that of the head's laws by the book."""
  objective, head, target = _start(name, **({'dropout': 0.0} if name == 'hydra++' else {}))
  if name == 'eagle':
    objective = _objective(name, noise=0.0)
  depth = {'kangaroo': 1, 'draft_lm': 1}.get(name, 3)
  zoo.shake(head, 5, 0.1)
  batch = _batch(split=LENGTH)
  _, metrics = _loss_fn(objective, head, target)[0](
    nnx.split(head, objective.trainable, ...)[1], batch, jax.random.key(0)
  )[0]
  laws = []
  step = jax.jit(functools.partial(zoo.chain_laws, head, target, depth=depth))
  for length in range(2, LENGTH):
    laws.append(step(batch.tokens, jnp.full((ROWS,), length)))
  tape = make_tape(target, batch)
  p = jax.nn.softmax(target.unembed(tape.hidden))
  for k in range(depth):
    found = []
    for length, law in zip(range(2, LENGTH), laws, strict=True):
      place = length + k  # of the token drafted
      if 2 <= place < LENGTH:
        found.append(jnp.minimum(jax.nn.softmax(law[:, k]), p[:, place - 1]).sum(-1))
    # The first supervised token follows a text of two; shorter texts have nothing to compare.
    np.testing.assert_allclose(np.mean(found), metrics[f'acceptance/{k + 1}'], rtol=2e-4)


@pytest.mark.parametrize('name', NAMES)
def test_documents_packed_together_do_not_see_each_other(name):
  changes = {'noise': 0.0} if name == 'eagle' else {'dropout': 0.0} if name == 'hydra++' else {}
  objective, head, target = _start(name, **changes)
  fn, params = _loss_fn(objective, head, target)
  batch = _batch()
  (packed, _), gradients = fn(params, batch, jax.random.key(0))
  half = LENGTH // 2
  pad = ((0, 0), (0, half))
  alone = [
    jax.tree.map(lambda a: jnp.pad(a[:, :half], pad), batch),
    jax.tree.map(lambda a: jnp.pad(a[:, half:], pad), batch),
  ]
  alone[1] = alone[1]._replace(segments=jnp.minimum(alone[1].segments, 1))
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *alone)
  (apart, _), other = fn(params, both, jax.random.key(0))
  np.testing.assert_allclose(packed, apart, rtol=2e-5)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4 * max(float(jnp.abs(b).max()), 1e-3))


# --- A language that can be known: x is followed by 3 x + 1 --------------------------------------


def _affine_target():
  """A target that is certain of 3 x + 1 after x, whatever came before."""
  target = zoo.make_target(3)
  nnx.update(target.layers, jax.tree.map(lambda a: 0.02 * a, nnx.state(target.layers)))
  eye = np.zeros((zoo.WIDTH, zoo.VOCAB_SIZE), np.float32)
  for token in range(zoo.VOCAB_SIZE):
    eye[token, (3 * token + 1) % zoo.VOCAB_SIZE] = 4.0
  target.embedding[...] = 3 * jnp.eye(zoo.VOCAB_SIZE, zoo.WIDTH)
  assert target.head is not None
  target.head[...] = jnp.asarray(eye)
  return target


def _affine_batch(seed) -> Batch:
  batch = _batch(seed, split=LENGTH)
  tokens = [batch.tokens[:, 0]]
  for _ in range(LENGTH - 1):
    tokens.append((3 * tokens[-1] + 1) % zoo.VOCAB_SIZE)
  return batch._replace(tokens=jnp.stack(tokens, axis=1))


@pytest.mark.parametrize('name', ['medusa', 'hydra', 'eagle', 'eagle3'])
def test_a_known_language_is_learnt_at_every_depth(name):
  """An input or a label one place off could not reach this."""
  changes = {'draft_vocab_size': None} if name == 'eagle3' else {}
  objective, head, target = _start(name, _affine_target(), **changes)
  fn, params = _loss_fn(objective, head, target)
  optimizer = optax.adam(1e-2)
  state, metrics = optimizer.init(params), {}
  for step in range(150):
    (_, metrics), gradients = fn(params, _affine_batch(step), jax.random.key(step))
    updates, state = optimizer.update(gradients, state)
    params = optax.apply_updates(params, updates)
  assert [float(metrics[f'accuracy/{k}']) for k in (1, 2, 3)] == [1.0, 1.0, 1.0]


# --- Draft models --------------------------------------------------------------------------------


@pytest.mark.parametrize('divergence', ['labels', *losses.DIVERGENCES])
def test_every_divergence_brings_a_draft_model_nearer(divergence):
  changes = {'divergence': divergence, 'draft_vocab_size': None}
  objective, head, target = _start('draft_lm', **changes)
  fn, params = _loss_fn(objective, head, target)
  batch = _batch()
  before = fn(params, batch, jax.random.key(0))
  gradients = before[1]
  scale = 0.05 / optax.tree.norm(gradients)
  params = jax.tree.map(lambda p, g: p - scale * g, params, gradients)
  after = fn(params, batch, jax.random.key(0))
  assert float(after[0][0]) < float(before[0][0])


def test_a_draft_model_writes_its_own_text():
  objective, head, target = _start('draft_lm', on_policy=0.5, prompt_length=6)
  zoo.shake(head, 3, 1.0)
  batch = _batch(split=4)
  rewrite_fn = objective.rewrite
  assert rewrite_fn is not None
  rewrite = jax.jit(lambda key: rewrite_fn(head, target, batch, key, jnp.int32(0)))
  kinds = set()
  for seed in range(4):
    mixed = rewrite(jax.random.key(seed))
    changed = np.asarray((mixed.tokens != batch.tokens).any(-1))
    kinds |= {bool(c) for c in changed}
    for row in np.flatnonzero(changed):
      np.testing.assert_array_equal(mixed.tokens[row, :4], batch.tokens[row, :4])
      np.testing.assert_array_equal(mixed.loss_mask[row], np.arange(LENGTH) >= 4)
      np.testing.assert_array_equal(mixed.segments[row], 1)
    assert np.isin(mixed.tokens[changed][:, 4:], np.asarray(head.vocabulary.ids[...])).all()
  assert kinds == {True, False}
  first, second = (
    draft_lm.write(head, batch, jax.random.key(seed), prompt_length=6, temperature=0.0).tokens
    for seed in (0, 1)
  )
  np.testing.assert_array_equal(first, second)


def test_text_of_its_own_needs_a_divergence():
  assert _objective('draft_lm').rewrite is None
  with pytest.raises(ValueError, match='its own text teaches nothing'):
    get_objective('draft_lm', {'on_policy': 0.5})
  with pytest.raises(ValueError, match='on_policy must be 0 to 1'):
    get_objective('draft_lm', {'on_policy': 1.5})


# --- Acceptance ----------------------------------------------------------------------------------


def test_acceptance_is_learnt_and_stops_the_drafter(tmp_path):
  draft_objective, draft, target = _start('eagle3')
  zoo.shake(draft, 2, 0.2)
  folder = tmp_path / 'head'
  export.save_head(folder, draft, objective='eagle3', options=OPTIONS['eagle3'], facts={})
  objective = get_objective(
    'acceptance', dict(drafter=str(folder), rounds=6, collect_drafts=5, num_drafts=5, num_blocks=1)
  )
  judged = objective.init(nnx.Rngs(4), target, zoo.COUNTS)
  assert objective.taps(target.config) == draft_objective.taps(target.config)
  fn, params = _loss_fn(objective, judged, target)
  assert not any(
    'drafter' in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)
  )
  optimizer = optax.adam(1e-2)
  state, batch = optimizer.init(params), _batch(split=LENGTH)
  history = []
  for step in range(60):
    (_, metrics), gradients = fn(params, batch, jax.random.key(step))
    updates, state = optimizer.update(gradients, state)
    params = optax.apply_updates(params, updates)
    history.append({name: float(value) for name, value in metrics.items()})
  late = {name: np.mean([h[name] for h in history[-10:]]) for name in history[0]}
  early = {name: np.mean([h[name] for h in history[:3]]) for name in history[0]}
  assert late['divergence'] < early['divergence']
  nnx.update(judged, params)

  assert objective.make_drafter is not None
  drafter = objective.make_drafter(judged, target)
  place = objective.place(nnx.state(target), nnx.state(judged))
  setup = zoo.make_setup(target, draft)
  decode = loop_zoo.Compiled(
    functools.partial(
      loop_zoo.decodax.decode, model=setup.model, drafter=drafter,
      verifier=loop_zoo.decodax.verifiers.coupled,
    )
  )  # fmt: skip
  request = loop_zoo.make_request({'temperature': 1.0})
  stopped = jax.device_get(decode(place, request))
  from decodax import drafters

  plain = loop_zoo.Compiled(
    functools.partial(
      loop_zoo.decodax.decode, model=setup.model, drafter=drafters.plain(),
      verifier=loop_zoo.decodax.verifiers.coupled,
    )
  )  # fmt: skip
  expected = jax.device_get(plain(Params(nnx.state(target)), request))
  loop_zoo.assert_same_output(stopped, expected)
  rounds = stopped.stats.num_proposed_at.sum(0)
  assert rounds[1] > rounds[4] > 0 or rounds[1] > rounds[2]  # some rounds are cut short


def test_collected_labels_are_the_ratios_of_the_laws():
  """Acceptance by the book: p/q at the draft, of laws computed anew from the text."""
  _, head, target = _start('draft_lm')
  zoo.shake(head, 2, 0.3)
  tape = make_tape(target, _batch(split=LENGTH))
  data = jax.jit(
    lambda key: acceptance.collect(head, target, tape, key, num_drafts=4, rounds=3, temperature=1.0)
  )(jax.random.key(0))
  assert data.hidden.shape[:3] == data.accepted.shape == (3, ROWS, 3)
  # The state that has read draft j gives the law of draft j + 1: its q must be that draft's.
  law = jax.nn.softmax(head.unembed(data.hidden))
  following = np.asarray(data.drafted)[:, :, 1:]
  nearest = np.abs(np.asarray(law)[:, :, :-1] - following[..., None]).min(-1)
  np.testing.assert_allclose(nearest, 0, atol=1e-5)
  assert ((data.accepted >= 0) & (data.accepted <= 1)).all()
  weights = np.asarray(data.weights)
  assert (weights[..., 1:] <= weights[..., :-1]).all() and weights[..., 0].all()


def test_every_kind_of_head_has_an_objective():
  for name in HEADS:
    assert get_objective(name).make_drafter is not None


def test_the_written_head_drafts_as_before(tmp_path):
  """Saved, loaded and put to work: a folder is all that decoding needs."""
  objective, head, target = _start('eagle3')
  export.save_head(tmp_path / 'h', head, objective='eagle3', options=OPTIONS['eagle3'], facts={})
  config = json.loads((tmp_path / 'h' / 'config.json').read_text())
  assert config['objective'] == 'eagle3'
  loaded = export.load_head(tmp_path / 'h', target)
  tokens, length = _batch().tokens, jnp.full((ROWS,), 9)
  before, after = (zoo.chain_laws(h, target, tokens, length, 3) for h in (head, loaded.head))
  np.testing.assert_array_equal(before, after)
  assert head_expander(loaded.head, target).draft_vocab_size == 16

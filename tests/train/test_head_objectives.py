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

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.types import Params
from models.heads import HEADS
from models.heads import head_expander
from models.heads.vocabulary import make_vocabulary
from tests.decodax import zoo as loop_zoo
from tests.models.heads import zoo
from train import export
from train import losses
from train.objective import Objective
from train.objective import get_objective
from train.objectives import _heads
from train.objectives import acceptance
from train.objectives import draft_lm
from train.tape import Batch
from train.tape import make_tape

OPTIONS: dict[str, dict[str, Any]] = {
  'medusa': dict(num_heads=3),
  'hydra': dict(num_heads=3, num_layers=2),
  'hydra++': dict(num_heads=3, prefix=True, num_layers=2, divergence='forward_kl'),
  'eagle': dict(num_drafts=3, noise=0.0),
  'eagle3': dict(steps=3),
  'kangaroo': dict(exit_layer=1),
  'draft_lm': dict(hidden_size=32, draft_vocab_size=16, divergence='forward_kl'),
  'ppd': dict(num_copies=2, num_anchors=0),
}
NAMES = sorted(OPTIONS)
NUM_DEPTHS = {'kangaroo': 1, 'draft_lm': 1}  # elsewhere 3
ROWS, LENGTH = 4, 32


def _objective(name, **changes):
  return get_objective(name.removesuffix('++'), {**OPTIONS[name], **changes})


def _batch(seed=0, *, split=LENGTH) -> Batch:
  """Rows of two documents that meet at `split`; the first two tokens of each are not supervised."""
  rng = np.random.default_rng(seed)
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
  return objective, objective.init(nnx.Rngs(1), target, zoo.COUNTS), target


class Learner:
  """A head that learns. What is compiled is shared by learners of the same name and options."""

  def __init__(self, objective, head, target, fn=None):
    self.graph, self.params, self.rest = nnx.split(head, objective.trainable, ...)
    self.target = nnx.state(target)
    self.fn = fn or _compile(objective, self.graph, nnx.graphdef(target))
    self.optimizer: Any = None
    self.state: Any = None

  def __call__(self, batch, key=0):
    """Returns (loss, metrics, gradients)."""
    key = jax.random.key(key)
    (loss, metrics), gradients = self.fn(self.params, self.rest, self.target, batch, key)
    return float(loss), jax.device_get(metrics), gradients

  def learn(self, batch, key, rate):
    """Returns (loss, metrics, gradients) and takes a step of Adam."""
    if self.optimizer is None:
      self.optimizer = optax.adam(rate)
      self.state = self.optimizer.init(self.params)
    found = self(batch, key)
    updates, self.state = self.optimizer.update(found[2], self.state)
    self.params = optax.apply_updates(self.params, updates)
    return found


def _compile(objective, graph, target_graph):
  def loss(params, rest, target_state, batch, key):
    target = nnx.merge(target_graph, target_state)
    tape = make_tape(target, batch, objective.taps(target.config))
    found = objective.loss(nnx.merge(graph, params, rest), target, tape, key, jnp.int32(0))
    metrics = {name: mean.value for name, mean in found.metrics.items()}
    return found.total / jnp.maximum(found.weight, 1e-9), metrics

  # Without optimisation: they run for milliseconds and compile for seconds.
  return jax.jit(
    jax.value_and_grad(loss, has_aux=True),
    compiler_options={'xla_backend_optimization_level': 0},
  )


@functools.cache
def _compiled(name):
  objective, head, target = _start(name)
  return _compile(objective, nnx.split(head, objective.trainable, ...)[0], nnx.graphdef(target))


def _learner(name, target=None, shaken=0.0) -> tuple[Learner, Any]:
  objective, head, target = _start(name, target)
  if shaken:
    zoo.shake(head, 5, shaken)
  return Learner(objective, head, target, _compiled(name)), head


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_falls_and_every_parameter_learns(name):
  learner, _ = _learner(name)
  found = [learner.learn(_batch(split=16), step, 3e-3) for step in range(60)]
  history = [loss for loss, _, _ in found]
  assert np.isfinite(history).all() and history[-1] < 0.8 * history[0]
  _, metrics, gradients = found[0]
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients)
    if not np.any(g)
  ]
  assert still == []
  assert {f'accuracy/{k + 1}' for k in range(NUM_DEPTHS.get(name, 3))} <= set(metrics)


@pytest.mark.parametrize('name', NAMES)
def test_training_computes_the_laws_that_drafting_computes(name):
  """The acceptance by depth that is reported is that of the head's laws by the book."""
  learner, head = _learner(name, shaken=0.1)
  depth, target, batch = NUM_DEPTHS.get(name, 3), zoo.target(), _batch()
  metrics = learner(batch)[1]
  by_the_book = loop_zoo.Compiled(functools.partial(zoo.chain_laws, head, target, depth=depth))
  laws = [by_the_book(batch.tokens, jnp.full((ROWS,), length)) for length in range(2, LENGTH)]
  p = jax.nn.softmax(target.unembed(zoo.read(target, head, batch.tokens)[0].hidden))
  for k in range(depth):
    found = [  # a draft after `length` tokens at depth k is token length + k
      jnp.minimum(jax.nn.softmax(law[:, k]), p[:, length + k - 1]).sum(-1)
      for length, law in enumerate(laws, 2)
      if length + k < LENGTH
    ]
    np.testing.assert_allclose(np.mean(found), metrics[f'acceptance/{k + 1}'], rtol=2e-4)


@pytest.mark.parametrize('name', NAMES)
def test_documents_packed_together_do_not_see_each_other(name):
  learner, _ = _learner(name)
  half = LENGTH // 2
  batch = _batch(split=half)
  packed, _, gradients = learner(batch)

  def alone(part):
    padded = jax.tree.map(lambda a: jnp.pad(a[:, part], ((0, 0), (0, half))), batch)
    return padded._replace(segments=jnp.minimum(padded.segments, 1))

  first, second = learner(alone(slice(0, half))), learner(alone(slice(half, None)))
  # Both halves supervise as many tokens, unless a draft vocabulary leaves some out.
  if name != 'draft_lm':
    np.testing.assert_allclose(packed, (first[0] + second[0]) / 2, rtol=2e-5)
    both = jax.tree.map(lambda a, b: (a + b) / 2, first[2], second[2])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(both), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-4 * max(float(jnp.abs(b).max()), 1e-3))
  for key in ('accuracy/1', 'acceptance/1'):
    mean = (first[1][key] + second[1][key]) / 2
    np.testing.assert_allclose(learner(batch)[1][key], mean, rtol=2e-5)


def test_noise_and_dropout_change_what_is_read():
  for name, changes in (('eagle', {'noise': 1.0}), ('hydra', {'dropout': 0.3})):
    objective, head, target = _start(name, **changes)
    noisy, still = Learner(objective, head, target), _learner(name)[0]
    losses_of = [noisy(_batch(), key)[0] for key in (0, 0, 1)]
    assert losses_of[0] == losses_of[1] != losses_of[2]
    assert still(_batch(), 0)[0] == still(_batch(), 1)[0] != losses_of[0]


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
  batch = _batch(seed)
  tokens = [batch.tokens[:, 0]]
  for _ in range(LENGTH - 1):
    tokens.append((3 * tokens[-1] + 1) % zoo.VOCAB_SIZE)
  return batch._replace(tokens=jnp.stack(tokens, axis=1))


@pytest.mark.parametrize('name', ['medusa', 'hydra', 'eagle', 'eagle3'])
def test_a_known_language_is_learnt_at_every_depth(name):
  """An input or a label one place off could not reach this."""
  learner, _ = _learner(name, _affine_target())
  found = [learner.learn(_affine_batch(step), step, 1e-2) for step in range(120)]
  for k in (1, 2, 3):
    assert np.mean([metrics[f'accuracy/{k}'] for _, metrics, _ in found[-5:]]) > 0.98


# --- Draft models --------------------------------------------------------------------------------


_QUICK = ('reverse_kl',)


@pytest.mark.parametrize(
  'divergence',
  [
    pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
    for name in ('labels', *losses.DIVERGENCES)
  ],
)
def test_every_divergence_brings_a_draft_model_nearer(divergence):
  learner = Learner(*_start('draft_lm', divergence=divergence, draft_vocab_size=None))
  before, _, gradients = learner(_batch())
  scale = 0.05 / optax.tree.norm(gradients)
  learner.params = jax.tree.map(lambda p, g: p - scale * g, learner.params, gradients)
  assert learner(_batch())[0] < before


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
  options = {'steps': 3, 'draft_vocab_size': 16}
  draft_objective, draft, target = _start('eagle3', **options)
  zoo.shake(draft, 2, 0.2)
  folder = tmp_path / 'head'
  export.save_head(folder, draft, objective='eagle3', options=options, facts={})
  objective = get_objective(
    'acceptance', dict(drafter=str(folder), rounds=4, collect_drafts=5, num_drafts=5, num_blocks=1)
  )
  judged = objective.init(nnx.Rngs(4), target, zoo.COUNTS)
  assert objective.taps(target.config) == draft_objective.taps(target.config)
  learner, batch = Learner(objective, judged, target), _batch()
  paths = jax.tree_util.tree_leaves_with_path(learner.params)
  assert not any('drafter' in jax.tree_util.keystr(path) for path, _ in paths)
  history = [learner.learn(batch, step, 1e-2)[1] for step in range(30)]
  late = {name: np.mean([h[name] for h in history[-10:]]) for name in history[0]}
  early = {name: np.mean([h[name] for h in history[:3]]) for name in history[0]}
  assert late['divergence'] < early['divergence']
  nnx.update(judged, learner.params)

  assert objective.make_drafter is not None
  drafter = objective.make_drafter(judged, target)
  place = objective.place(nnx.state(target), nnx.state(judged))
  request = loop_zoo.make_request({'temperature': 1.0})
  model = zoo.make_setup(target, draft).model

  def decode(drafter, params):
    run = functools.partial(
      decodax.decode, model=model, drafter=drafter, verifier=verifiers.coupled
    )
    return jax.device_get(loop_zoo.Compiled(run)(params, request))

  stopped = decode(drafter, place)
  loop_zoo.assert_same_output(stopped, decode(drafters.plain(), Params(nnx.state(target))))
  drafted, calls = stopped.stats.num_drafted.sum(), stopped.stats.num_target_calls.sum()
  assert 2 * calls <= drafted < 5 * calls  # never fewer than two, and not always all five


@pytest.mark.slow
def test_collected_labels_are_the_ratios_of_the_laws():
  """Acceptance by the book: p/q at the draft, of laws computed anew from the text."""
  _, head, target = _start('draft_lm')
  zoo.shake(head, 2, 0.3)
  tape = make_tape(target, _batch())
  data = loop_zoo.Compiled(
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


@pytest.mark.parametrize('name', HEADS)
def test_a_head_with_default_options_can_be_saved(name):
  objective = get_objective(name)
  assert objective.make_drafter is not None
  head = nnx.eval_shape(lambda: objective.init(nnx.Rngs(0), zoo.target(), zoo.COUNTS))
  # No checkpoint can hold an array without elements.
  assert all(leaf.size for leaf in jax.tree.leaves(nnx.state(head)))


def test_the_written_head_drafts_as_before(tmp_path):
  """Saved, loaded and put to work: a folder is all that decoding needs."""
  options = {'steps': 3, 'draft_vocab_size': 16}
  _, head, target = _start('eagle3', **options)
  export.save_head(tmp_path / 'h', head, objective='eagle3', options=options, facts={})
  config = json.loads((tmp_path / 'h' / 'config.json').read_text())
  assert config['objective'] == 'eagle3'
  loaded = export.load_head(tmp_path / 'h', target)
  tokens, length = _batch().tokens, jnp.full((ROWS,), 9)
  by_the_book = loop_zoo.Compiled(
    lambda state: zoo.chain_laws(
      nnx.merge(nnx.graphdef(head), state), target, tokens, length, depth=3
    )
  )
  before, after = (by_the_book(nnx.state(h)) for h in (head, loaded.head))
  np.testing.assert_array_equal(before, after)
  assert head_expander(loaded.head, target).draft_vocab_size == 16


def test_going_through_the_vocabulary_once_changes_nothing():
  """`_heads.teach` saves most of the teacher's work with a draft vocabulary, and no number."""
  target, batch = zoo.target(), _batch(split=13)
  tape = make_tape(target, batch)
  vocabulary = make_vocabulary(zoo.COUNTS, 16)
  assert vocabulary is not None and tape.hidden is not None
  vectors = jnp.asarray(np.random.default_rng(1).standard_normal(tape.hidden.shape), jnp.float32)
  teacher = _heads.teach(tape, target, vocabulary)
  whole = teacher._replace(p_fn=target.unembed, summary=None)

  def draft_logits(x):
    return target.unembed(x, vocabulary.ids[...])

  compared = [
    loop_zoo.Compiled(
      lambda x, each=each: _heads.compare_at(tape, each, draft_logits, x, 3, losses.forward_kl)
    )(vectors)
    for each in (teacher, whole)
  ]
  found, expected = compared
  assert 0 < expected.comparison.covered.mean() < 1
  counted = np.asarray(found.weights) > 0
  for a, b in zip(found.comparison, expected.comparison, strict=True):
    np.testing.assert_allclose(a[counted], b[counted], rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match='give keep'):
    losses.compare(teacher.p_fn, draft_logits, vectors, vectors, summary=teacher.summary)

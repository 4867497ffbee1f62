"""Masked diffusion: what is masked, what sees what, what is learnt, and that runs resume."""

import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig
from models.diffusion import load_diffusion
from models.hf import load_hf
from models.transformer import Transformer
from train import list_tasks
from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig
from train.objective import get_objective
from train.objectives import d2f
from train.objectives import dparallel
from train.objectives import masked_diffusion as md
from train.run import Outcome
from train.run import Run
from train.tape import Batch
from train.tape import Tape
from train.tape import make_tape

VOCAB_SIZE, MASK, LENGTH = 20, 20, 24
SIZES = {'hidden_size': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1,
         'intermediate_size': 24}  # fmt: skip


def make_batch(seed=0, rows=4) -> Tape:
  """Returns documents of 9 and 11 tokens in each row, prompts of 3 tokens, then padding."""
  rng = np.random.default_rng(seed)
  segments = np.repeat([1, 2, 0], [9, 11, 4])[None].repeat(rows, 0)
  positions = np.concatenate([np.arange(9), np.arange(11), np.zeros(4)])[None].repeat(rows, 0)
  mask = (positions >= 3) & (segments > 0)
  batch = Batch(
    jnp.asarray(np.where(segments > 0, rng.integers(0, VOCAB_SIZE, segments.shape), 0), jnp.int32),
    jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.asarray(mask),
  )  # fmt: skip
  return make_tape(None, batch)


@pytest.fixture(scope='module')
def head():
  config = TransformerConfig(
    vocab_size=VOCAB_SIZE + 1, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, intermediate_size=24, tie_embeddings=True,
  )  # fmt: skip
  return Transformer(config, rngs=nnx.Rngs(0))


# --- Noise ----------------------------------------------------------------------------------------


def test_only_what_is_worth_predicting_is_masked_at_the_documents_rate():
  tape = make_batch(rows=400)
  noise = jax.jit(lambda key: md.draw_noise(tape, key, 1e-3, 1.0))(jax.random.key(0))
  masked, rate = np.asarray(noise.masked), np.asarray(noise.rate)
  assert not masked[~np.asarray(tape.loss_mask)].any()
  assert (rate[:, :9] == rate[:, :1]).all() and (rate[:, 9:20] == rate[:, 9:10]).all()
  rates = np.concatenate([rate[:, 0], rate[:, 9]])
  # Evenly spread: every tenth of the range has its share of the 800 documents, within a tenth.
  counts = np.histogram(rates, 10, (0, 1))[0]
  assert (abs(counts - 80) < 8).all(), counts
  assert abs((masked[:, 3:9].mean(1) - rate[:, 0]).mean()) < 0.03


def test_blocks_have_rates_of_their_own():
  tape = make_batch()
  rate = np.asarray(md.draw_noise(tape, jax.random.key(1), 1e-3, 1.0, 4).rate)
  assert rate[0, 0] == rate[0, 3] != rate[0, 4] == rate[0, 7]


# --- What sees what -------------------------------------------------------------------------------


def hidden_of(head, tape, masked, mask):
  return np.asarray(md.predict(head, tape, masked, mask, MASK))


def test_documents_see_themselves_only(head):
  tape = make_batch()
  nothing = jnp.zeros_like(tape.loss_mask)
  mask = md.document_mask(tape.segments)
  before = hidden_of(head, tape, nothing, mask)
  changed = tape._replace(tokens=tape.tokens.at[:, 15].add(1))
  after = hidden_of(head, changed, nothing, mask)
  np.testing.assert_array_equal(before[:, :9], after[:, :9])
  assert (np.abs(before[:, 9:20] - after[:, 9:20]).max(-1) > 0).all()


def test_the_mask_of_adaptation_opens_from_causal_to_full(head):
  tape = make_batch()
  key = jax.random.key(0)
  closed = md.annealed_mask(tape.segments, jnp.float32(0), key)
  np.testing.assert_array_equal(closed[:, :20], tape.mask()[:, :20])
  half = md.annealed_mask(tape.segments, jnp.float32(0.5), key)
  full = md.annealed_mask(tape.segments, jnp.float32(1), key)
  np.testing.assert_array_equal(full, md.document_mask(tape.segments))
  assert closed.sum() < half.sum() < full.sum()
  # Closed, and nothing masked, it is the autoregressive model.
  nothing = jnp.zeros_like(tape.loss_mask)
  output, _ = head(tape.tokens, tape.positions, tape.mask())
  np.testing.assert_array_equal(hidden_of(head, tape, nothing, closed), output.hidden)
  shifted = md.shift_right(output.hidden)
  np.testing.assert_array_equal(shifted[:, 1:], output.hidden[:, :-1])


def test_a_noisy_block_is_predicted_from_itself_and_the_clean_past(head):
  size = 4
  tape = make_batch()
  masked = tape.loss_mask & (jnp.arange(LENGTH) % 2 == 0)[None]
  found = np.asarray(md.predict_blocks(head, tape, masked, size, MASK))
  for first in (0, 4, 8):  # blocks of the second document, one at a time
    stop = min(first + size, 11)
    tokens = tape.tokens[:, 9 : 9 + stop]
    noisy = jnp.where(masked[:, 9 : 9 + stop], MASK, tokens)
    inputs = jnp.concatenate([tokens[:, :first], noisy[:, first:]], axis=1)
    block = jnp.arange(stop) // size
    mask = jnp.broadcast_to((block[:, None] >= block[None])[None], (4, stop, stop))
    positions = jnp.broadcast_to(jnp.arange(stop)[None], inputs.shape)
    output, _ = head(inputs, positions, mask)
    np.testing.assert_allclose(found[:, 9 + first : 9 + stop], output.hidden[:, first:], atol=2e-5)


# --- Losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'block_size': 4},
    {'weighting': 'uniform', 'lowest_rate': 0.3, 'highest_rate': 0.8},
  ],
)
def test_only_masked_tokens_are_learnt(options, head):
  objective = get_objective('masked_diffusion', {**SIZES, **options})
  tape = make_batch()
  key, step = jax.random.key(3), jnp.int32(0)
  noise_key, _ = jax.random.split(key)
  noise = md.draw_noise(
    tape, noise_key, options.get('lowest_rate', 1e-3), options.get('highest_rate', 1.0),
    options.get('block_size'),
  )  # fmt: skip
  graph, state = nnx.split(head)

  def loss(tokens):
    labels = tape._replace(tokens=tokens)
    return objective.loss(nnx.merge(graph, state), None, labels, key, step)

  found = loss(tape.tokens)
  if options.get('block_size'):
    hidden = md.predict_blocks(head, tape, noise.masked, 4, MASK)
  else:
    hidden = md.predict(head, tape, noise.masked, md.document_mask(tape.segments), MASK)
  log_p = jax.nn.log_softmax(head.unembed(hidden), -1)
  each = -np.take_along_axis(np.asarray(log_p), np.asarray(tape.tokens)[..., None], -1)[..., 0]
  scale = 1 if 'weighting' in options else 1 / np.asarray(noise.rate)
  masked = np.asarray(noise.masked)
  np.testing.assert_allclose(found.total, (each * scale)[masked].sum(), rtol=1e-5)
  weight = masked.sum() if 'weighting' in options else np.asarray(tape.loss_mask).sum()
  np.testing.assert_allclose(found.weight, weight)


def test_the_weighted_loss_does_not_depend_on_the_rates():
  # A network that knows nothing but the frequencies loses the same nats at any rate.
  class Flat:
    config = TransformerConfig(VOCAB_SIZE + 1, 8, 1, 1, 1, 8, 8)

    def __call__(self, tokens, positions, mask):
      from decodax.types import ModelOutput

      return ModelOutput(jnp.zeros((*tokens.shape, 8))), None

    def unembed(self, hidden):
      return jnp.zeros((*hidden.shape[:-1], VOCAB_SIZE + 1))

  tape = make_batch(rows=600)
  for lowest, highest in ((1e-3, 1.0), (0.3, 0.5), (0.8, 1.0)):
    objective = get_objective('masked_diffusion', {'lowest_rate': lowest, 'highest_rate': highest})
    found = objective.loss(Flat(), None, tape, jax.random.key(0), jnp.int32(0))
    mean = float(found.total / found.weight)
    assert abs(mean - np.log(VOCAB_SIZE + 1)) < 0.15, (lowest, highest, mean)


def test_dparallel_presses_the_entropy_of_right_predictions_only(head):
  tape = make_batch()
  active, later, draw = dparallel.draw_blocks(tape, jax.random.key(0), 4, 0.5, 0.5)
  active, later, draw = (np.asarray(a) for a in (active, later, draw))
  assert not (active & later).any() and not (active & ~np.asarray(tape.loss_mask)).any()
  # Each answer has one active block; its two copies share it out.
  for row in range(4):
    for first, last in ((3, 9), (12, 20)):
      assert 1 <= active[row, first:last].sum() <= 4
  copies = (active & draw).astype(int) + (active & ~draw)
  np.testing.assert_array_equal(copies, active)

  graph, state = nnx.split(head)
  scored = jnp.asarray(active)

  def gradient(tokens, weight):
    def total(state):
      labels = tape._replace(tokens=tokens)
      found = dparallel.certainty_loss(nnx.merge(graph, state), labels, scored,
                                       scored | jnp.asarray(later), MASK, weight, 0.5)  # fmt: skip
      return found.total

    return jax.grad(total)(state)

  hidden = md.predict(
    head, tape, jnp.asarray(active | later), md.document_mask(tape.segments), MASK
  )
  best = jnp.argmax(head.unembed(hidden), -1)
  wrong = jnp.where(jnp.asarray(active), (best + 1) % VOCAB_SIZE, tape.tokens)
  jax.tree.map(np.testing.assert_array_equal, gradient(wrong, 0.0), gradient(wrong, 2.0))
  right = jnp.where(jnp.asarray(active), best, tape.tokens)
  some, none = gradient(right, 2.0), gradient(right, 0.0)
  assert any(
    (np.asarray(a) != np.asarray(b)).any()
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(none), strict=True)
  )


def test_d2f_masks_later_blocks_more():
  tape = make_batch(rows=300)
  draw = jax.jit(lambda key: d2f.draw_rising(tape, key, 4, 0.2, 0.7, 1.0))
  masked, rate = (np.asarray(a) for a in draw(jax.random.key(0)))
  assert not masked[~np.asarray(tape.loss_mask)].any()
  for blocks in (((3, 4), (4, 8), (8, 9)), ((12, 13), (13, 17), (17, 20))):
    rates = np.stack([rate[:, start] for start, _ in blocks], axis=1)
    for number, (start, stop) in enumerate(blocks):
      assert (rate[:, start:stop] == rates[:, number : number + 1]).all()
    assert (rates[:, 0] >= 0.2).all() and (rates[:, 0] < 0.7).all()
    assert (np.diff(rates, axis=1) >= 0).all() and (rates <= 1).all()
    np.testing.assert_allclose(rates.mean(0), [0.45, 0.725, 0.908], atol=0.05)
    start, stop = blocks[-1]
    assert abs(masked[:, start:stop].mean() - rates[:, -1].mean()) < 0.05


def test_d2f_learns_the_laws_of_a_teacher_that_sees_more(head):
  tape, key, step = make_batch(), jax.random.key(3), jnp.int32(0)
  for size in (4, 64):
    options = {'mask_id': MASK, 'block_size': size, 'highest_rate': 1.0}
    found = get_objective('d2f', options).loss(head, head, tape, key, step)
    noise = d2f.draw_rising(tape, key, size, 0.2, 0.7, 1.0)
    whole = md.document_mask(tape.segments)
    block = tape.positions // size
    seen = whole & (block[:, None, :] <= block[:, :, None])
    p, q = (
      jax.nn.log_softmax(head.unembed(md.predict(head, tape, noise.masked, mask, MASK)), -1)
      for mask in (whole, seen)
    )
    each = -(jnp.exp(p) * q).sum(-1) / noise.rate
    masked = np.asarray(noise.masked)
    np.testing.assert_allclose(found.total, np.asarray(each)[masked].sum(), rtol=1e-5)
    np.testing.assert_allclose(found.weight, masked.sum())
    same = jnp.argmax(p, -1) == jnp.argmax(q, -1)
    agreement = found.metrics['agreement']
    np.testing.assert_allclose(agreement.total, np.asarray(same)[masked].sum())
    apart = np.abs(np.asarray(p - q))[masked].max()
    assert apart == 0 if size == 64 else apart > 1e-3


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('masked_diffusion', {'weighting': 'none'}),
    ('masked_diffusion', {'lowest_rate': 0.0}),
    ('masked_diffusion', {'from_target': True}),
    ('masked_diffusion', {'from_target': True, 'mask_id': 3, 'block_size': 4}),
    ('d2f', {'mask_id': 3, 'block_size': 0}),
    ('d2f', {'mask_id': 3, 'highest_rate': 0.6}),
    ('dparallel', {'mask_id': 3, 'block_size': 0}),
    ('dparallel', {'mask_id': 3, 'lowest_rate': 0.9}),
  ],
)
def test_senseless_options_are_refused(name, options):
  with pytest.raises(ValueError):
    get_objective(name, options)


# --- Runs -----------------------------------------------------------------------------------------


def tiny_config(tmp_path, **options) -> TrainConfig:
  path = tmp_path / 'tasks.jsonl'
  if not path.exists():
    lines = []
    for example in list_tasks.examples(200, 0):
      prompt, canvas = list_tasks.to_ids(example.prompt), list_tasks.canvas_of(example)
      mask = [False] * len(prompt) + [True] * len(canvas)
      lines.append(json.dumps({'token_ids': prompt + canvas, 'loss_mask': mask}))
    path.write_text('\n'.join(lines))
  defaults = dict(
    objective='masked_diffusion', options=dict(SIZES),
    data=DataConfig(sources=(str(path),), tokenizer=str(list_tasks.TOKENIZER), sequence_length=64,
                    num_held_out=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
    eval=EvalConfig(every=0, num_prompts=4),
    checkpoint=CheckpointConfig(every=2, keep_last=2),
    num_steps=4, batch_size=4, log_every=2,
  )  # fmt: skip
  return TrainConfig(**{**defaults, **options})


def same_export(a, b):
  for name in ('model.safetensors',):
    assert (a / 'export' / name).read_bytes() == (b / 'export' / name).read_bytes()


def test_a_run_resumes_to_the_bit_and_its_network_loads(tmp_path):
  config = tiny_config(tmp_path)
  whole, parted = tmp_path / 'whole', tmp_path / 'parted'
  assert Run(config, whole, show=False).train() is Outcome.FINISHED
  first = Run(config, parted, show=False)
  steps = iter([False, False, False])

  class Killed(Exception):
    pass

  inner = first._batch

  def batch(step):
    if next(steps, True):
      raise Killed
    return inner(step)

  first._batch = batch
  with pytest.raises(Killed):
    first.train()
  assert Run(config, parted, show=False).train() is Outcome.FINISHED
  same_export(whole, parted)
  loaded = load_diffusion(whole / 'export', dtype=jnp.float32)
  assert (loaded.net.mask_id, loaded.net.shifted, loaded.net.block_size) == (
    len(list_tasks.VOCABULARY),
    False,
    None,
  )
  assert loaded.eos_ids == (list_tasks.EOS_ID,)


def test_adapting_an_autoregressive_target_resumes_to_the_bit(tmp_path):
  language = tiny_config(
    tmp_path, objective='language_model', options={**SIZES, 'as_target': True}, num_steps=2
  )
  assert Run(language, tmp_path / 'ar', show=False).train() is Outcome.FINISHED
  options = {'from_target': True, 'mask_id': 1, 'anneal_steps': 3}
  config = tiny_config(
    tmp_path, target=str(tmp_path / 'ar' / 'export'), options=options,
    data=dataclasses.replace(language.data, tokenizer=''),
  )  # fmt: skip
  whole, parted = tmp_path / 'whole', tmp_path / 'parted'
  assert Run(config, whole, show=False).train() is Outcome.FINISHED
  # The same run, killed after its second checkpoint was written and started anew.
  first = Run(config, parted, show=False)
  inner = first._batch
  first._batch = lambda step: inner(step) if step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
  with pytest.raises(KeyboardInterrupt):
    first.train()
  assert Run(config, parted, show=False).train() is Outcome.FINISHED
  same_export(whole, parted)
  target = load_hf(tmp_path / 'ar' / 'export', dtype=jnp.float32).transformer
  adapted = load_diffusion(whole / 'export', dtype=jnp.float32)
  assert (adapted.net.mask_id, adapted.net.shifted, adapted.net.block_size) == (1, True, None)
  embeddings = adapted.params['embedding'][...], nnx.state(target)['embedding'][...]
  assert np.any(np.asarray(embeddings[0]) != np.asarray(embeddings[1]))

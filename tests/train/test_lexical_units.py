"""Paddings behind a text: read as decoding reads them, and taught what continues a unit."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from models.transformer import Transformer
from tests.decodax.zoo import Compiled
from train.objectives import lexical_units
from train.tape import Batch
from train.tape import make_tape

_CONFIG = TransformerConfig(
  vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
  intermediate_size=24,
)  # fmt: skip
_LENGTHS = (9, 6)  # of two documents, then padding
_PAD, _D = 10, 3


def _batch():
  rng = np.random.default_rng(0)
  segments = [1] * _LENGTHS[0] + [2] * _LENGTHS[1] + [0]
  positions = [*range(_LENGTHS[0]), *range(_LENGTHS[1]), 0]
  tokens = [*rng.integers(0, 10, sum(_LENGTHS)).tolist(), 0]
  mask = [segment > 0 for segment in segments]
  columns = (tokens, positions, segments, mask)
  return Batch(*(jnp.asarray([column]) for column in columns))


def test_paddings_are_read_as_decoding_reads_them():
  target, batch = Transformer(_CONFIG, rngs=nnx.Rngs(0)), _batch()
  tape = make_tape(None, batch)
  places = jnp.asarray([[3, 11, 14]])
  tokens, positions, mask = lexical_units.with_paddings(tape, places, _PAD, _D)
  read = Compiled(lambda *args: target(*args)[0].hidden[0])
  hidden = np.asarray(read(tokens, positions, mask))
  text = np.asarray(read(batch.tokens, batch.positions, tape.mask()))
  np.testing.assert_allclose(hidden[: len(text)], text, atol=1e-6)
  for index, place in enumerate((3, 11, 14)):
    start = 0 if place < _LENGTHS[0] else _LENGTHS[0]
    own = [*np.asarray(batch.tokens)[0, start : place + 1].tolist(), *[_PAD] * _D]
    row = own + [0] * (len(text) - len(own))  # one shape: what stands behind is not seen
    causal = jnp.tril(jnp.ones((1, len(row), len(row)), bool))
    alone = read(jnp.asarray([row]), jnp.arange(len(row))[None], causal)[len(own) - _D : len(own)]
    first = len(text) + index * _D
    np.testing.assert_allclose(hidden[first : first + _D], alone, atol=1e-5)


def test_paddings_learn_the_rest_of_a_unit():
  batch = _batch()
  tape, tokens = make_tape(None, batch), np.asarray(batch.tokens)[0]
  segments = np.asarray(batch.segments)[0]
  in_unit = np.random.default_rng(1).random((1, len(tokens))) < 0.7
  places = jnp.asarray([list(range(len(tokens)))])
  labels, weights = lexical_units.padding_labels(tape, jnp.asarray(in_unit), places, _D)
  labels, weights = (np.asarray(a).reshape(-1, _D) for a in (labels, weights))
  for place in range(len(tokens)):
    going = True
    for step in range(_D):
      target = place + 2 + step
      real = target < len(tokens) and segments[target - 1] == segments[place]
      going = going and real and bool(in_unit[0, target - 1])
      assert weights[place, step] == going
      if going:
        assert labels[place, step] == tokens[target]
  assert 0 < weights.sum() < weights.size


def test_places_differ_and_stay_in_the_row():
  tape = make_tape(None, _batch())
  places = np.asarray(lexical_units.draw_places(tape, jax.random.key(0), 8))[0]
  assert len(set(places.tolist())) == 8 and places.min() >= 0 and places.max() < 16
  again = np.asarray(lexical_units.draw_places(tape, jax.random.key(1), 8))[0]
  assert set(places.tolist()) != set(again.tolist())


def test_a_step_down_the_gradient_lowers_the_loss():
  target = Transformer(_CONFIG, rngs=nnx.Rngs(0))
  objective = lexical_units.make_objective(pad_id=_PAD, num_places=6, likelihood=0.0)
  graph, params = nnx.split(target)
  tape = make_tape(target, _batch())

  def total(params):
    return objective.loss(
      nnx.merge(graph, params), target, tape, jax.random.key(0), jnp.int32(0)
    ).total

  before, gradient = Compiled(jax.value_and_grad(total))(params)
  step = jax.tree.map(lambda p, g: p - 1e-2 * g, params, gradient)
  assert float(Compiled(total)(step)) < float(before)

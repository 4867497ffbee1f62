"""Shifts never cross documents, and packed documents are read as if each stood alone."""

from flax import nnx
import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from models.transformer import Transformer
from train.tape import Batch
from train.tape import causal_mask
from train.tape import make_tape
from train.tape import shift_left
from train.tape import supervised

_SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3]])


def test_a_shift_stays_in_its_document():
  x = jnp.arange(1, 13).reshape(2, 6)
  shifted, ok = shift_left(x, 1, _SEGMENTS)
  np.testing.assert_array_equal(ok, [[1, 1, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0]])
  np.testing.assert_array_equal(shifted, [[2, 3, 0, 5, 0, 0], [8, 0, 10, 0, 12, 0]])
  _, ok = shift_left(x, 2, _SEGMENTS)
  np.testing.assert_array_equal(ok, [[1, 0, 0, 0, 0, 0], [0] * 6])


def test_a_shift_of_vectors_and_of_nothing():
  x = jnp.arange(24.0).reshape(2, 6, 2)
  np.testing.assert_array_equal(shift_left(x, 0, jnp.ones_like(_SEGMENTS))[0], x)
  shifted, _ = shift_left(x, 1, _SEGMENTS)
  np.testing.assert_array_equal(shifted[0, 0], x[0, 1])
  np.testing.assert_array_equal(shifted[0, 2], [0, 0])


def test_supervised_counts_only_masked_tokens_ahead():
  mask = jnp.array([[0, 0, 1, 1, 1, 0]] * 2, bool)
  batch = Batch(jnp.zeros((2, 6), jnp.int32), jnp.zeros((2, 6), jnp.int32), _SEGMENTS, mask)
  np.testing.assert_array_equal(supervised(batch, 1), [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]])


def test_the_mask_is_causal_within_documents():
  mask = np.asarray(causal_mask(_SEGMENTS))
  for row, query, key in np.ndindex(*mask.shape):
    segments = np.asarray(_SEGMENTS[row])
    same = segments[query] == segments[key] and segments[query] > 0 and key <= query
    assert mask[row, query, key] == (same or (query == key and segments[query] == 0))


def test_packed_documents_read_as_if_alone():
  config = TransformerConfig(
    vocab_size=40, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=24,
  )  # fmt: skip
  target = Transformer(config, rngs=nnx.Rngs(0))
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 40, (1, 11)))
  segments = jnp.array([[1] * 6 + [2] * 4 + [0]])
  positions = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0]])
  packed = make_tape(target, Batch(tokens, positions, segments, segments > 0), taps=(1, 3))
  for piece in (slice(0, 6), slice(6, 10)):
    ones = jnp.ones_like(tokens[:, piece])
    alone = Batch(tokens[:, piece], positions[:, piece], ones, ones > 0)
    tape = make_tape(target, alone, taps=(1, 3))
    assert tape.hidden is not None and packed.hidden is not None
    np.testing.assert_allclose(packed.hidden[:, piece], tape.hidden, atol=2e-6)
    for name in ('layer_1', 'layer_3'):
      np.testing.assert_allclose(packed.taps[name][:, piece], tape.taps[name], atol=2e-6)


def test_no_target_gives_no_hidden_state():
  ones = jnp.ones((1, 4), jnp.int32)
  tape = make_tape(None, Batch(ones, ones, ones, ones > 0))
  assert tape.hidden is None and not tape.taps

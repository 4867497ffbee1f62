"""Draft vocabularies: which tokens are kept, and that laws stay laws over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.heads.acceptance import AcceptanceConfig
from models.heads.acceptance import AcceptanceHead
from models.heads.vocabulary import DraftVocabulary
from models.heads.vocabulary import make_vocabulary
from tests.models.heads import zoo

COUNTS = np.array([5, 0, 9, 0, 7, 1])


def _ids(vocabulary):
  return vocabulary.ids[...].tolist()


def test_the_most_frequent_tokens_are_kept_and_their_ids_rise():
  assert _ids(make_vocabulary(COUNTS, 3)) == [0, 2, 4]
  assert _ids(make_vocabulary(COUNTS, 3, always=(3,))) == [2, 3, 4]
  assert _ids(make_vocabulary(COUNTS, 5)) == [0, 1, 2, 4, 5]  # of equal counts the lowest id
  assert make_vocabulary(COUNTS, None) is None and make_vocabulary(COUNTS, 6) is None


@pytest.mark.parametrize(
  ('size', 'always', 'message'),
  [(0, (), '1 to 6'), (7, (), '1 to 6'), (1, (2, 3), '2 to 6')],
)
def test_a_size_out_of_range_is_refused(size, always, message):
  with pytest.raises(ValueError, match=f'{message} tokens: size={size}'):
    make_vocabulary(COUNTS, size, always)


@pytest.mark.parametrize(
  ('ids', 'message'),
  [([2, 1], 'rise strictly'), ([1, 1], 'rise strictly'), ([0, 6], '0 to 5'), ([-1, 2], '0 to 5')],
)
def test_ids_that_are_none_are_refused(ids, message):
  with pytest.raises(ValueError, match=message):
    DraftVocabulary(np.array(ids), 6)


def test_tokens_outside_are_impossible_and_the_others_keep_their_logits():
  vocabulary = DraftVocabulary(np.array([0, 2, 5]), 6)
  logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3)), jnp.float32)
  wide = vocabulary.widen(logits)
  np.testing.assert_array_equal(np.asarray(wide)[..., [0, 2, 5]], logits)
  assert np.isneginf(np.asarray(wide)[..., [1, 3, 4]]).all()
  np.testing.assert_array_equal(vocabulary.restrict(wide), logits)
  np.testing.assert_allclose(jax.nn.softmax(wide).sum(-1), 1, rtol=1e-6)
  tokens = jnp.array([[0, 1, 5]])
  np.testing.assert_array_equal(vocabulary.encode(tokens), [[0, 3, 2]])
  np.testing.assert_array_equal(vocabulary.contains(tokens), [[True, False, True]])


def test_some_columns_of_the_head_are_those_of_all():
  target = zoo.target()
  hidden = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, zoo.WIDTH)), jnp.float32)
  ids = jnp.array([1, 4, 20])
  some, every = target.unembed(hidden, ids), target.unembed(hidden)
  np.testing.assert_allclose(some, every[..., ids], rtol=1e-5)


@pytest.mark.parametrize('tied', [False, True])
def test_an_acceptance_head_is_its_formula(tied):
  head = zoo.shake(AcceptanceHead(AcceptanceConfig(4, 3, tied), rngs=zoo.nnx.Rngs(0)))
  x = expected = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
  assert head.kernel.shape[0] == (1 if tied else 3)
  for block in range(3):
    place = 0 if tied else block
    y = expected @ np.asarray(head.kernel[...][place]) + np.asarray(head.bias[...][place])
    expected = expected + y / (1 + np.exp(-y))
  logits = expected @ np.asarray(head.out[...]) + np.asarray(head.out_bias[...])
  np.testing.assert_allclose(head(jnp.asarray(x)), logits, rtol=1e-5)
  accepted = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
  np.testing.assert_allclose(head.probability(jnp.asarray(x)), accepted, rtol=1e-5)

"""Prompt tokens read by a transformer: the output is plain decoding's, guesses are their laws."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import decodax
from decodax import drafters
from decodax import static_trees
from decodax import verifiers
from models.heads import head_expander
from models.heads.ppd import PromptTokens
from models.heads.ppd import PromptTokensConfig
from models.heads.ppd import ppd_drafter
from models.heads.ppd import prompt_mask
from models.heads.ppd import read_prompts
from tests.decodax import zoo as loop_zoo
from tests.models.heads import zoo
from train import export
from train.objective import get_objective
from train.objectives.ppd import assumed_acceptance
from train.objectives.ppd import choose_anchors
from train.tape import Batch
from train.tape import make_tape

TREES = static_trees.ppd(assumed_acceptance(3, 0.4), 14)
SETUP = zoo.setup('ppd')  # two copies of four prompt tokens, of which three are used


@functools.cache
def _head(num_copies):
  config = PromptTokensConfig(zoo.WIDTH, 3, num_copies)
  return zoo.shake(PromptTokens(config, zoo.target(), rngs=nnx.Rngs(2)), 4)


@functools.cache
def _compiled(num_copies, verifier, **options):
  drafter = drafters.plain()
  if num_copies:
    drafter = ppd_drafter(_head(num_copies), zoo.target(), TREES)
  rule = verifiers.BY_NAME[verifier]
  return loop_zoo.Compiled(
    functools.partial(decodax.decode, model=SETUP.model, drafter=drafter, verifier=rule, **options)
  )


def _decode(num_copies, request, verifier='coupled'):
  own = nnx.state(_head(num_copies)) if num_copies else ()
  params = decodax.Params(SETUP.params.target, own)
  return jax.device_get(_compiled(num_copies, verifier)(params, request))


@pytest.mark.parametrize('num_copies', [1, 3])
def test_output_is_that_of_plain_decoding(num_copies):
  accepted = 0
  for sampling in (loop_zoo.MIXED, loop_zoo.GREEDY, {'temperature': 1.0}):
    request = loop_zoo.make_request(sampling)
    result, expected = _decode(num_copies, request), _decode(0, request)
    loop_zoo.assert_same_output(result, expected)
    assert np.all(result.stats.num_target_calls <= expected.stats.num_target_calls)
    accepted += int(result.stats.num_accepted.sum())
  assert accepted > 20


@pytest.mark.parametrize('rows', [[1], [6, 0, 3]])
def test_a_row_is_the_same_alone_and_in_any_company(rows):
  request = loop_zoo.make_request()
  whole = _decode(1, request)
  part = _decode(1, loop_zoo.take_rows(request, rows))
  loop_zoo.assert_same_output(part, loop_zoo.take_rows(whole, rows))
  for field, count in part.stats._asdict().items():
    np.testing.assert_array_equal(count, getattr(whole.stats, field)[rows], err_msg=field)


@pytest.mark.parametrize('num_copies', [1, 3])
def test_guesses_are_the_likeliest_tokens_by_the_book(num_copies):
  """After every round, from the whole text read anew with prompt tokens behind it."""
  head, target = _head(num_copies), zoo.target()
  drafter = ppd_drafter(head, target, TREES)
  params = decodax.Params(nnx.state(target), nnx.state(head))

  @loop_zoo.Compiled
  def start(params, request):
    state = decodax.init_state(params, request, model=SETUP.model, drafter=drafter)
    return decodax.prefill(params, state, model=SETUP.model, drafter=drafter)

  @loop_zoo.Compiled
  def step(params, state):
    after, info = decodax.speculative_step(
      params, state, model=SETUP.model, drafter=drafter, verifier=verifiers.coupled
    )
    own = nnx.merge(nnx.graphdef(head), params.drafter)
    again = nnx.merge(nnx.graphdef(target), params.target)
    return after, info, zoo.chain_laws(own, again, after.tokens, after.length, 3)

  request = loop_zoo.make_request({'temperature': 1.0}, eos_ids=[()] * loop_zoo.BATCH)
  state, states = start(params, request), set()
  num_ranks = state.drafter.guesses.shape[2]
  for _ in range(8):
    state, info, laws = step(params, state)
    live = np.asarray(state.result) == decodax.Result.RUNNING
    for row in np.flatnonzero(live & (np.asarray(info.num_emitted) > 0)):
      available = int(state.drafter.available[row])
      states.add(available)
      values = np.sort(laws[row], axis=1)[:, ::-1][:available, :num_ranks]
      found = np.take_along_axis(laws[row], state.drafter.guesses[row], axis=1)[:available]
      np.testing.assert_allclose(found, values, atol=1e-3)
  assert len(states) > 1


def test_sampled_output_has_the_law_of_the_target():
  """Chi-square of the second and third of three tokens: the first round has no drafts."""
  num_rows, prompt = 2048, [3, 1, 4, 1, 5]
  request = decodax.make_request(
    [prompt] * num_rows, max_new_tokens=3, vocab_size=zoo.VOCAB_SIZE, temperature=1.0, capacity=16
  )
  result = _decode(1, request, 'sample_and_match')
  assert result.stats.num_accepted.sum() > 100
  tokens = result.tokens[:, len(prompt) + 1 : len(prompt) + 3]
  counts = np.bincount(tokens[:, 0] * zoo.VOCAB_SIZE + tokens[:, 1], minlength=zoo.VOCAB_SIZE**2)
  expected = num_rows * _law_of_later(prompt).reshape(-1)
  common = expected >= 5
  found = np.append(counts[common], counts[~common].sum())
  wanted = np.append(expected[common], expected[~common].sum())
  assert stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 1e-3


def _law_of_later(prompt):
  """Returns f64[V, V], the target's law of the second and third token after a prompt."""
  target, size = zoo.target(), zoo.VOCAB_SIZE

  @loop_zoo.Compiled
  def law(tokens):
    hidden = zoo.read(target, SETUP.head, tokens)[0].hidden
    return jax.nn.softmax(target.unembed(hidden[:, len(prompt) - 1 :]))

  pairs = np.stack(np.divmod(np.arange(size**2), size), axis=1)
  texts = np.concatenate([np.tile(prompt, (size**2, 1)), pairs], axis=1)
  laws = np.asarray(law(jnp.asarray(texts, jnp.int32)), np.float64).reshape(size, size, 3, size)
  first, second, third = laws[0, 0, 0], laws[:, 0, 1], laws[:, :, 2]
  return np.einsum('a,ab,abc->bc', first, second, third)


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(('anchors', 'prompts', 'copies'), [(1, 3, 1), (2, 3, 2), (3, 1, 4)])
def test_the_mask_is_brute_force(anchors, prompts, copies):
  names = [(a, k, c) for a in range(anchors) for k in range(prompts) for c in range(copies)]
  wanted = [[a == b and c == d and j <= k for b, j, d in names] for a, k, c in names]
  np.testing.assert_array_equal(prompt_mask(anchors, prompts, copies), wanted)


def _batch():
  rng, length = np.random.default_rng(0), 24
  tokens = jnp.asarray(rng.integers(0, zoo.VOCAB_SIZE, (2, length)), jnp.int32)
  place = np.tile(np.r_[np.arange(10), np.arange(11), np.zeros(3, int)], (2, 1))
  segments = np.tile(np.repeat([1, 2, 0], [10, 11, 3]), (2, 1))
  return Batch(
    tokens, jnp.asarray(place, jnp.int32), jnp.asarray(segments, jnp.int32),
    jnp.asarray((place >= 4) & (segments > 0)),
  )  # fmt: skip


def test_anchors_are_places_that_teach():
  tape = make_tape(zoo.target(), _batch())
  every = choose_anchors(tape, jax.random.key(0), 0)
  np.testing.assert_array_equal(every, np.tile(np.arange(24), (2, 1)))
  drawn = [np.asarray(choose_anchors(tape, jax.random.key(seed), 8)) for seed in range(20)]
  for anchors in drawn:
    assert all(len(set(row)) == 8 for row in anchors.tolist())
    assert {*anchors.reshape(-1).tolist()} <= {*range(2, 8), *range(12, 19)}
  assert {*np.stack(drawn).reshape(-1).tolist()} == {*range(2, 8), *range(12, 19)}


def test_only_prompt_tokens_learn_and_each_from_its_own_anchors():
  head, target, batch = _head(2), zoo.target(), _batch()
  assert [path for path, _ in nnx.to_flat_state(nnx.state(head))] == [('embeddings',)]
  tape = make_tape(target, batch)
  anchors = jnp.asarray([[3, 7, 15], [2, 12, 18]])

  @loop_zoo.Compiled
  def both(tokens, state):
    def read(target_state):
      prompts = nnx.merge(nnx.graphdef(head), state)
      own = nnx.merge(nnx.graphdef(target), target_state)
      return read_prompts(prompts, own, tokens, tape.positions, tape.mask(), anchors)[1]

    # The text is read without a gradient: none reaches the embeddings of its tokens.
    gradient = jax.grad(lambda target_state: read(target_state).sum())(nnx.state(target))
    return read(nnx.state(target)), gradient['embedding']

  own = nnx.state(head)
  hidden, gradient = both(batch.tokens, own)
  np.testing.assert_array_equal(gradient[...], 0)
  # What stands behind an anchor, or in another document, changes nothing.
  other = (batch.tokens.at[0, 8:10].add(1).at[1, 13].add(1)) % zoo.VOCAB_SIZE
  again, _ = both(other, own)
  np.testing.assert_allclose(again[0], hidden[0], atol=1e-4)
  np.testing.assert_allclose(again[1, :2], hidden[1, :2], atol=1e-4)
  assert np.abs(again[1, 2] - hidden[1, 2]).max() > 1e-3
  # A prompt token that is changed is seen by those after it of its own copy only.
  moved, _ = both(batch.tokens, jax.tree.map(lambda a: a.at[1, 0].add(1.0), own))
  changed = np.abs(moved - hidden).max(-1) > 1e-4  # [B, A, K, C]
  np.testing.assert_array_equal(changed[:, :, 0], False)
  np.testing.assert_array_equal(changed[:, :, :, 1], False)
  np.testing.assert_array_equal(changed[:, :, 1:, 0], True)


def test_the_written_prompt_tokens_draft_as_before(tmp_path):
  options = {'num_copies': 2, 'num_inputs': 10}
  objective, target = get_objective('ppd', options), zoo.target()
  head: Any = objective.init(nnx.Rngs(1), target, zoo.COUNTS)
  export.save_head(tmp_path / 'h', head, objective='ppd', options=options, facts={})
  loaded = export.load_head(tmp_path / 'h', target)
  again: Any = loaded.head
  np.testing.assert_array_equal(again.rows(), head.rows())
  shapes = [_made(each, head).shape for each in (loaded.objective, objective)]
  assert shapes[0] == shapes[1]


def _made(objective, head):
  assert objective.make_drafter is not None
  return objective.make_drafter(head, zoo.target())


def test_they_start_as_tokens_of_the_text():
  counts = np.zeros(zoo.VOCAB_SIZE, np.int64)
  counts[[3, 5]] = 100
  config = PromptTokensConfig(zoo.WIDTH, 3, 4)
  head = PromptTokens(config, zoo.target(), rngs=nnx.Rngs(0), token_counts=counts)
  table = np.asarray(zoo.target().embedding[...])[[3, 5]]
  same = (np.asarray(head.rows())[:, None] == table[None]).all(-1)
  assert same.any(1).all() and same.any(0).all()


# --- Misuse --------------------------------------------------------------------------------------


def test_nonsense_is_refused():
  head, target = _head(1), zoo.target()
  with pytest.raises(ValueError, match='want 4 prompt tokens of a node, 3 were trained'):
    ppd_drafter(head, target, static_trees.ppd(assumed_acceptance(4, 0.4), 16, max_prompts=4))
  with pytest.raises(ValueError, match='draft in the call that verifies'):
    head_expander(head, target)
  with pytest.raises(ValueError, match='num_prompts and num_copies must be at least 1'):
    PromptTokens(PromptTokensConfig(zoo.WIDTH, 3, 0), target, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='num_anchors must be at least 0'):
    get_objective('ppd', {'num_anchors': -1})
  with pytest.raises(ValueError, match='siblings add up'):
    get_objective('ppd', {'first_accuracy': 0.9})

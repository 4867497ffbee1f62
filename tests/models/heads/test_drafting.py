"""Heads in the decoding loop: lossless, aligned with the text, and as good as their weights."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import decodax
from decodax import controllers
from decodax import drafters
from decodax import static_trees
from decodax import verifiers
from decodax.decode import init_state
from decodax.decode import prefill
from decodax.types import Candidates
from models.heads import HEADS
from models.heads import head_expander
from models.heads import head_for_decoding
from models.heads import kind_of
from models.heads.recurrent import unroll
from tests.decodax import zoo as loop_zoo
from tests.models.heads import zoo

NAMES = sorted({*zoo.heads()} - {'ppd'})  # it has no expander: see test_ppd.py
BUSH = static_trees.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)])


def _chain(expander):
  return drafters.chain_drafter(expander, num_drafts=zoo.DEPTH)


def _stopped_chain(expander):
  # Rounds without drafts too: what the target read in them must reach the head all the same.
  controller = controllers.online([1.0, 1.05, 1.1, 1.2], lengths=(0, 1, 2, 4), memory=0.5)
  return drafters.chain_drafter(expander, num_drafts=zoo.DEPTH, controller=controller)


def _static(candidates):
  return lambda expander: drafters.static_tree(expander, BUSH, candidates=candidates)


def _eagle2(expander):
  return drafters.eagle2_tree(expander, num_nodes=10, max_depth=4, beam_width=3)


def _decode(setup, drafter, verifier, **options):
  return loop_zoo.Compiled(
    functools.partial(
      decodax.decode, model=setup.model, drafter=drafter, verifier=verifier, **options
    )
  )


@functools.cache
def _plain(sampling_name):
  setup = zoo.setup('eagle')
  sampling = getattr(loop_zoo, sampling_name)
  plain = _decode(setup, drafters.plain(), verifiers.coupled)
  return jax.device_get(plain(decodax.Params(setup.params.target), loop_zoo.make_request(sampling)))


def _cases(names, kind, make, **options):
  return [pytest.param(name, make, options, id=f'{name}-{kind}') for name in names]


_FIRST = ('medusa', 'hydra++', 'eagle3', 'kangaroo')  # one of each way to draft
_OTHERS = sorted({*NAMES} - {*_FIRST})
_VARIANTS = ('medusa-shared', 'eagle3-options')  # they draft as medusa and eagle3 do
_PLAIN = sorted({*NAMES} - {*_VARIANTS})
_DRAWN = _static(Candidates.WITHOUT_REPLACEMENT)
CASES = [
  *_cases(_PLAIN, 'chain', _chain, prefill_chunk=7),
  *_cases(_FIRST, 'eagle2', _eagle2),
  *_cases(('hydra++', 'kangaroo'), 'stopped', _stopped_chain, prefill_chunk=3),
  *_cases(('eagle',), 'static', _static(Candidates.DETERMINISTIC)),
  *_cases(('hydra',), 'drawn', _DRAWN),
]
SLOW_CASES = [
  *_cases(_VARIANTS, 'chain', _chain, prefill_chunk=7),
  *_cases(_OTHERS, 'eagle2', _eagle2),
  *_cases(sorted({*NAMES} - {'hydra++', 'kangaroo'}), 'stopped', _stopped_chain),
  *_cases(sorted({*NAMES} - {'hydra'}), 'drawn', _DRAWN, prefill_chunk=1),
]


@pytest.mark.parametrize(('name', 'make', 'options'), CASES)
def test_output_is_that_of_plain_decoding(name, make, options):
  _check_output(name, make, options)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'make', 'options'), SLOW_CASES)
def test_output_is_that_of_plain_decoding_with_every_drafter(name, make, options):
  _check_output(name, make, options)


def _check_output(name, make, options):
  setup = zoo.setup(name)
  drafter = make(head_expander(setup.head, setup.target))
  decode = _decode(setup, drafter, verifiers.coupled, **options)
  accepted = 0
  for sampling in ('MIXED', 'GREEDY'):
    request = loop_zoo.make_request(getattr(loop_zoo, sampling))
    result = jax.device_get(decode(setup.params, request))
    loop_zoo.assert_same_output(result, _plain(sampling))
    accepted += int(result.stats.num_accepted.sum())
  assert accepted > 0  # random heads are right now and then: some rounds accept a part


@pytest.mark.parametrize('name', NAMES)
def test_laws_are_those_of_the_head_by_the_book(name):
  """After any rounds of partial acceptance, and prompts read in chunks of any size."""
  setup = zoo.setup(name)
  drafter = _chain(head_expander(setup.head, setup.target))
  noise_fn = verifiers.coupled.draft_noise

  @loop_zoo.Compiled
  def start(params, request):
    state = init_state(params, request, model=setup.model, drafter=drafter, prefill_chunk=5)
    return prefill(params, state, model=setup.model, drafter=drafter, prefill_chunk=5)

  @loop_zoo.Compiled
  def step(params, state):
    proposal, _ = drafter.propose(params, state, noise_fn=noise_fn, with_laws=True)
    index = jnp.arange(zoo.DEPTH)[None] + state.length[:, None]
    rows = jnp.arange(state.tokens.shape[0])[:, None]
    tokens = state.tokens.at[rows, index].set(proposal.tokens[:, 1:], mode='drop')
    head = nnx.merge(nnx.graphdef(setup.head), params.drafter)
    target = nnx.merge(nnx.graphdef(setup.target), params.target)
    expected = zoo.chain_laws(head, target, tokens, state.length, zoo.DEPTH)
    after, info = decodax.speculative_step(
      params, state, model=setup.model, drafter=drafter, verifier=verifiers.coupled
    )
    assert proposal.laws is not None
    return after, info, proposal.laws[:, :-1], expected

  request = loop_zoo.make_request(
    {'temperature': 1.0}, max_new_tokens=30, eos_ids=[()] * loop_zoo.BATCH
  )
  state, compared, partial = start(setup.params, request), 0, 0
  for _ in range(8):
    text = np.asarray(state.length)
    state, info, laws, expected = step(setup.params, state)
    rows = (text >= 2) & (text + zoo.DEPTH < loop_zoo.CAPACITY)
    np.testing.assert_allclose(
      jax.nn.softmax(laws[rows]), jax.nn.softmax(expected[rows]), atol=1e-4
    )
    compared += rows.sum()
    accepted = np.asarray(info.verdict.num_accepted)
    partial += ((accepted > 0) & (accepted < zoo.DEPTH)).sum()
  assert compared > 40 and partial > 0


@pytest.mark.parametrize('name', ['eagle', 'eagle3-options'])
def test_unrolled_chains_are_drafted_chains(name):
  """Training unrolls the chains of all starts at once; also with a window shorter than a chain."""
  setup = zoo.setup(name)
  head, target, length = setup.head, setup.target, 20
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, zoo.VOCAB_SIZE, (2, length)))

  @loop_zoo.Compiled
  def unrolled(tokens):
    output, positions, mask = zoo.read(target, head, tokens)
    following = [jnp.roll(tokens, -k, axis=1) for k in range(1, zoo.DEPTH + 1)]
    embedded = [head.embed(target, each) for each in following]
    states = unroll(head, head.start(output), embedded, positions, mask)
    return jnp.stack([head.logits(target, state) for state in states], axis=2)

  laws = jax.nn.softmax(unrolled(tokens))
  by_the_book = loop_zoo.Compiled(functools.partial(zoo.chain_laws, head, target, depth=zoo.DEPTH))
  for text in (2, 7, 14):
    expected = jax.nn.softmax(by_the_book(tokens, jnp.full((2,), text)))
    np.testing.assert_allclose(laws[:, text - 2], expected, atol=1e-4)


def test_sampled_drafts_leave_the_law_of_the_target():
  """Chi-square over 2048 runs of two tokens. With laws that are not the drafts' own it rejects."""
  setup, num_rows, prompt = zoo.setup('eagle3'), 2048, [3, 1, 4, 1, 5]
  drafter = drafters.chain_drafter(head_expander(setup.head, setup.target), num_drafts=2)

  def propose(params, state, **options):
    proposal, own = drafter.propose(params, state, **options)
    return proposal._replace(laws=params.verifier * proposal.laws), own

  request = decodax.make_request(
    [prompt] * num_rows, max_new_tokens=2, vocab_size=zoo.VOCAB_SIZE, temperature=1.0, capacity=16
  )
  decode = _decode(setup, drafter._replace(propose=propose), verifiers.speculative)
  expected = num_rows * _law_of_two(prompt).reshape(-1)
  common = expected >= 5

  def p_value(sharpness):
    params = setup.params._replace(verifier=jnp.float32(sharpness))
    tokens = jax.device_get(decode(params, request)).tokens[:, len(prompt) :]
    counts = np.bincount(tokens[:, 0] * zoo.VOCAB_SIZE + tokens[:, 1], minlength=expected.size)
    found = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    return stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue

  assert p_value(1.0) > 1e-3
  assert p_value(0.3) < 1e-6


def _law_of_two(prompt):
  """Returns f64[V, V], the target's law of the next two tokens."""
  target = zoo.target()

  @loop_zoo.Compiled
  def law(tokens):
    hidden = zoo.read(target, zoo.heads()['medusa'], tokens)[0].hidden
    return jax.nn.softmax(target.unembed(hidden[:, len(prompt) - 1 :]))

  texts = np.array([[*prompt, token] for token in range(zoo.VOCAB_SIZE)])
  laws = np.asarray(law(jnp.asarray(texts)), np.float64)
  return laws[0, 0][:, None] * laws[:, 1]


# --- Heads that are right ------------------------------------------------------------------------


def _counting_target():
  """A target for which token x is followed by x + 1, and its streams hold one-hot tokens."""
  target = zoo.make_target()
  state = jax.tree.map(jnp.zeros_like, nnx.state(target.layers))
  nnx.update(target.layers, state)
  eye = jnp.eye(zoo.VOCAB_SIZE, zoo.WIDTH)
  target.embedding[...] = eye
  assert target.head is not None
  target.head[...] = 10 * _shift(1)
  target.final_norm.scale[...] = jnp.ones_like(target.final_norm.scale[...])
  return target


def _shift(steps):
  """f32[D, V]: the one-hot of x to the logits of x + steps."""
  return jnp.roll(jnp.eye(zoo.WIDTH, zoo.VOCAB_SIZE), steps, axis=1).at[zoo.VOCAB_SIZE :].set(0)


def _perfect_heads(target):
  heads = zoo.make_heads(target)
  for head in heads.values():
    nnx.update(head, jax.tree.map(jnp.zeros_like, nnx.state(head, nnx.Param)))
  eye, ones = jnp.eye(zoo.WIDTH), jnp.ones(zoo.WIDTH)
  heads['medusa'].heads[...] = jnp.stack([_shift(k + 2) for k in range(zoo.DEPTH)])
  for depth, head in enumerate(heads['hydra'].heads, 1):
    head.skip[...] = head.skip[...].at[depth * zoo.WIDTH :].set(eye)  # the last token drafted
    head.head[...] = _shift(1)
  heads['eagle'].fuse[...] = jnp.concatenate([eye, 0 * eye])
  kangaroo = heads['kangaroo']
  kangaroo.final_norm.scale[...] = ones
  return {name: heads[name] for name in ('medusa', 'hydra', 'eagle', 'kangaroo')}


@pytest.mark.parametrize('name', ['medusa', 'hydra', 'eagle', 'kangaroo'])
def test_a_perfect_head_is_always_right(name):
  target = _counting_target()
  setup = zoo.make_setup(target, _perfect_heads(target)[name])
  drafter = _chain(head_expander(setup.head, target))
  request = decodax.make_request(
    [[4, 5], [1, 2, 3], list(range(9))], max_new_tokens=20, vocab_size=zoo.VOCAB_SIZE, capacity=48
  )
  result = jax.device_get(_decode(setup, drafter, verifiers.coupled)(setup.params, request))
  counts = np.arange(20)[None] + np.array([[6], [4], [9]])
  for row, start in enumerate(result.prompt_length):
    np.testing.assert_array_equal(
      result.tokens[row, start : start + 20], counts[row] % zoo.VOCAB_SIZE
    )
  np.testing.assert_array_equal(result.stats.num_target_calls, 20 // (zoo.DEPTH + 1))


def test_a_copy_of_the_target_is_always_right():
  target = zoo.target()
  draft = zoo.DraftLM(zoo.CONFIG, rngs=nnx.Rngs(0))
  nnx.update(draft.decoder, nnx.state(target))
  setup = zoo.make_setup(target, draft)
  drafter = _chain(head_expander(draft, target))
  request = loop_zoo.make_request(loop_zoo.GREEDY, eos_ids=[()] * loop_zoo.BATCH, max_new_tokens=20)
  result = jax.device_get(_decode(setup, drafter, verifiers.coupled)(setup.params, request))
  np.testing.assert_array_equal(result.stats.num_target_calls, 4)


def test_a_shared_projection_can_be_made_ones_own():
  target, few = zoo.target(), zoo.make_vocabulary(zoo.COUNTS, 16)
  config = zoo.HydraConfig(
    hidden_size=zoo.WIDTH, vocab_size=zoo.VOCAB_SIZE, num_heads=2, share_head=True,
    draft_vocab_size=16,
  )  # fmt: skip
  shared = zoo.shake(zoo.Hydra(config, target, rngs=nnx.Rngs(0), vocabulary=few))
  own = head_for_decoding(shared, target)
  assert own.config.share_head is False and shared.config.share_head is True
  vectors = jax.random.normal(jax.random.key(1), (2, 3, zoo.WIDTH))
  for depth in (1, 2):
    np.testing.assert_allclose(
      own.project(target, vectors, depth), shared.project(target, vectors, depth), atol=1e-5
    )
  assert head_for_decoding(own, target) is own
  assert head_for_decoding(zoo.heads()['eagle'], target) is zoo.heads()['eagle']


# --- Misuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['medusa', 'hydra'])
def test_deeper_than_there_are_heads_is_refused(name):
  setup = zoo.setup(name)
  with pytest.raises(ValueError, match='4 tokens ahead at most, 5 are asked for'):
    drafters.chain_drafter(head_expander(setup.head, setup.target), num_drafts=5)


def test_more_candidates_than_the_draft_vocabulary_are_refused():
  setup = zoo.setup('eagle3')
  expander = head_expander(setup.head, setup.target)
  with pytest.raises(ValueError, match='must be 1 to 16: 17'):
    drafters.eagle2_tree(expander, beam_width=17)
  with pytest.raises(ValueError, match='wants 17 candidates of a vocabulary of 16'):
    drafters.static_tree(expander, static_trees.from_paths([(rank,) for rank in range(17)]))


def test_every_kind_is_tested_and_others_are_refused():
  assert {kind_of(head).module for head in zoo.heads().values()} == {
    kind.module for kind in HEADS.values()
  }
  with pytest.raises(ValueError, match='not a head: dict; heads are medusa'):
    kind_of({})

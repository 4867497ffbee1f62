"""Jacobi, lookahead and copying drafters in the compiled loop: the output is plain decoding's.

Ragged batches of rows with their own sampling values, any window, any initial guess. How many calls
a method takes is compared with `jacobi_reference`, which runs it in plain Python on a table model.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.drafters import guesses
from decodax.drafters import ngram_pool
from decodax.drafters.input_guided import Source
from decodax.drafters.lookahead import window_layout
from decodax.types import Result
from tests.decodax import jacobi_reference as reference
from tests.decodax.zoo import BATCH
from tests.decodax.zoo import GREEDY
from tests.decodax.zoo import MIXED
from tests.decodax.zoo import VOCAB_SIZE
from tests.decodax.zoo import Compiled
from tests.decodax.zoo import assert_same_output
from tests.decodax.zoo import make_request
from tests.decodax.zoo import take_rows
from tests.table_model import random_table
from tests.table_model import table_model

_GUESSES = {
  'constant': guesses.constant(3),
  'random_prompt': guesses.random_prompt(),
  'random_tokens': guesses.random_tokens(VOCAB_SIZE),
  'neighbour': guesses.neighbour(2),
  'prompt_in_place': guesses.prompt_in_place(1),
  'ngram': guesses.ngram(max_ngram=2),
}


def _every_guess(state, drafts, num_known):
  """Row b guesses by the b-th way."""
  ways = [guess(state, drafts, num_known) for guess in _GUESSES.values()]
  way = (jnp.arange(drafts.shape[0]) % len(ways))[None, :, None]
  return jnp.take_along_axis(jnp.stack(ways), way, axis=0)[0]


def _drafter(zoo, name):
  expander = drafters.model_expander(zoo.model)
  return {
    'jacobi': lambda: drafters.jacobi(num_drafts=3, guess_fn=_every_guess),
    'sjd': lambda: drafters.sjd(vocab_size=VOCAB_SIZE, num_drafts=3),
    'sjd-fresh': lambda: drafters.sjd(vocab_size=VOCAB_SIZE, num_drafts=3, redraw='fresh'),
    'lookahead': lambda: drafters.lookahead(window=3, ngram=4, num_ngrams=2, num_keys=7),
    'lud': lambda: drafters.lexical_units(pad_id=1, num_drafts=2, confidence=0.3),
    'iad': lambda: drafters.input_guided(num_drafts=5),
    'gad': lambda: drafters.masked_draft(expander, mask_id=2, num_drafts=3),
  }[name]()


NAMES = ('jacobi', 'sjd', 'sjd-fresh', 'lookahead', 'lud', 'iad', 'gad')


@pytest.fixture(scope='module')
def run(zoo):
  """Returns (name, verifier, request) -> the result of the compiled loop."""

  @functools.cache
  def compiled(name, verifier):
    rule = verifiers.BY_NAME[verifier]
    options = dict(model=zoo.model, drafter=_drafter(zoo, name), verifier=rule)
    return Compiled(functools.partial(decodax.decode, **options))

  def call(name, verifier, request):
    params = decodax.Params(zoo.params, zoo.other_params if name == 'gad' else ())
    return jax.device_get(compiled(name, verifier)(params, request))

  return call


# --- Token identity ------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_output_is_that_of_plain_decoding(zoo, run, name):
  for sampling, seed in ((MIXED, 0), (MIXED, 1), (GREEDY, 0)):
    request = make_request(sampling, seed=seed)
    expected = zoo.plain('coupled', request)
    actual = run(name, 'coupled', request)
    assert_same_output(actual, expected)
    assert np.all(actual.stats.num_target_calls <= expected.stats.num_target_calls)
    if name not in ('iad', 'gad'):  # identity is not had by drafting in vain
      assert actual.stats.num_accepted.sum() > 0


@pytest.mark.parametrize('name', NAMES)
def test_permuting_the_batch_permutes_the_result(run, name):
  request = make_request()
  order = np.random.default_rng(3).permutation(BATCH)
  if name == 'jacobi':  # here the guess is the row's
    order = np.asarray([6, 7, 2, 3, 4, 5, 0, 1])
  actual = run(name, 'coupled', take_rows(request, order))
  expected = take_rows(run(name, 'coupled', request), order)
  assert_same_output(actual, expected)
  for field, count in actual.stats._asdict().items():
    np.testing.assert_array_equal(count, getattr(expected.stats, field), err_msg=field)


# --- Guesses -------------------------------------------------------------------------------------


def test_guesses_keep_what_is_known_and_fill_the_rest(zoo):
  request = make_request()
  drafter = drafters.plain()
  state = decodax.init_state(decodax.Params(zoo.params), request, model=zoo.model, drafter=drafter)
  drafts = jnp.tile(jnp.asarray([[9, 8, 7, 6, 5]]), (BATCH, 1))
  known = jnp.arange(BATCH) % 6
  keep = np.arange(5)[None] < np.asarray(known)[:, None]
  for name, guess in _GUESSES.items():
    filled = np.asarray(jax.jit(guess)(state, drafts, known))
    np.testing.assert_array_equal(filled[keep], np.asarray(drafts)[keep], err_msg=name)
    assert np.all((filled >= 0) & (filled < VOCAB_SIZE)), name
    for row in range(BATCH):
      prompt = np.asarray(request.tokens)[row, : int(request.prompt_length[row])].tolist()
      text = prompt + [9, 8, 7, 6, 5][: int(known[row])]
      rest = filled[row, int(known[row]) :].tolist()
      if name == 'constant':
        assert set(rest) <= {3}
      if name == 'random_prompt':
        assert set(rest) <= set(prompt)
      if name == 'neighbour' and len(text) > 1:
        assert rest == list(itertools.islice(itertools.cycle(text[-2:]), len(rest)))
      if name == 'prompt_in_place':
        assert rest == [prompt[(1 + i) % len(prompt)] for i in range(int(known[row]), 5)]
      if name == 'ngram' and len(rest):
        places = [i for i in range(1, len(text)) if text[i - 1] == text[-1]]
        if places:
          assert rest[0] in [text[i] for i in places]


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: guesses.neighbour(0), 'distance must be at least 1'),
    (lambda: guesses.ngram(max_ngram=0), 'max_ngram must be at least 1'),
    (lambda: drafters.jacobi(num_drafts=0), 'num_drafts must be at least 1'),
    (lambda: drafters.jacobi(exit_after=0), 'exit_after must be at least 1'),
    (lambda: drafters.sjd(vocab_size=3, num_drafts=0), 'num_drafts must be at least 1'),
    (lambda: drafters.sjd(vocab_size=3, redraw='stale'), "'stale' is not a valid Redraw"),
    (lambda: drafters.lookahead(ngram=2), 'need ngram >= 3'),
    (lambda: drafters.lookahead(window=0), 'need ngram >= 3 and the others >= 1'),
    (lambda: drafters.lexical_units(pad_id=0, num_drafts=0), 'num_drafts must be at least 1'),
    (lambda: drafters.lexical_units(pad_id=0, confidence=-1), 'confidence must be in'),
    (lambda: drafters.input_guided(num_drafts=0), 'num_drafts and max_ngram must be at least 1'),
  ],
)
def test_nonsense_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


# --- Against plain Python ------------------------------------------------------------------------

_V = 5
_TABLE = random_table(7, _V, sharpness=3)
_MODEL = table_model(_V)
_PROMPTS = [[1, 2], [3], [0, 4, 4, 1, 2, 0, 3], [2, 2, 2, 1], [4, 0, 1]]
_NUM_NEW = 24


def _best(text):
  return int(np.argmax(_TABLE[(0, *text)[-2], text[-1]]))


def _likelihood(text):
  return float(np.max(_TABLE[(0, *text)[-2], text[-1]]))


def _on_table(
  drafter, verifier=verifiers.greedy, *, eos_ids=(), drafter_params=(), num_new=_NUM_NEW
):
  request = decodax.make_request(
    _PROMPTS, max_new_tokens=num_new, vocab_size=_V, eos_ids=eos_ids, capacity=64
  )
  run = functools.partial(decodax.decode, model=_MODEL, drafter=drafter, verifier=verifier)
  params = decodax.Params(jnp.asarray(_TABLE, jnp.float32), drafter_params)
  return jax.device_get(Compiled(run)(params, request))


def _check(result, row, tokens, calls):
  start = len(_PROMPTS[row])
  assert result.tokens[row, start : result.length[row]].tolist() == tokens
  assert result.stats.num_target_calls[row] == calls


@pytest.mark.parametrize('num_drafts, exit_after', [(1, None), (4, None), (4, 1), (4, 2), (4, 5)])
def test_jacobi_is_its_definition(num_drafts, exit_after):
  drafter = drafters.jacobi(
    num_drafts=num_drafts, guess_fn=guesses.constant(1), exit_after=exit_after
  )
  rule = verifiers.greedy if exit_after is None else verifiers.trusting
  result = _on_table(drafter, rule)
  settled = exit_after is None or exit_after > num_drafts
  for row, prompt in enumerate(_PROMPTS):
    tokens, calls = reference.jacobi(
      _best, prompt, _NUM_NEW, num_drafts=num_drafts, guess=1, exit_after=exit_after or 10**9
    )
    _check(result, row, tokens, calls)
    if settled:
      assert tokens == reference.plain(_best, prompt, _NUM_NEW)
    if exit_after is not None:  # a window is through after so many calls, and one that reads it
      assert calls <= -(-_NUM_NEW // (num_drafts + 1)) * (exit_after + 1)


def test_early_exit_changes_the_output():
  """Otherwise the exit above would be no exit."""
  plain = [reference.plain(_best, prompt, _NUM_NEW) for prompt in _PROMPTS]
  early = [
    reference.jacobi(_best, prompt, _NUM_NEW, num_drafts=4, guess=1, exit_after=1)[0]
    for prompt in _PROMPTS
  ]
  assert plain != early


def test_a_target_without_memory_is_settled_at_once():
  flat = np.broadcast_to(_TABLE[0, 0], _TABLE.shape)
  drafter = drafters.jacobi(num_drafts=3, guess_fn=guesses.constant(int(flat[0, 0].argmin())))
  request = decodax.make_request([[1], [2, 3]], max_new_tokens=21, vocab_size=_V, capacity=64)
  run = functools.partial(decodax.decode, model=_MODEL, drafter=drafter, verifier=verifiers.greedy)
  stats = Compiled(run)(decodax.Params(jnp.asarray(flat, jnp.float32)), request).stats
  assert np.asarray(stats.num_target_calls).tolist() == [9, 9]  # one token by guessing, then four


def test_what_is_settled_is_committed_once():
  """Every round starts at the last emitted token: nothing before it is read again."""
  starts = []

  def extend(params, cache, tokens, positions, mask):
    jax.debug.callback(lambda *args: starts.append(args), positions[:, 0], cache.length)
    return _MODEL.extend(params, cache, tokens, positions, mask)

  drafter = drafters.jacobi(num_drafts=3)
  request = decodax.make_request(_PROMPTS, max_new_tokens=8, vocab_size=_V, capacity=32)
  options: dict[str, Any] = dict(model=_MODEL._replace(extend=extend), drafter=drafter)
  params = decodax.Params(jnp.asarray(_TABLE, jnp.float32))
  state = decodax.prefill(params, decodax.init_state(params, request, **options), **options)
  step = Compiled(decodax.make_step_fn(verifier=verifiers.greedy, **options))
  while np.any(state.result == Result.RUNNING):
    before = np.asarray(state.length)
    state, info = step(params, state)
    jax.effects_barrier()
    np.testing.assert_array_equal(starts[-1], [before - 1] * 2)
    np.testing.assert_array_equal(state.cache.length, before - 1 + info.num_emitted)
    for row, length in enumerate(np.asarray(state.cache.length)):
      np.testing.assert_array_equal(state.cache.tokens[row, :length], state.tokens[row, :length])


@pytest.mark.parametrize(
  'window, ngram, num_ngrams, from_text', [(3, 4, 2, True), (2, 3, 3, False), (1, 3, 1, False)]
)
def test_lookahead_is_its_definition(window, ngram, num_ngrams, from_text):
  drafter = drafters.lookahead(
    window=window, ngram=ngram, num_ngrams=num_ngrams, num_keys=_V, from_text=from_text
  )
  request = decodax.make_request(_PROMPTS, max_new_tokens=_NUM_NEW, vocab_size=_V, capacity=64)
  params = decodax.Params(jnp.asarray(_TABLE, jnp.float32))
  options: dict[str, Any] = dict(model=_MODEL, drafter=drafter)

  def decode(params, request):
    start = decodax.init_state(params, request, **options)
    state = decodax.prefill(params, start, **options)
    step = decodax.make_step_fn(verifier=verifiers.greedy, **options)
    return start.drafter.window, decodax.generate(params, state, step_fn=step)

  windows, state = jax.device_get(Compiled(decode)(params, request))
  for row, prompt in enumerate(_PROMPTS):
    tokens, calls, pool = reference.lookahead(
      _best, prompt, _NUM_NEW, window=windows[row].tolist(), num_ngrams=num_ngrams,
      from_text=from_text,
    )  # fmt: skip
    assert tokens == reference.plain(_best, prompt, _NUM_NEW)
    start, end = len(prompt), len(prompt) + _NUM_NEW
    assert state.tokens[row, start:end].tolist() == tokens
    assert state.stats.num_target_calls[row] == calls
    if not from_text:  # the last round may be cut; only text differs then
      for key in range(_V):
        held = state.drafter.pool.values[row, key].tolist()
        assert [tuple(gram) for gram in held if gram[0] >= 0] == pool.get(key, [])


def test_a_pool_is_a_dictionary():
  rng = np.random.default_rng(0)
  pool, mirror = ngram_pool.empty_pool(2, 4, 3, 2), [{}, {}]
  insert = jax.jit(ngram_pool.insert)
  for _ in range(60):
    key, value = rng.integers(0, 7, 2), rng.integers(0, 2, (2, 2))
    wanted = rng.random(2) < 0.8
    pool = insert(pool, jnp.asarray(key), jnp.asarray(value), jnp.asarray(wanted))
    for row in np.flatnonzero(wanted):
      place, gram = int(key[row]) % 4, tuple(value[row].tolist())
      owner, grams = mirror[row].get(place, (None, []))
      grams = grams if owner == key[row] else []
      grams = [gram, *(other for other in grams if other != gram)][:3]
      mirror[row][place] = (int(key[row]), grams)
  for key in range(7):
    values, valid = ngram_pool.lookup(pool, jnp.full((2,), key))
    for row in range(2):
      owner, grams = mirror[row].get(key % 4, (None, []))
      found = [
        tuple(v) for v, ok in zip(values[row].tolist(), valid[row].tolist(), strict=True) if ok
      ]
      assert found == (grams if owner == key else [])


def test_ngrams_share_the_nodes_of_a_common_beginning():
  ngrams = jnp.asarray([[[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 2, 3]]] * 2)
  valid = jnp.asarray([[True] * 4, [True, True, True, False]])
  tree = ngram_pool.as_tree(jnp.asarray([9, 9]), ngrams, valid)
  assert np.asarray(tree.valid).sum(-1).tolist() == [1 + 3 + 1 + 2 + 3, 1 + 3 + 1 + 2]
  for row in range(2):
    tokens, parents = np.asarray(tree.tokens)[row], np.asarray(tree.parents)[row]
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, int(tree.valid[row].sum())):
      assert parents[node] < node
      paths[node] = (*paths[parents[node]], int(tokens[node]))
    assert len(set(paths.values())) == len(paths)
    wanted = np.asarray(ngrams)[row][np.asarray(valid)[row]].tolist()
    assert {tuple(gram) for gram in wanted} <= set(paths.values())


def test_a_window_node_sees_what_it_should(zoo):
  """Perturbing one node changes the answers of those that see it, and of no others."""
  levels, width = 3, 4
  depths, sees, top = window_layout(levels, width)
  count = levels * width
  mask = np.zeros((1, count, count), bool)
  mask[0, 0, 0], mask[0, 1:] = True, sees
  positions = np.concatenate([[0], depths])[None] + 5
  tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, count))

  @jax.jit
  def hidden(tokens):
    cache = zoo.model.init_cache(zoo.params, 1, 8)
    return zoo.model.extend(zoo.params, cache, tokens, jnp.asarray(positions), jnp.asarray(mask))[
      0
    ].hidden[0]

  base = np.asarray(hidden(jnp.asarray(tokens)))
  for node in range(count):
    other = tokens.copy()
    other[0, node] = (other[0, node] + 1) % VOCAB_SIZE
    changed = np.any(np.asarray(hidden(jnp.asarray(other))) != base, axis=-1)
    level, column = divmod(node, width)
    expected = [
      (j == column and i >= level) or (level == 0 and j >= column)
      for i, j in itertools.product(range(levels), range(width))
    ]
    assert changed.tolist() == expected
  assert [divmod(node + 1, width) for node in top.tolist()] == [(2, j) for j in range(width)]


def test_lexical_units_are_as_published():
  """And the confidence may change without compiling anew."""

  def decode(params, request, confidence):
    drafter = drafters.lexical_units(pad_id=4, num_drafts=3, confidence=confidence)
    return decodax.decode(
      params, request, model=_MODEL, drafter=drafter, verifier=verifiers.trusting
    )

  compiled = Compiled(decode)
  request = decodax.make_request(_PROMPTS, max_new_tokens=_NUM_NEW, vocab_size=_V, capacity=64)
  params, lengths = decodax.Params(jnp.asarray(_TABLE, jnp.float32)), set()
  for confidence in (0.0, 0.6, 0.9, 1.5):
    result = jax.device_get(compiled(params, request, jnp.float32(confidence)))
    for row, prompt in enumerate(_PROMPTS):
      tokens, calls = reference.lexical_units(
        _best, _likelihood, prompt, _NUM_NEW, pad=4, num_drafts=3, confidence=confidence
      )
      emitted = result.tokens[row, len(prompt) : result.length[row]].tolist()
      assert emitted == tokens
      # The rest of a unit is emitted one call later than published, by a call that goes on.
      assert calls <= result.stats.num_target_calls[row] <= calls + 1
      lengths.add(calls)
      if confidence > 1:
        assert tokens == reference.plain(_best, prompt, _NUM_NEW)
        assert calls == _NUM_NEW
  assert len(lengths) > 3 and compiled.num_traces == 1


@pytest.mark.parametrize('spans', [None, [(0, 2), (0, 1), (1, 6), (0, 4), (1, 3)]])
def test_copying_finds_back_as_published(spans):
  stop = 3
  params = ()
  if spans is not None:
    params = Source(*(jnp.asarray(column, jnp.int32) for column in zip(*spans, strict=True)))
  result = _on_table(drafters.input_guided(num_drafts=3), eos_ids=(stop,), drafter_params=params)
  for row, prompt in enumerate(_PROMPTS):
    output = reference.plain(_best, prompt, _NUM_NEW)
    output = output[: output.index(stop) + 1] if stop in output else output
    source = None if spans is None else prompt[slice(*spans[row])]
    calls = reference.input_guided(output, prompt, source, num_drafts=3, max_ngram=3, stop=stop)
    _check(result, row, output, calls)


def test_copying_a_text_as_it_is():
  """A target that copies its prompt is copied in as few calls as the block allows."""
  text = np.random.default_rng(1).permutation(12)
  cycle = np.zeros((12, 12, 12))
  cycle[:, text, np.roll(text, -1)] = 1.0
  table = jnp.asarray(cycle + 1e-6, jnp.float32)
  request = decodax.make_request(
    [text.tolist(), text.tolist()], max_new_tokens=12, vocab_size=12, capacity=32
  )
  spans = Source(jnp.asarray([0, 0]), jnp.asarray([12, 12]))
  run = functools.partial(
    decodax.decode, model=table_model(12), drafter=drafters.input_guided(num_drafts=5),
    verifier=verifiers.greedy,
  )  # fmt: skip
  result = Compiled(run)(decodax.Params(table, spans), request)
  assert np.asarray(result.tokens)[0, 12:24].tolist() == text.tolist()
  assert np.asarray(result.stats.num_target_calls).tolist() == [2, 2]


def test_a_verifier_and_a_drafter_cannot_both_have_extra_nodes(zoo):
  reflective = verifiers.reflective(verifiers.coupled, [1, 2])
  run = functools.partial(
    decodax.decode, model=zoo.model, drafter=_drafter(zoo, 'lud'), verifier=reflective
  )
  with pytest.raises(ValueError, match='nodes of its own read beside the proposal'):
    jax.eval_shape(run, decodax.Params(zoo.params), make_request())

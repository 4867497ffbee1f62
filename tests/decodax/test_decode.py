"""The compiled loop on a small transformer: output, stops, and what rows must not depend on.

Batches are ragged, and every row has its own sampling values, stop ids and budget.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.types import Result
from tests.decodax import zoo as zoo_lib
from tests.decodax.zoo import BATCH
from tests.decodax.zoo import CAPACITY
from tests.decodax.zoo import GREEDY
from tests.decodax.zoo import MAX_NEW_TOKENS
from tests.decodax.zoo import MIXED
from tests.decodax.zoo import NUM_DRAFTS
from tests.decodax.zoo import PROMPT_LENGTHS
from tests.decodax.zoo import VOCAB_SIZE
from tests.decodax.zoo import Compiled
from tests.decodax.zoo import assert_same_output
from tests.decodax.zoo import failing
from tests.decodax.zoo import make_request
from tests.decodax.zoo import make_script
from tests.decodax.zoo import take_rows
from tests.table_model import random_table
from tests.table_model import table_model

_NO_STOP = ((),) * (BATCH - 1) + ((VOCAB_SIZE - 1, 0),)  # of the same width as EOS_IDS

# What each drafter proposes, given the true output: name -> parameters of the drafter.
CASES = {
  'ngram': lambda zoo, text: (),
  'early_exit': lambda zoo, text: (),
  'draft_model': lambda zoo, text: zoo.other_params,
  'draft_model-perfect': lambda zoo, text: zoo.params,
  'scripted-anything': lambda zoo, text: make_script(
    text, wrong=np.asarray([0, VOCAB_SIZE, -1, 2**31 - 1, 5, -(2**31), 23, 1000])
  ),
  'scripted-garbage': lambda zoo, text: make_script(text, num_right=0, num_drafts=NUM_DRAFTS),
  'scripted-empty': lambda zoo, text: make_script(text, num_drafts=0),
  'scripted-perfect': lambda zoo, text: make_script(
    text, num_right=NUM_DRAFTS, num_drafts=NUM_DRAFTS
  ),
  'tree': lambda zoo, text: make_script(text),
}


def _run(zoo, case, verifier, request, text=None, **options):
  drafter = case.split('-')[0]
  text = jnp.zeros((BATCH, CAPACITY), jnp.int32) if text is None else text
  params = decodax.Params(zoo.params, CASES[case](zoo, text))
  return jax.device_get(zoo.decode(drafter, verifier, **options)(params, request))


def _sampled(request):
  return np.asarray(request.sampling.temperature) > 0


# --- Token identity ------------------------------------------------------------------------------


@pytest.mark.parametrize('verifier', ['coupled', 'greedy'])
@pytest.mark.parametrize('case', CASES)
def test_output_is_that_of_plain_decoding(zoo, case, verifier):
  for sampling, seed in ((MIXED, 0), (MIXED, 1), (GREEDY, 0)):
    request = make_request(sampling, seed=seed)
    expected = zoo.plain(verifier, request)
    actual = _run(zoo, case, verifier, request, expected.tokens)
    assert_same_output(actual, expected)


@pytest.mark.parametrize('case', CASES)
def test_top_p_off_for_the_whole_batch(zoo, case):
  off = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
  request = make_request(off, seed=2)
  expected = zoo.plain('coupled', request)
  assert_same_output(_run(zoo, case, 'coupled', request, expected.tokens), expected)


@pytest.mark.parametrize('case', ['draft_model', 'ngram'])
def test_rules_left_out_equal_rules_off(zoo, case):
  # None drops a rule at compile time; a neutral value switches it off at run time.
  temperature = dict(temperature=MIXED['temperature'])
  off = dict(top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, **temperature)
  expected = zoo.plain('coupled', make_request(off))
  assert_same_output(_run(zoo, case, 'coupled', make_request(temperature)), expected)


def test_plain_sampling_differs_from_greedy_and_between_seeds(zoo):
  """Identity above would mean little if every request had the same output."""
  outputs = [zoo.plain('coupled', make_request(seed=seed)).tokens for seed in (0, 1)]
  request = make_request()
  greedy = zoo.plain('greedy', request).tokens
  sampled = _sampled(request)
  long = np.asarray(MAX_NEW_TOKENS) > 1  # one token may well be the same
  assert np.all(np.any(outputs[0] != greedy, axis=-1)[sampled & long])
  np.testing.assert_array_equal(outputs[0][~sampled], greedy[~sampled])
  other_keys = make_request()._replace(rng_keys=make_request(seed=5).rng_keys)
  reseeded = zoo.plain('coupled', other_keys).tokens
  changed = np.any(reseeded != outputs[0], axis=-1)
  assert np.all(changed[sampled & long]) and not np.any(changed[~sampled])


@pytest.mark.parametrize('case', ['draft_model', 'draft_model-perfect', 'early_exit'])
def test_speculative_at_temperature_0_is_greedy_decoding(zoo, case):
  request = make_request(GREEDY)
  assert_same_output(_run(zoo, case, 'speculative', request), zoo.plain('greedy', request))
  # Rows at temperature 0 stay greedy beside rows that sample.
  mixed = make_request(MIXED)
  greedy_rows = np.flatnonzero(~_sampled(mixed))
  assert_same_output(
    take_rows(_run(zoo, case, 'speculative', mixed), greedy_rows),
    take_rows(zoo.plain('greedy', mixed), greedy_rows),
  )


@pytest.mark.parametrize(
  'case, verifier, sampling',
  [
    ('draft_model-perfect', 'coupled', MIXED),
    ('draft_model-perfect', 'speculative', MIXED),
    ('draft_model-perfect', 'greedy', GREEDY),
    ('scripted-perfect', 'coupled', MIXED),
  ],
)
def test_a_perfect_drafter_is_always_accepted(zoo, case, verifier, sampling):
  """The proposals above are not all rejected: otherwise identity would be easy."""
  request = make_request(sampling, eos_ids=_NO_STOP)
  stats = _run(zoo, case, verifier, request, zoo.plain('coupled', request).tokens).stats
  calls = -(-np.asarray(MAX_NEW_TOKENS) // (NUM_DRAFTS + 1))
  np.testing.assert_array_equal(stats.num_target_calls[:-1], calls[:-1])  # the last row may stop


def test_random_trees_are_accepted_to_every_depth(zoo):
  request = make_request()
  stats = _run(zoo, 'tree', 'coupled', request, zoo.plain('coupled', request).tokens).stats
  assert np.all(stats.num_accepted_at.sum(0) > 0), stats.num_accepted_at
  assert np.all(stats.num_tested_at.sum(0) > stats.num_accepted_at.sum(0)), stats


def test_a_row_without_drafts_does_not_cut_those_of_others(zoo):
  """The block is as wide as the row with the most drafts needs."""
  request = make_request(eos_ids=_NO_STOP)
  text = zoo.plain('coupled', request).tokens
  num_drafts = np.arange(BATCH) % (NUM_DRAFTS + 1)
  params = decodax.Params(
    zoo.params, make_script(text, num_right=NUM_DRAFTS, num_drafts=num_drafts)
  )
  stats = jax.device_get(zoo.decode('scripted', 'coupled')(params, request)).stats
  calls = -(-np.asarray(MAX_NEW_TOKENS) // (num_drafts + 1))
  np.testing.assert_array_equal(stats.num_target_calls[:-1], calls[:-1])  # the last row may stop


def test_the_block_is_as_narrow_as_the_drafts_allow(zoo):
  """A round without drafts costs the target one token, not the widest block."""
  table, widths = table_model(3), []

  def extend(params, cache, tokens, positions, mask):
    jax.debug.callback(functools.partial(widths.append, tokens.shape[1]))
    return table.extend(params, cache, tokens, positions, mask)

  run = Compiled(
    functools.partial(
      decodax.decode, model=table._replace(extend=extend), drafter=zoo.drafters['scripted'],
      verifier=verifiers.greedy, prefill_chunk=2,
    )
  )  # fmt: skip
  budgets = [12, 4]  # once the row that drafts is done, the other needs one token again
  request = decodax.make_request([[1, 2]] * 2, max_new_tokens=budgets, vocab_size=3, capacity=16)
  params = jnp.asarray(random_table(0, 3), jnp.float32)
  for drafts, expected in ((0, {1}), (1, {NUM_DRAFTS + 1, 1}), (NUM_DRAFTS, {NUM_DRAFTS + 1, 1})):
    widths.clear()
    script = make_script(jnp.zeros((2, 16)), num_drafts=np.asarray([0, drafts]))
    jax.block_until_ready(run(decodax.Params(params, script), request))
    jax.effects_barrier()
    assert set(widths[1:]) == expected, (drafts, widths)  # the first is the prompt's


# --- Invariance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'case, verifier',
  [(case, 'coupled') for case in CASES]
  + [('draft_model', 'speculative'), ('early_exit', 'speculative')],
)
def test_permuting_the_batch_permutes_the_result(zoo, case, verifier):
  request = make_request()
  text = zoo.plain('coupled', request).tokens
  order = np.random.default_rng(3).permutation(BATCH)
  params = decodax.Params(zoo.params, CASES[case](zoo, text))
  if case.startswith(('scripted', 'tree')):
    params = params._replace(drafter=take_rows(params.drafter, order))
  actual = jax.device_get(
    zoo.decode(case.split('-')[0], verifier)(params, take_rows(request, order))
  )
  expected = take_rows(_run(zoo, case, verifier, request, text), order)
  assert_same_output(actual, expected)
  for name, count in actual.stats._asdict().items():
    np.testing.assert_array_equal(count, getattr(expected.stats, name), err_msg=name)


@pytest.mark.parametrize('verifier', ['coupled', 'speculative'])
def test_a_row_alone_is_as_in_the_batch(zoo, verifier):
  request = make_request()
  batch = _run(zoo, 'draft_model', verifier, request)
  for row in range(BATCH):
    alone = _run(zoo, 'draft_model', verifier, take_rows(request, [row]))
    assert_same_output(alone, take_rows(batch, [row]))
    for name, count in alone.stats._asdict().items():
      np.testing.assert_array_equal(count, getattr(batch.stats, name)[[row]], err_msg=name)


@pytest.mark.parametrize(
  'case, verifier',
  [('draft_model', 'speculative'), ('ngram', 'coupled'), ('early_exit', 'coupled')],
)
def test_neighbours_do_not_matter(zoo, case, verifier):
  request = make_request()
  keep = np.arange(BATCH) < BATCH // 2
  # Padding rows with a one-token prompt and budget, and rows that hold something else entirely.
  padding = make_request(GREEDY, seed=9, max_new_tokens=1)._replace(
    prompt_length=jnp.ones((BATCH,), jnp.int32)
  )
  expected = take_rows(_run(zoo, case, verifier, request), keep)
  for others in (padding, make_request(seed=7)):
    index = np.where(keep, np.arange(BATCH), BATCH + np.arange(BATCH))
    both = zoo_lib.concatenate(request, others)
    actual = _run(zoo, case, verifier, take_rows(both, index))
    assert_same_output(take_rows(actual, keep), expected)


@pytest.mark.parametrize('options', [dict(prefill_chunk=1), dict(prefill_chunk=3)])
def test_any_prefill_chunk_gives_the_same(zoo, options):
  request = make_request()
  for case in ('draft_model', 'draft_model-perfect'):
    expected = _run(zoo, case, 'coupled', request)  # one chunk of 64
    assert_same_output(_run(zoo, case, 'coupled', request, **options), expected)


def test_a_larger_capacity_gives_the_same(zoo):
  request, roomy = make_request(), make_request(capacity=2 * CAPACITY + 1)
  expected = _run(zoo, 'draft_model', 'coupled', request)
  actual = _run(zoo, 'draft_model', 'coupled', roomy)
  assert actual.tokens.shape[1] == 2 * CAPACITY + 1
  assert_same_output(actual, expected)
  assert not np.any(actual.tokens[:, CAPACITY:])


# --- Stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['scripted-perfect', 'tree', 'draft_model-perfect'])
def test_a_row_stops_at_its_stop_id_inside_an_accepted_path(zoo, case):
  endless = make_request(eos_ids=_NO_STOP, max_new_tokens=24)
  text = np.asarray(zoo.plain('coupled', endless).tokens)
  depths = set()
  for start in range(2 * (NUM_DRAFTS + 1)):
    # Each row stops at the first occurrence of the token that it emits `start` tokens in.
    wanted = text[np.arange(BATCH), np.asarray(PROMPT_LENGTHS) + start]
    eos_ids = [(int(token), int(token)) for token in wanted]
    request = make_request(eos_ids=eos_ids, max_new_tokens=24)
    result = _run(zoo, case, 'coupled', request, jnp.asarray(text))
    for row, length in enumerate(PROMPT_LENGTHS):
      emitted = text[row, length : length + 24].tolist()
      stop = length + emitted.index(wanted[row]) + 1
      depths.add((stop - length - 1) % (NUM_DRAFTS + 1))
      assert result.result[row] == Result.EOS
      assert result.length[row] == stop
      assert result.stats.num_emitted[row] == stop - length
      np.testing.assert_array_equal(result.tokens[row, :stop], text[row, :stop])
      assert not np.any(result.tokens[row, stop:])
  assert len(depths) == NUM_DRAFTS + 1  # every place in a full path was hit


@pytest.mark.parametrize('case', ['scripted-perfect', 'tree', 'ngram'])
def test_a_smaller_budget_cuts_the_output(zoo, case):
  endless = make_request(eos_ids=_NO_STOP, max_new_tokens=24)
  text = zoo.plain('coupled', endless).tokens
  for budget in range(1, 8):
    budgets = 1 + (budget + np.arange(BATCH)) % 7
    request = make_request(eos_ids=_NO_STOP, max_new_tokens=budgets)
    result = _run(zoo, case, 'coupled', request, text)
    stop = np.asarray(PROMPT_LENGTHS) + budgets
    rows = np.arange(BATCH - 1)  # the last row has stop ids
    np.testing.assert_array_equal(result.length[rows], stop[rows])
    assert np.all(result.result[rows] == Result.LENGTH)
    kept = np.arange(CAPACITY)[None] < stop[:, None]
    np.testing.assert_array_equal(result.tokens[rows], np.where(kept, text, 0)[rows])


def test_a_stop_id_at_the_end_of_the_budget_counts_as_a_stop(zoo):
  endless = make_request(eos_ids=_NO_STOP, max_new_tokens=24)
  text = np.asarray(zoo.plain('coupled', endless).tokens)
  first = text[np.arange(BATCH), np.asarray(PROMPT_LENGTHS)]
  eos_ids = [(int(token), int(token)) for token in first]
  result = zoo.plain('coupled', make_request(eos_ids=eos_ids, max_new_tokens=1))
  assert np.all(result.result == Result.EOS)
  assert np.all(result.stats.num_emitted == 1)


@pytest.mark.parametrize('case', ['scripted-perfect', 'tree', 'draft_model', 'early_exit', 'ngram'])
def test_a_full_row_stops_with_capacity(zoo, case):
  """`make_request` refuses such a budget, but a request can be made by hand."""
  request = make_request(eos_ids=_NO_STOP)
  request = request._replace(max_new_tokens=jnp.full((BATCH,), 10_000, jnp.int32))
  expected = zoo.plain('coupled', request)
  result = _run(zoo, case, 'coupled', request, expected.tokens)
  assert_same_output(result, expected)
  rows = np.arange(BATCH - 1)
  assert np.all(result.result[rows] == Result.CAPACITY)
  assert np.all(result.length[rows] == CAPACITY)


# --- Logits that are not finite ------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_failing(zoo):
  """Returns (drafter name, drafter params, request, limit) -> result of a model that breaks."""
  options = dict(model=failing(zoo.model), verifier=verifiers.coupled)
  compiled = {
    name: Compiled(functools.partial(decodax.decode, drafter=zoo.drafters[name], **options))
    for name in ('plain', 'scripted')
  }

  def run(name, drafter_params, request, limit):
    target = (zoo.params, jnp.asarray(limit, jnp.int32))
    return jax.device_get(compiled[name](decodax.Params(target, drafter_params), request))

  return run


def test_a_row_that_breaks_keeps_what_it_had(zoo, run_failing):
  request = make_request(eos_ids=_NO_STOP, max_new_tokens=24)
  healthy = zoo.plain('coupled', request)
  limit = np.full((BATCH,), 10_000)
  limit[1], limit[2], limit[5] = PROMPT_LENGTHS[1] + 6, PROMPT_LENGTHS[2] - 1, 3
  broken = run_failing('plain', (), request, limit)
  sound = np.flatnonzero(limit == 10_000)
  assert_same_output(take_rows(broken, sound), take_rows(healthy, sound))
  # The law after position `limit` is lost, so that is the last token. Row 2 breaks at the end of
  # its prompt, row 5 inside it.
  expected_length = {1: limit[1] + 1, 2: PROMPT_LENGTHS[2], 5: PROMPT_LENGTHS[5]}
  for row, length in expected_length.items():
    assert broken.result[row] == Result.NON_FINITE
    assert broken.length[row] == length
    np.testing.assert_array_equal(broken.tokens[row, :length], healthy.tokens[row, :length])
    assert broken.stats.num_emitted[row] == length - PROMPT_LENGTHS[row]


def test_a_round_with_a_broken_node_on_its_path_is_dropped(zoo, run_failing):
  request = make_request(eos_ids=_NO_STOP, max_new_tokens=24)
  healthy = zoo.plain('coupled', request)
  for offset in range(NUM_DRAFTS + 2):
    limit = np.where(np.arange(BATCH) % 2, np.asarray(PROMPT_LENGTHS) + offset, 10_000)
    script = make_script(healthy.tokens, num_right=NUM_DRAFTS, num_drafts=NUM_DRAFTS)
    broken = run_failing('scripted', script, request, limit)
    for row in range(BATCH):
      start = PROMPT_LENGTHS[row]
      if row % 2 == 0:
        assert_same_output(take_rows(broken, [row]), take_rows(healthy, [row]))
        continue
      # The first round reads positions start - 1 .. start + 3, the second start + 4 and on.
      length = start if offset < NUM_DRAFTS else start + NUM_DRAFTS + 1
      assert broken.result[row] == Result.NON_FINITE
      assert broken.length[row] == length
      np.testing.assert_array_equal(broken.tokens[row, :length], healthy.tokens[row, :length])


def test_a_broken_node_off_the_path_harms_nothing(zoo, run_failing):
  request = make_request(eos_ids=_NO_STOP, max_new_tokens=3)
  healthy = zoo.plain('coupled', request)
  # Drafts are wrong, so a round's path is its root; only nodes below it are broken.
  script = make_script(healthy.tokens, num_right=0, num_drafts=NUM_DRAFTS)
  limit = np.asarray(PROMPT_LENGTHS) + 2
  assert_same_output(run_failing('scripted', script, request, limit), healthy)


# --- What does not go together -------------------------------------------------------------------


def test_speculative_refuses_proposals_without_laws(zoo):
  for name in ('plain', 'ngram', 'scripted'):
    with pytest.raises(ValueError, match="'speculative' is not exact for proposals of kind"):
      decodax.make_step_fn(
        model=zoo.model, drafter=zoo.drafters[name], verifier=verifiers.speculative
      )


def test_speculative_refuses_trees(zoo):
  tree = zoo.drafters['tree']
  sampled = tree._replace(shape=tree.shape._replace(candidates=decodax.Candidates.SAMPLED))
  with pytest.raises(ValueError, match='takes chains; this drafter proposes trees of 9 nodes'):
    decodax.check_compatible(sampled, verifiers.speculative)
  decodax.check_compatible(tree, verifiers.coupled)
  decodax.check_compatible(tree, verifiers.greedy)


@pytest.mark.parametrize('verifier', ['greedy', 'coupled', 'speculative'])
def test_a_drafter_with_another_vocabulary_is_refused(zoo, verifier):
  def never(*args, **kwargs):
    raise AssertionError('nothing should run before the check')

  target = zoo.model._replace(init_cache=never, extend=never)
  other = zoo.model._replace(vocab_size=VOCAB_SIZE + 1)
  rule = verifiers.BY_NAME[verifier]
  for drafter in (drafters.draft_model(other), drafters.early_exit(other)):
    for call in (
      lambda d: decodax.make_step_fn(model=target, drafter=d, verifier=rule),
      lambda d: decodax.decode(
        decodax.Params(()), make_request(), model=target, drafter=d, verifier=rule
      ),
    ):
      with pytest.raises(ValueError, match='vocabulary of 25 tokens, the target one of 24'):
        call(drafter)


def test_a_model_with_wrong_logits_is_refused(zoo):
  wrong = zoo.model._replace(vocab_size=VOCAB_SIZE + 1)
  run = functools.partial(
    decodax.decode, model=wrong, drafter=drafters.plain(), verifier=verifiers.greedy
  )
  with pytest.raises(ValueError, match=r'unembed must return \[B, N, V\] = \(8, 1, 25\)'):
    Compiled(run)(decodax.Params(zoo.params), make_request())


@pytest.mark.parametrize('make', [drafters.draft_model, drafters.early_exit])
def test_model_drafters_refuse_what_cannot_draft(zoo, make):
  with pytest.raises(ValueError, match='num_drafts must be at least 1: num_drafts=0'):
    make(zoo.model, num_drafts=0)
  with pytest.raises(ValueError, match='init_scratch'):
    make(zoo.model._replace(init_scratch=None))


def test_ngram_refuses_nonsense():
  with pytest.raises(ValueError, match='1 <= min_ngram <= max_ngram'):
    drafters.ngram(min_ngram=4, max_ngram=3)
  with pytest.raises(ValueError, match='num_drafts must be at least 1'):
    drafters.ngram(num_drafts=0)


def test_a_prefill_chunk_below_1_is_refused(zoo):
  # It would never come to the prompt's end.
  with pytest.raises(ValueError, match='prefill_chunk must be at least 1: prefill_chunk=0'):
    zoo.decode('plain', 'greedy', prefill_chunk=0)(decodax.Params(zoo.params), make_request())

"""The statistics of a comparison, on numbers made by hand, and the order of measuring."""

import types
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.types import Params
from decodax.types import Result
from decodax.types import Stats
from experiments import measure


def make_run(prompt, *, tokens, calls, seconds, repeat=0, result=Result.LENGTH, at=((), (), ())):
  """A run that emitted `tokens` tokens, or these ones."""
  tokens = tuple(range(tokens)) if isinstance(tokens, int) else tuple(tokens)
  counters: list[Any] = [np.int64(calls), np.int64(len(tokens)), np.int64(0), np.int64(0)]
  stats = Stats(*counters, *(np.asarray(counts, np.int64) for counts in at))  # pyright: ignore
  return measure.Run(prompt, repeat, tokens, result, stats, seconds, 0.5)


PLAIN = [make_run(p, tokens=10, calls=10, seconds=1.0) for p in range(4)]
FAST = [
  make_run(p, tokens=10, calls=calls, seconds=seconds)
  for p, (calls, seconds) in enumerate([(5, 0.5), (10, 1.25), (4, 0.5), (6, 0.75)])
]


# --- Pooled numbers ------------------------------------------------------------------------------


def test_numbers_are_ratios_of_sums():
  summary = measure.summarize(FAST, PLAIN)
  assert summary['num_tokens'] == 40
  assert summary['num_target_calls'] == 25
  assert summary['tokens_per_call'] == pytest.approx(40 / 25)
  assert summary['tokens_per_second'] == pytest.approx(40 / 3.0)
  assert summary['speedup'] == pytest.approx((40 / 3.0) / (40 / 4.0))
  assert summary['decode_seconds'] == pytest.approx(3.0)
  assert summary['prefill_seconds'] == pytest.approx(2.0)


def test_plain_is_its_own_reference():
  summary = measure.summarize(PLAIN, PLAIN)
  assert summary['speedup'] == 1 and summary['speedup_ci'] == [1, 1]
  assert summary['tokens_per_call'] == 1
  assert summary['conditional_acceptance'] == summary['unconditional_acceptance'] == []


def test_speedup_compares_only_what_both_have_measured():
  # An interrupted comparison: plain decoding has not reached the last two prompts.
  summary = measure.summarize(FAST, PLAIN[:2])
  assert summary['num_prompts'] == 4
  assert summary['speedup'] == pytest.approx((20 / 1.75) / (20 / 2.0))


def test_failed_runs_count_nowhere():
  failed = make_run(3, tokens=2, calls=3, seconds=9.0, result=Result.NON_FINITE)
  summary = measure.summarize([*FAST[:3], failed], PLAIN)
  without = measure.summarize(FAST[:3], PLAIN)
  assert summary.pop('num_failed') == 1 and summary.pop('num_runs') == 4
  assert without.pop('num_failed') == 0 and without.pop('num_runs') == 3
  assert summary == without


def test_a_failed_plain_run_is_no_reference():
  plain = [*PLAIN[:3], make_run(3, tokens=1, calls=1, seconds=0.1, result=Result.NON_FINITE)]
  summary = measure.summarize(FAST, plain)
  assert summary['compared_to_plain'] == 3
  assert summary['speedup'] == pytest.approx((30 / 2.25) / (30 / 3.0))


def test_nothing_measured_gives_no_numbers():
  failed = [make_run(0, tokens=0, calls=1, seconds=0.1, result=Result.NON_FINITE)]
  summary = measure.summarize(failed, failed)
  assert summary['num_tokens'] == 0 and summary['num_failed'] == 1
  for name in ('tokens_per_call', 'tokens_per_second', 'speedup'):
    assert summary[name] is None and summary[f'{name}_ci'] is None


def test_repeats_are_pooled_within_a_prompt():
  runs = [make_run(0, tokens=4, calls=2, seconds=s, repeat=r) for r, s in enumerate((1.0, 3.0))]
  plain = [make_run(0, tokens=4, calls=4, seconds=s, repeat=r) for r, s in enumerate((2.0, 4.0))]
  summary = measure.summarize(runs, plain)
  assert summary['num_prompts'] == 1 and summary['num_tokens'] == 8
  assert summary['speedup'] == pytest.approx((8 / 4) / (8 / 6))
  assert summary['speedup_ci'] is None  # one prompt says nothing about the next


def test_categories_partition_the_runs():
  prompts = [measure.EncodedPrompt(i, 'odd' if i % 2 else 'even', [1], i) for i in range(4)]
  found = measure.by_category(FAST, PLAIN, prompts)
  assert list(found) == ['even', 'odd']
  assert found['even']['tokens_per_call'] == pytest.approx(20 / 9)
  assert found['odd']['speedup'] == pytest.approx((20 / 2.0) / (20 / 2.0))
  assert sum(summary['num_tokens'] for summary in found.values()) == 40


# --- Intervals -----------------------------------------------------------------------------------


def test_interval_matches_the_normal_one_for_a_mean():
  rng = np.random.default_rng(0)
  columns = np.stack([rng.normal(10, 1, 400), np.ones(400)], axis=1)
  mean, interval = measure.bootstrap(columns, lambda s: s[..., 0] / s[..., 1])
  assert mean is not None and interval is not None
  half = 1.96 * columns[:, 0].std() / np.sqrt(400)
  np.testing.assert_allclose(interval, [mean - half, mean + half], atol=0.1 * half)


def test_interval_is_reproducible_and_holds_the_value():
  summary = measure.summarize(FAST, PLAIN)
  assert summary == measure.summarize(FAST, PLAIN)
  for name in ('tokens_per_call', 'tokens_per_second', 'speedup'):
    low, high = summary[f'{name}_ci']
    assert low < summary[name] < high


def test_speedup_interval_is_paired():
  # Prompts differ wildly in speed, but the method always halves the time.
  plain = [make_run(p, tokens=10, calls=10, seconds=2.0**p) for p in range(8)]
  fast = [make_run(p, tokens=10, calls=5, seconds=2.0 ** (p - 1)) for p in range(8)]
  summary = measure.summarize(fast, plain)
  assert summary['speedup_ci'] == pytest.approx([2.0, 2.0])
  low, high = summary['tokens_per_second_ci']
  assert high > 2 * low


def test_prompts_of_one_batch_are_one_unit():
  # Four prompts in one batch were timed once: there is nothing to resample.
  assert measure.summarize(FAST, PLAIN, batch_size=4)['tokens_per_second_ci'] is None
  assert measure.summarize(FAST, PLAIN, batch_size=2)['tokens_per_second_ci'] is not None


# --- Acceptance and identity ---------------------------------------------------------------------


def test_acceptance_by_depth():
  # First run: 10 rounds drafted 3 deep; 6 accepted the first, 3 of them the second, none a third.
  # Second run: 10 rounds drafted 1 deep, 4 of them 2 deep; 5 accepted the first, 2 of those had a
  # second draft, and 1 accepted it.
  runs = [
    make_run(0, tokens=20, calls=10, seconds=1.0, at=((10, 10, 10), (10, 6, 3), (6, 3, 0))),
    make_run(1, tokens=16, calls=10, seconds=1.0, at=((10, 4, 0), (10, 2, 0), (5, 1, 0))),
  ]
  conditional, unconditional = measure.acceptance(runs)
  assert conditional == pytest.approx([11 / 20, 4 / 8, 0 / 3])
  assert unconditional == pytest.approx([11 / 20, 4 / 14, 0 / 10])


def test_acceptance_of_what_was_never_drafted_is_unknown():
  runs = [make_run(0, tokens=9, calls=8, seconds=1.0, at=((2, 0), (2, 0), (1, 0)))]
  assert measure.acceptance(runs) == ([0.5, None], [0.5, None])
  assert measure.acceptance([]) == ([], [])


def test_identity_needs_every_repeat():
  plain = [make_run(0, tokens=[1, 2], calls=2, seconds=1.0),
           make_run(1, tokens=[3, 4], calls=2, seconds=1.0)]  # fmt: skip
  same = [make_run(0, tokens=[1, 2], calls=1, seconds=1.0, repeat=r) for r in (0, 1)]
  mixed = [make_run(1, tokens=t, calls=1, seconds=1.0, repeat=r)
           for r, t in enumerate(([3, 4], [3, 5]))]  # fmt: skip
  assert measure.identity([*same, *mixed], plain) == (1, 2)
  assert measure.identity([*same, mixed[0]], plain) == (2, 2)
  assert measure.summarize(same, plain, comparable=False)['compared_to_plain'] == 0


# --- Measuring -----------------------------------------------------------------------------------


def fake_method(log, name) -> Any:
  """A method that records its calls and emits two tokens in one call, in every row."""

  def decode(params, request):
    del params
    log.append((name, int(request.prompt_length[0])))
    zeros = jnp.zeros(len(request.tokens), jnp.int32)
    by_depth = jnp.zeros((len(zeros), 1), jnp.int32)
    stats = Stats(zeros + 1, zeros, zeros, zeros, by_depth, by_depth, by_depth)
    return types.SimpleNamespace(
      tokens=np.asarray(request.tokens),
      prompt_length=np.asarray(request.prompt_length),
      length=np.asarray(request.prompt_length) + 2,
      result=zeros + Result.LENGTH,
      stats=stats,
    )

  def prefill(params, request) -> Any:
    del params
    return request

  return measure.CompiledMethod(Params(()), prefill, cast(Any, decode), 0.0)


def make_prompts(lengths):
  return [measure.EncodedPrompt(i, 'c', [1] * n, i) for i, n in enumerate(lengths)]


SETTING = measure.Setting(max_new_tokens=8, vocab_size=5, eos_ids=(2,))


def test_methods_take_turns_on_every_batch_in_changing_order():
  requests = measure.make_requests(make_prompts([1, 2, 3]), SETTING)
  log = []
  methods = {name: fake_method(log, name) for name in 'ab'}
  runs = list(measure.measure(methods, requests, 3, 2))
  assert log == [
    ('a', 1), ('b', 1), ('b', 2), ('a', 2), ('a', 3), ('b', 3),
    ('b', 1), ('a', 1), ('a', 2), ('b', 2), ('b', 3), ('a', 3),
  ]  # fmt: skip
  assert [(name, run.prompt, run.repeat) for name, (run,) in runs[4:7]] == [
    ('a', 2, 0), ('b', 2, 0), ('b', 0, 1),
  ]  # fmt: skip


def test_a_batch_is_filled_with_idle_rows_that_are_not_reported():
  setting = SETTING._replace(batch_size=2)
  requests = measure.make_requests(make_prompts([4, 5, 6]), setting)
  assert [request.tokens.shape for request in requests] == [(2, 64), (2, 64)]
  assert requests[1].prompt_length.tolist() == [6, 1]
  assert requests[1].max_new_tokens.tolist() == [8, 1]
  found = list(measure.measure({'a': fake_method([], 'a')}, requests, 3, 1))
  assert [[run.prompt for run in runs] for _, runs in found] == [[0, 1], [2]]
  assert all(len(run.tokens) == 2 for _, runs in found for run in runs)


def test_rows_share_the_time_of_their_batch_by_target_calls():
  stats = Stats(*(jnp.asarray([3, 1, 5]),) * 4, *(jnp.zeros((3, 1), jnp.int32),) * 3)
  state = types.SimpleNamespace(
    tokens=np.ones((3, 8), np.int32), prompt_length=np.ones(3, np.int32),
    length=np.full(3, 4), result=np.full(3, Result.EOS), stats=stats,
  )  # fmt: skip
  runs = measure._runs(range(2), 0, state, 1.0, 8.0)  # the third row is idle
  assert [run.decode_seconds for run in runs] == pytest.approx([6.0, 2.0])
  assert [run.prefill_seconds for run in runs] == [0.5, 0.5]


def test_a_prompt_draws_the_same_numbers_in_any_batch():
  prompts = make_prompts([3, 3, 3])
  alone = measure.make_requests(prompts[2:], SETTING)[0]
  among = measure.make_requests(prompts, SETTING._replace(batch_size=3))[0]
  assert alone.rng_keys[0] == among.rng_keys[2]

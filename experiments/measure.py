"""Measuring methods side by side, and the statistics of what was measured.

A *run* is one prompt decoded once by one method. Methods take turns batch by batch, each time in
another order, so that a machine that slows down or warms up slows or warms them all. Compiling, a
warm-up, reading the prompt and decoding are timed apart.

Axes: `B` rows of a batch, `D` maximal draft depth, `U` units of resampling, `K` summed columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import decodax
from decodax.types import DecodeState
from decodax.types import Params
from decodax.types import Request
from decodax.types import Result
from decodax.types import Stats
from decodax.types import Verifier
from experiments.methods import Decoder

NUM_RESAMPLES = 4000
CONFIDENCE = 0.95
_WARM_UP_TOKENS = 4


class EncodedPrompt(NamedTuple):
  """A prompt as token ids."""

  id: int | str
  category: str
  tokens: Sequence[int]
  row_id: int  # with the seed, what its random numbers depend on


class Setting(NamedTuple):
  """What is the same for all methods."""

  max_new_tokens: int
  vocab_size: int
  eos_ids: tuple[int, ...]
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  seed: int = 0
  batch_size: int = 1
  repeats: int = 1


class Run(NamedTuple):
  """One prompt decoded once by one method."""

  prompt: int  # index of the prompt
  repeat: int
  tokens: tuple[int, ...]  # emitted ones
  result: Result
  stats: Stats  # of this row: i64[] and i64[D]
  decode_seconds: float
  prefill_seconds: float

  @property
  def failed(self) -> bool:
    """Did the target's logits stop being numbers? Such a run enters no statistic."""
    return self.result == Result.NON_FINITE


class CompiledMethod(NamedTuple):
  """A method compiled for one batch shape."""

  params: Params
  prefill: Callable[[Params, Request], DecodeState]
  decode: Callable[[Params, DecodeState], DecodeState]  # uses its state up
  compile_seconds: float


# --- Running -----------------------------------------------------------------------------------


def make_requests(prompts: Sequence[EncodedPrompt], setting: Setting) -> list[Request]:
  """Returns the prompts in batches, all of one shape so that nothing compiles twice.

  A last batch that is not full gets idle rows that stop after one token.
  """
  capacity = max(len(prompt.tokens) for prompt in prompts) + setting.max_new_tokens
  capacity = max(64, 1 << (capacity - 1).bit_length())
  size = setting.batch_size
  return [
    _make_request(prompts[start : start + size], setting, capacity)
    for start in range(0, len(prompts), size)
  ]


def _make_request(prompts, setting, capacity):
  idle = setting.batch_size - len(prompts)
  return decodax.make_request(
    [prompt.tokens for prompt in prompts] + [prompts[0].tokens[:1]] * idle,
    max_new_tokens=[setting.max_new_tokens] * len(prompts) + [1] * idle,
    vocab_size=setting.vocab_size,
    temperature=setting.temperature,
    top_k=setting.top_k,
    top_p=setting.top_p,
    eos_ids=setting.eos_ids,
    seed=setting.seed,
    row_ids=[prompt.row_id for prompt in prompts] + [0] * idle,
    capacity=capacity,
  )


def compile_method(decoder: Decoder, verifier: Verifier, request: Request) -> CompiledMethod:
  """Returns the method compiled for requests of this shape, warmed up.

  Raises:
    ValueError: if drafter and verifier do not go together.
  """
  model, drafter, params = decoder
  step_fn = decodax.make_step_fn(model=model, drafter=drafter, verifier=verifier)

  def decode(params, state):
    return decodax.generate(params, state, step_fn=step_fn)

  start = time.perf_counter()
  compiled_read = jax.jit(decoder.read).lower(params, request).compile()
  state = jax.eval_shape(decoder.read, params, request)
  compiled_decode = jax.jit(decode, donate_argnums=1).lower(params, state).compile()
  method = CompiledMethod(
    params, compiled_read, compiled_decode, compile_seconds=time.perf_counter() - start
  )
  budget = jnp.minimum(request.max_new_tokens, _WARM_UP_TOKENS)
  run_batch(method, request._replace(max_new_tokens=budget))
  return method


def run_batch(method: CompiledMethod, request: Request) -> tuple[DecodeState, float, float]:
  """Returns (the final state, seconds of reading the prompts, seconds of decoding)."""
  start = time.perf_counter()
  state = jax.block_until_ready(method.prefill(method.params, request))
  middle = time.perf_counter()
  state = jax.block_until_ready(method.decode(method.params, state))
  return state, middle - start, time.perf_counter() - middle


def measure(
  methods: Mapping[str, CompiledMethod], requests: Sequence[Request], num_prompts: int, repeats: int
) -> Iterator[tuple[str, list[Run]]]:
  """Yields (method, the runs of one batch), all methods on a batch before the next batch."""
  names = list(methods)
  batch_size = requests[0].tokens.shape[0]
  for repeat in range(repeats):
    for index, request in enumerate(requests):
      turn = (repeat + index) % len(names)
      first = index * batch_size
      prompts = range(first, min(first + batch_size, num_prompts))
      for name in names[turn:] + names[:turn]:
        yield name, _runs(prompts, repeat, *run_batch(methods[name], request))


def _runs(prompts, repeat, state, prefill_seconds, decode_seconds):
  """Returns one run for each row that is a prompt.

  Rows share a batch's decoding time by their target calls, and its prefill evenly.
  """
  host = jax.device_get(
    (state.tokens, state.prompt_length, state.length, state.result, state.stats)
  )
  tokens, starts, ends, results, stats = host
  num_calls = stats.num_target_calls[: len(prompts)]
  shares = num_calls / max(num_calls.sum(), 1)
  return [
    Run(
      prompt=prompt,
      repeat=repeat,
      tokens=tuple(int(token) for token in tokens[row, starts[row] : ends[row]]),
      result=Result(int(results[row])),
      stats=jax.tree.map(lambda counter, row=row: np.asarray(counter[row], np.int64), stats),
      decode_seconds=float(decode_seconds * shares[row]),
      prefill_seconds=prefill_seconds / len(prompts),
    )
    for row, prompt in enumerate(prompts)
  ]


# --- Statistics --------------------------------------------------------------------------------

Interval = list[float] | None


def bootstrap(
  columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0
) -> tuple[float | None, Interval]:
  """Returns (a statistic of column sums, its 95 % percentile interval over resampled rows).

  With fewer than two rows there is no interval; with none, no value either.

  Args:
    columns: f64[U, K], one row for each unit, all positive.
    statistic: f64[..., K] sums -> f64[...].
    seed: of the resampling.
  """
  num_units = len(columns)
  if not num_units:
    return None, None
  value = float(statistic(columns.sum(0)))
  if num_units == 1:
    return value, None
  rng = np.random.default_rng(seed)
  weights = rng.multinomial(num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES)
  tail = (1 - CONFIDENCE) / 2
  low, high = np.quantile(statistic(weights @ columns), [tail, 1 - tail])
  return value, [float(low), float(high)]


def summarize(
  runs: Sequence[Run], plain_runs: Sequence[Run], *, batch_size: int = 1, comparable: bool = True
) -> dict[str, Any]:
  """Returns the numbers of one method under their names in `results.json`.

  Args:
    runs: of the method; failed ones are counted as such and left out of all else.
    plain_runs: of plain decoding, on the same prompts.
    batch_size: prompts timed together. Intervals are over batches.
    comparable: should the output be that of plain decoding, token by token?
  """
  good = [run for run in runs if not run.failed]
  table = _columns(good)
  per_call, per_call_ci = bootstrap(_by_batch(table, batch_size), lambda s: s[..., 0] / s[..., 1])
  speed, speed_ci = bootstrap(_by_batch(table, batch_size), lambda s: s[..., 0] / s[..., 2])
  speedup, speedup_ci = _speedup(good, plain_runs, batch_size)
  identical, compared = identity(runs, plain_runs) if comparable else (0, 0)
  conditional, unconditional = acceptance(good)
  return {
    'num_prompts': len({run.prompt for run in good}),
    'num_tokens': sum(len(run.tokens) for run in good),
    'num_target_calls': sum(int(run.stats.num_target_calls) for run in good),
    'tokens_per_call': per_call,
    'tokens_per_call_ci': per_call_ci,
    'tokens_per_second': speed,
    'tokens_per_second_ci': speed_ci,
    'speedup': speedup,
    'speedup_ci': speedup_ci,
    'conditional_acceptance': conditional,
    'unconditional_acceptance': unconditional,
    'prefill_seconds': sum(run.prefill_seconds for run in good),
    'decode_seconds': sum(run.decode_seconds for run in good),
    'identical_to_plain': identical,
    'compared_to_plain': compared,
    'num_runs': len(runs),
    'num_failed': len(runs) - len(good),
  }


def by_category(
  runs: Sequence[Run],
  plain_runs: Sequence[Run],
  prompts: Sequence[EncodedPrompt],
  *,
  batch_size: int = 1,
) -> dict[str, dict[str, Any]]:
  """Returns, for each category in the order of the prompts, what `summarize` says of it."""
  wanted = (
    'num_prompts', 'num_tokens', 'tokens_per_call', 'tokens_per_call_ci', 'tokens_per_second',
    'speedup', 'speedup_ci',
  )  # fmt: skip
  found = {}
  for category in dict.fromkeys(prompt.category for prompt in prompts):
    some, plain = (
      [run for run in each if prompts[run.prompt].category == category]
      for each in (runs, plain_runs)
    )
    if some:
      summary = summarize(some, plain, batch_size=batch_size)
      found[category] = {name: summary[name] for name in wanted}
  return found


def acceptance(runs: Sequence[Run]) -> tuple[list[float | None], list[float | None]]:
  """Returns the acceptance by depth, (conditional, unconditional); None where nothing was drafted.

  With rounds pooled over all runs: *conditional* at depth i is the fraction accepted of the drafts
  at depth i whose predecessors were all accepted; *unconditional* the fraction of rounds with a
  draft at depth i in which the accepted path reached it.
  """
  if not runs:
    return [], []
  accepted, tested, proposed = (
    np.sum([getattr(run.stats, name) for run in runs], axis=0)
    for name in ('num_accepted_at', 'num_tested_at', 'num_proposed_at')
  )
  return _ratios(accepted, tested), _ratios(accepted, proposed)


def identity(runs: Sequence[Run], plain_runs: Sequence[Run]) -> tuple[int, int]:
  """Returns (prompts with the tokens of plain decoding in every run, prompts compared).

  Plain decoding is represented by its first run of a prompt; failed runs are not compared.
  """
  reference = {}
  for run in plain_runs:
    if not run.failed:
      reference.setdefault(run.prompt, run.tokens)
  agrees = {}
  for run in runs:
    if run.prompt in reference and not run.failed:
      same = run.tokens == reference[run.prompt]
      agrees[run.prompt] = agrees.get(run.prompt, True) and same
  return sum(agrees.values()), len(agrees)


def _speedup(runs, plain_runs, batch_size):
  """Returns the ratio of tokens per second on the runs that both have, with its interval."""
  own, plain = _columns(runs), _columns([run for run in plain_runs if not run.failed])
  pairs = {key: row + plain[key] for key, row in own.items() if key in plain}

  def ratio(sums):
    return (sums[..., 0] / sums[..., 2]) / (sums[..., 3] / sums[..., 5])

  return bootstrap(_by_batch(pairs, batch_size), ratio)


def _columns(runs):
  """Returns {(prompt, repeat): (tokens, target calls, decoding seconds)}."""
  return {
    (run.prompt, run.repeat): (
      len(run.tokens),
      int(run.stats.num_target_calls),
      run.decode_seconds,
    )
    for run in runs
  }


def _by_batch(table, batch_size):
  """Returns f64[U, K]: the rows of a table summed over repeats and over each batch of prompts."""
  units = {}
  for (prompt, _), row in table.items():
    unit = prompt // batch_size
    units[unit] = units.get(unit, 0) + np.asarray(row, np.float64)
  return np.stack([units[unit] for unit in sorted(units)]) if units else np.zeros((0, 1))


def _ratios(numerators, denominators):
  return [
    int(top) / int(bottom) if bottom else None
    for top, bottom in zip(numerators, denominators, strict=True)
  ]

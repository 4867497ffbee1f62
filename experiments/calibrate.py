"""Measures what target calls and draft steps cost on this machine, by how many tokens they read.

    python -m experiments.calibrate --out results/calibration.json

The file is what length controllers and tree builders choose by:

    calibration = read_calibration('results/calibration.json', batch_size=1)
    step_ms = float(calibration.drafts['early-exit'].times_ms[0])
    times = controllers.round_times_ms(calibration.target, 8, step_ms)
    drafter = drafters.early_exit(..., controller=controllers.optimal_length(0.7, times))
    choice = static_trees.best_sequoia(acceptance, calibration.target, draft_step_ms=step_ms)

A target call reads T tokens a row, gives the logits of all of them and commits one. A draft step
reads W tokens a row into a scratch block and gives their logits: by the target's first layers
(early exit) and, with --draft, by a draft model. Sizes take turns, and the best of the turns
counts: other work on a machine only ever adds time. SmolLM2-135M on two cores takes some minutes.
"""

from collections.abc import Callable, Sequence
import functools
import json
import os
import pathlib
import platform
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

import decodax
from decodax import theory
from decodax.types import Model
from experiments import cli
from experiments import files
from experiments.bench_loop import best_seconds
from experiments.display import Display
from experiments.display import make_console
from experiments.methods import Setup
from models.adapter import as_model

BLOCK_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
BATCH_SIZES = (1, 8)
DRAFT_SIZES = (1, 4, 8, 16)
EARLY_EXIT, DRAFT_MODEL = 'early-exit', 'draft-model'  # the drafts, as the methods are called
_FILLED = 200  # committed tokens of each row
_CALLS = 4  # calls of one timed loop
_FORMAT = 1  # of the file


class Calibration(NamedTuple):
  """What calls cost at one batch size. Times are milliseconds for the whole batch."""

  batch_size: int
  target: theory.CostCurve
  drafts: dict[str, theory.CostCurve]  # by name; a step on the width of a beam


class _Job(NamedTuple):
  """What is timed."""

  model: Model
  params: Any
  batch_size: int
  width: int
  scratch: bool  # a draft step, not a target call


# --- Reading and writing -------------------------------------------------------------------------


def read_calibration(path: str | pathlib.Path, *, batch_size: int = 1) -> Calibration:
  """Returns what `python -m experiments.calibrate` measured at a batch size.

  Raises:
    OSError: if there is no such file.
    ValueError: if it is no calibration, or the batch size was not measured.
  """
  try:
    record = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    measured = {batch['batch_size']: batch for batch in record['batches']}
    if record['format'] != _FORMAT:
      raise ValueError(f'format {record["format"]}')
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is not a calibration of this version: {error}') from error
  if batch_size not in measured:
    raise ValueError(f'{path} has batch sizes {sorted(measured)}, not {batch_size}')
  batch = measured[batch_size]
  drafts = {name: _curve(curve) for name, curve in batch['drafts'].items()}
  return Calibration(batch_size, _curve(batch['target']), drafts)


def _curve(record) -> theory.CostCurve:
  return theory.CostCurve(np.asarray(record['block_sizes']), np.asarray(record['times_ms']))


# --- Measuring -----------------------------------------------------------------------------------


def calibrate(
  setup: Setup,
  *,
  batch_sizes: Sequence[int] = BATCH_SIZES,
  max_block_size: int = BLOCK_SIZES[-1],
  repeats: int = 10,
  progress: Callable[[str], None] = lambda stage: None,
) -> list[Calibration]:
  """Returns a calibration for each batch size.

  Args:
    setup: the target, and the draft model if there is one.
    batch_sizes: rows of a call.
    max_block_size: tokens that a call reads a row, at most; of `BLOCK_SIZES` and `DRAFT_SIZES`.
    repeats: runs of each, of which the best counts.
    progress: called with the name of each stage.
  """
  target = setup.target.transformer
  params = nnx.state(target)
  exit_layer = setup.exit_layer or max(1, target.config.num_layers * 3 // 4)
  models = {EARLY_EXIT: (as_model(target, exit_layer=exit_layer), params)}
  if setup.draft is not None:
    draft = setup.draft.transformer
    models[DRAFT_MODEL] = as_model(draft), nnx.state(draft)
  results = []
  for batch_size in batch_sizes:
    jobs = {
      ('target', size): _Job(as_model(target), params, batch_size, size, scratch=False)
      for size in BLOCK_SIZES
      if size <= max_block_size
    }
    for name, (model, own) in models.items():
      jobs |= {
        (name, size): _Job(model, own, batch_size, size, scratch=True)
        for size in DRAFT_SIZES
        if size <= max_block_size
      }
    progress(f'batch {batch_size}: compiling {len(jobs)} sizes')
    compiled = {key: _compile(job) for key, job in jobs.items()}
    progress(f'batch {batch_size}: timing, {repeats} times in turn')
    seconds = best_seconds(compiled, repeats)
    results.append(
      Calibration(
        batch_size=batch_size,
        target=_collect('target', seconds),
        drafts={name: _collect(name, seconds) for name in models},
      )
    )
  return results


def _collect(name, seconds) -> theory.CostCurve:
  times = {size: 1e3 * s / _CALLS for (which, size), s in seconds.items() if which == name}
  return theory.CostCurve(np.asarray(list(times)), np.asarray(list(times.values())))


def _compile(job: _Job) -> Callable[[], Any]:
  """Returns a function that makes `_CALLS` calls, one after the other, and waits for them."""
  call = _draft_step if job.scratch else _target_call
  tokens = jnp.ones((job.batch_size, job.width), jnp.int32)
  cache = job.model.init_cache(job.params, job.batch_size, _FILLED + _CALLS + job.width)
  # The keys are zeros: what is read costs the same whatever it holds.
  cache = cache._replace(length=jnp.full((job.batch_size,), _FILLED, jnp.int32))

  def calls(params, cache, tokens):
    step = functools.partial(call, job, params)
    cache, tokens = jax.lax.fori_loop(0, _CALLS, lambda _, carry: step(*carry), (cache, tokens))
    return cache._replace(length=jnp.full_like(cache.length, _FILLED)), tokens

  run = jax.jit(calls, donate_argnums=1).lower(job.params, cache, tokens).compile()
  held = [cache]

  def timed():
    held[0], _ = jax.block_until_ready(run(job.params, held[0], tokens))

  return timed


def _target_call(job, params, cache, tokens):
  """Returns the cache with one more token, and tokens for the next call."""
  path = jnp.broadcast_to(jnp.arange(job.width, dtype=jnp.int32), tokens.shape)
  mask = jnp.tril(jnp.ones((job.width, job.width), bool))
  mask = jnp.broadcast_to(mask, (job.batch_size, job.width, job.width))
  positions = cache.length[:, None] + path
  output, block = job.model.extend(params, cache, tokens, positions, mask)
  best = decodax.sampling.argmax(job.model.unembed(params, output.hidden))
  return job.model.commit(cache, block, path, jnp.ones((job.batch_size,), jnp.int32)), best


def _draft_step(job, params, cache, tokens):
  """Returns the cache as it is, and tokens for the next step."""
  block = job.model.init_scratch(params, job.batch_size, job.width)
  positions = jnp.broadcast_to(cache.length[:, None], tokens.shape)
  mask = jnp.broadcast_to(jnp.eye(job.width, dtype=bool), (job.batch_size, job.width, job.width))
  output, _ = job.model.extend(
    params, cache, tokens, positions, mask, scratch=block, offset=jnp.int32(0)
  )
  return cache, decodax.sampling.argmax(job.model.unembed(params, output.hidden))


# --- Telling -------------------------------------------------------------------------------------


def table(results: Sequence[Calibration]) -> Table:
  """Returns the times as a table: a call in ms, and relative to a call on one token."""
  shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  shown.add_column('tokens a row', justify='right', style='bold')
  columns = []
  for result in results:
    for name, curve in {'target': result.target, **result.drafts}.items():
      shown.add_column(f'{name}\nbatch {result.batch_size}, ms', justify='right')
      columns.append(dict(zip(np.asarray(curve.block_sizes).tolist(), curve.times_ms, strict=True)))
      if name == 'target':
        shown.add_column('relative', justify='right', style='dim')
        columns.append({size: time / columns[-1][1] for size, time in columns[-1].items()})
  for size in sorted(set().union(*columns)):
    shown.add_row(str(size), *(_cell(column, size) for column in columns))
  return shown


def _cell(column, size):
  return f'{column[size]:.2f}' if size in column else ''


def _record(results, setup, argv) -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    'format': _FORMAT,
    'command': cli.command_line('experiments.calibrate', argv),
    'model': setup.target.name,
    'draft': None if setup.draft is None else setup.draft.name,
    'dtype': str(jnp.dtype(setup.target.transformer.dtype)),
    'device': {
      'platform': device.platform,
      'kind': platform.machine() if device.platform == 'cpu' else device.device_kind,
      'num_cores': os.cpu_count(),
    },
    'jax': jax.__version__,
    'committed_tokens': _FILLED,
    'batches': [
      {
        'batch_size': result.batch_size,
        'target': _curve_record(result.target),
        'drafts': {name: _curve_record(curve) for name, curve in result.drafts.items()},
      }
      for result in results
    ],
  }


def _curve_record(curve):
  return {
    'block_sizes': np.asarray(curve.block_sizes).tolist(),
    'times_ms': [round(float(time), 4) for time in curve.times_ms],
  }


# --- The command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong options, 128 + signal if cut."""
  return cli.run('calibrate', lambda: _main(argv))


def _main(argv):
  args = _parser().parse_args(argv)
  console = make_console()
  with Display(console) as display:
    setup = cli.load_setup(args, display.stage)
    with cli.user_errors():
      results = calibrate(
        setup, batch_sizes=args.batch_sizes, max_block_size=args.max_block_size,
        repeats=args.repeats, progress=display.stage,
      )  # fmt: skip
  with cli.user_errors():
    files.write_whole(args.out, files.to_json(_record(results, setup, argv)))
  console.print(table(results))
  console.print(f'Written to {args.out}', soft_wrap=True, markup=False)
  return 0


def _parser():
  parser = cli.Parser(
    prog='python -m experiments.calibrate',
    description='Measure what target calls and draft steps cost on this machine.',
  )
  cli.add_model_options(parser)
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('results/calibration.json'), metavar='FILE',
    help='default results/calibration.json',
  )  # fmt: skip
  parser.add_argument(
    '--batch-sizes', type=_sizes, default=list(BATCH_SIZES), metavar='B,B', help='default 1,8'
  )
  parser.add_argument(
    '--max-block-size', type=cli.at_least(1), default=64, metavar='T', help='default 64'
  )
  parser.add_argument(
    '--repeats', type=cli.at_least(1), default=10, metavar='R',
    help='runs of each size, of which the best counts (default 10)',
  )  # fmt: skip
  return parser


def _sizes(text):
  return sorted({cli.at_least(1)(part) for part in text.split(',')})


if __name__ == '__main__':
  raise SystemExit(main())

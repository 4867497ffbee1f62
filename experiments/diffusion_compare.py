"""`experiments.compare` for masked diffusion models: every policy on the same prompts.

  python -m experiments.compare --model tiny-diffusion
  python -m experiments.compare --model path/to/LLaDA --methods threshold,factor

The tiny network answers list tasks, which have right answers; other models answer prompts. All
methods are compared with the static sampler, which fills one slot per forward.
"""

import argparse
from collections.abc import Sequence
import datetime
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import decodax
from decodax import diffusion
from decodax.types import Request
from decodax.types import Result
from experiments import cli
from experiments import files
from experiments import tiny_diffusion
from experiments.diffusion_methods import METHODS
from experiments.diffusion_methods import STATIC
from experiments.diffusion_methods import Runner
from experiments.diffusion_methods import choose
from experiments.display import Display
from models.diffusion import load_diffusion
from train import list_tasks

BLOCK_SIZE = 32  # slots, of models other than the tiny one and not trained in blocks
_EXAMPLES = 80  # list tasks, if --num-prompts does not say


class Job(NamedTuple):
  """What is decoded, and how answers are judged."""

  runner: Runner
  examples: Sequence[list_tasks.Example] | None  # of the list tasks
  name: str


def is_diffusion(model: str) -> bool:
  """Returns whether `--model` names the tiny network or the folder of a diffusion model."""
  if model == tiny_diffusion.NAME:
    return True
  path = pathlib.Path(model).expanduser() / 'config.json'
  try:
    return 'mask_token_id' in json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return False


def list_methods() -> Table:
  """Returns the table of methods."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('method', style='bold', no_wrap=True)
  for heading in ('what it does', 'exactness', 'knob', 'needs'):
    table.add_column(heading)
  for method in METHODS.values():
    table.add_row(
      method.name, method.summary, method.exactness, f'{method.default:g}', method.needs
    )
  return table


def run(args: argparse.Namespace, argv: Sequence[str] | None, console: Console) -> int:
  """Returns the exit code of the comparison, as `experiments.compare` would."""
  if args.list:
    console.print(list_methods())
    return 0
  with Display(console) as display:
    job = _prepare(args, display)
    with cli.user_errors():
      names = choose(args.methods, job.runner.available())
    rows = _measure(args, job, names, display)
  results = {
    'schema': 1,
    'command': cli.command_line('experiments.compare', argv),
    'model': job.name,
    'temperature': args.temperature,
    'methods': rows,
  }
  slug = pathlib.PurePath(job.name).name
  stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  out = args.out or pathlib.Path('results') / f'compare-{slug}-{stamp}'
  with cli.user_errors():
    files.write_whole(out / 'results.json', files.to_json(results))
  console.print(methods_table(rows))
  console.print(f'Written to {out}/: results.json', markup=False)
  return int(any(row['num_failed'] for row in rows))


def _prepare(args, display) -> Job:
  with cli.user_errors():
    if args.model == tiny_diffusion.NAME:
      loaded = tiny_diffusion.load(args.model, display.stage)
      trained = tiny_diffusion.trained_parts(display.stage)
      examples = list(list_tasks.examples(args.num_prompts or _EXAMPLES, args.seed + 1))
      request = tiny_diffusion.make_request(
        examples, loaded.net.mask_id, temperature=args.temperature, seed=args.seed
      )
      size = list_tasks.CANVAS
    else:
      display.stage(f'loading {args.model}')
      loaded = load_diffusion(args.model, progress=display.stage)
      trained, examples = {}, None
      request = _text_request(args, loaded)
      size = loaded.net.block_size or min(BLOCK_SIZE, args.max_new_tokens)
  blocks = diffusion.fixed_blocks(size)
  runner = Runner(loaded.net, loaded.params, request, blocks=blocks, trained=trained)
  return Job(runner, examples, args.model)


def _text_request(args, loaded) -> Request:
  prompts = cli.read_prompts(args.prompts, args.num_prompts)
  tokens = [cli.encode_prompt(loaded.tokenizer, prompt.text) for prompt in prompts]
  return decodax.make_request(
    tokens,
    max_new_tokens=args.max_new_tokens,
    vocab_size=loaded.net.model.vocab_size,
    eos_ids=loaded.eos_ids,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    seed=args.seed,
    row_ids=[prompt.row_id for prompt in prompts],
    capacity=max(map(len, tokens)) + args.max_new_tokens,
  )


def _measure(args, job, names, display) -> list[dict[str, Any]]:
  """Returns a row per method: each compiled, then all run in turns, `--repeats` times."""
  for name in names:
    display.stage(f'compiling {name}')
    method = METHODS[name]
    job.runner.run(method, method.default)
  seconds = {name: [] for name in names}
  results = {}
  display.begin(names, args.repeats)
  for repeat in range(args.repeats):
    for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
      result, taken = job.runner.run(METHODS[name], METHODS[name].default)
      seconds[name].append(taken)
      results[name] = result
      emitted = int((result.length - result.prompt_length).sum())
      per_call = float(result.stats.num_committed.sum() / result.stats.num_calls.sum())
      display.advance(name, repeat + 1, emitted / taken, per_call)
  return [_row(job, name, results[name], seconds, results[STATIC]) for name in names]


def _row(job, name, result, seconds, static) -> dict[str, Any]:
  method = METHODS[name]
  filled = result.stats.num_committed - result.stats.num_revoked
  emitted = int((result.length - result.prompt_length).sum())
  taken, reference = float(np.median(seconds[name])), float(np.median(seconds[STATIC]))
  same = [
    bool(a == b and (s[:a] == t[:b]).all())
    for a, b, s, t in zip(result.length, static.length, result.tokens, static.tokens, strict=True)
  ]
  row = {
    'name': name,
    'knob': method.default,
    'exactness': method.exactness,
    'tokens_per_forward': float(filled.sum() / result.stats.num_calls.sum()),
    'forwards': float(result.stats.num_calls.mean()),
    'tokens_per_second': emitted / taken,
    'speedup': reference / taken,
    'same_as_static': sum(same),
    'num_prompts': len(same),
    'num_failed': int((result.result == Result.NON_FINITE).sum()),
    'compile_seconds': job.runner.compile(method, method.default).seconds,
    'accuracy': None,
  }
  if job.examples is not None:
    answers = tiny_diffusion.answers(result)
    right = [list_tasks.is_right(e, a) for e, a in zip(job.examples, answers, strict=True)]
    row['accuracy'] = float(np.mean(right))
  return row


def methods_table(rows: Sequence[dict[str, Any]]) -> Table:
  """Returns the table of methods."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('method', style='bold')
  table.add_column('exactness', overflow='fold')
  headings = ['tokens/forward', 'tokens/s', 'speed-up', 'same as static']
  judged = rows[0]['accuracy'] is not None
  for heading in headings + ['accuracy'] * judged:
    table.add_column(heading, justify='right')
  for row in rows:
    cells = [
      row['name'],
      'reference' if row['name'] == STATIC else row['exactness'],
      f'{row["tokens_per_forward"]:.2f}',
      f'{row["tokens_per_second"]:.0f}',
      f'{row["speedup"]:.2f}',
      f'{row["same_as_static"]}/{row["num_prompts"]}',
    ]
    table.add_row(*cells, *([f'{row["accuracy"]:.3f}'] if judged else []))
  return table

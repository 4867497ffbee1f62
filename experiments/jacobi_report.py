"""The figures of docs/jacobi.md: calls by category, copying, and how large a lookahead window pays.

  python -m experiments.jacobi_report categories   # chat, code, summaries, corrections; timed
  python -m experiments.jacobi_report copying      # calls, prompt by prompt, where text is edited
  python -m experiments.jacobi_report sweep        # window and n-gram of lookahead; a heat map

Each prints tables in Markdown and writes its numbers to results/jacobi/. `categories` is a run of
`experiments.compare`, and should have the machine to itself; the others count calls only. Expect
for SmolLM2-135M-Instruct: greedy Jacobi near 1 token/call, lookahead above it everywhere, copying
above 3 where most of the output is in the input.
"""

import argparse
from collections.abc import Sequence
import functools
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.drafters.input_guided import Source
from decodax.types import Drafter
from decodax.types import Params
from experiments import cli
from experiments import compare
from experiments import files
from experiments.methods import METHODS
from experiments.methods import Decoder
from experiments.methods import Setup

_EDITING = cli.PROMPTS_DIRECTORY / 'editing.jsonl'
_CATEGORIES = ('chat', 'code-writing', 'code-editing', 'summarising')
_METHODS = ('plain', 'ngram', 'jacobi', 'jacobi-ngram', 'lookahead', 'iad')
_WINDOWS, _NGRAMS = (1, 3, 5, 8), (3, 4, 5)
_COPIED = 0.8  # from this fraction of copied tokens on, an output mostly copies


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code."""
  return cli.run('jacobi_report', lambda: _main(argv))


def _main(argv):
  parser = cli.Parser(prog='python -m experiments.jacobi_report', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('what', choices=('categories', 'copying', 'sweep'))
  cli.add_model_options(parser)
  parser.add_argument('--max-new-tokens', type=cli.at_least(1), default=64, metavar='N')
  parser.add_argument('--num-prompts', type=cli.at_least(1), default=6, help='of each category')
  parser.add_argument(
    '--from-text', action='store_true', help='sweep: the n-grams of the text count, too'
  )
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('results/jacobi'))
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  if args.what == 'categories':
    return _categories(args)
  setup = cli.load_setup(args, lambda stage: print(f'loading {stage}', file=sys.stderr))
  return _copying(args, setup) if args.what == 'copying' else _sweep(args, setup)


# --- Categories --------------------------------------------------------------------------------


def _categories(args):
  """Runs `experiments.compare` on some prompts of every category."""
  prompts = _some_of_each(args.num_prompts)
  path = args.out / 'prompts.jsonl'
  lines = [
    {'question_id': number, 'category': prompt.category, 'turns': [prompt.text]}
    for number, prompt in enumerate(prompts, 1)
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
  return compare.main([
    '--model', args.model, '--prompts', str(path), '--methods', ','.join(_METHODS),
    '--max-new-tokens', str(args.max_new_tokens), '--out', str(args.out / 'categories'),
  ])  # fmt: skip


def _some_of_each(num_prompts):
  """Returns the first prompts of every category, one of each in turn."""
  every = [*cli.read_prompts(cli.DEFAULT_PROMPTS), *cli.read_prompts(_EDITING)]
  wanted = [*_CATEGORIES, 'grammar-correction', 'text-editing']
  groups = [[each for each in every if each.category == category] for category in wanted]
  return [group[index] for index in range(num_prompts) for group in groups if index < len(group)]


# --- Copying -----------------------------------------------------------------------------------


class Counted(NamedTuple):
  """What some rows emitted, and in how many calls."""

  tokens: list[list[int]]
  calls: np.ndarray  # i32[B]


def count_calls(
  setup: Setup,
  prompts: Sequence[Sequence[int]],
  drafter: Drafter,
  *,
  max_new_tokens: int,
  drafter_params: object = (),
) -> Counted:
  """Returns the greedy output of every prompt, decoded in one batch.

  Args:
    setup: with the target.
    prompts: token ids.
    drafter: what drafts.
    max_new_tokens: to emit at most.
    drafter_params: of the drafter.
  """
  target = setup.target
  decoder: Decoder = METHODS['plain'].build(setup)
  request = decodax.make_request(
    prompts,
    max_new_tokens=max_new_tokens,
    vocab_size=target.transformer.config.vocab_size,
    eos_ids=target.eos_ids,
  )
  run = functools.partial(
    decodax.decode, model=decoder.model, drafter=drafter, verifier=verifiers.greedy
  )
  params = Params(decoder.params.target, drafter_params)
  result = jax.device_get(jax.jit(run)(params, request))
  tokens = [
    result.tokens[row, result.prompt_length[row] : result.length[row]].tolist()
    for row in range(len(prompts))
  ]
  return Counted(tokens, np.asarray(result.stats.num_target_calls))


def copied_fraction(output: Sequence[int], source: Sequence[int], size: int = 4) -> float:
  """Returns the fraction of output tokens inside a run of `size` tokens that the source has."""
  known = {tuple(source[i : i + size]) for i in range(len(source) - size + 1)}
  covered = np.zeros(len(output), bool)
  for start in range(len(output) - size + 1):
    if tuple(output[start : start + size]) in known:
      covered[start : start + size] = True
  return float(covered.mean()) if len(output) else 0.0


def _copying(args, setup):
  """Counts calls on the editing prompts, with and without the source pointed out."""
  tokenizer = setup.target.tokenizer
  prompts = cli.read_prompts(_EDITING)
  encoded = [cli.encode_prompt(tokenizer, prompt.text) for prompt in prompts]
  spans = [
    _source_span(tokenizer, ids, prompt.text) for ids, prompt in zip(encoded, prompts, strict=True)
  ]
  source = Source(*(jnp.asarray(column, jnp.int32) for column in zip(*spans, strict=True)))
  count = functools.partial(count_calls, setup, encoded, max_new_tokens=args.max_new_tokens)
  found = {
    'ngram': count(drafters.ngram(num_drafts=15)),
    'lookahead': count(drafters.lookahead()),
    'iad': count(drafters.input_guided()),
    'iad, source given': count(drafters.input_guided(), drafter_params=source),
  }
  plain = count(drafters.plain())
  for name, each in found.items():
    assert each.tokens == plain.tokens, name  # token-identical
  copied = np.asarray(
    [
      copied_fraction(out, ids[start:end])
      for out, ids, (start, end) in zip(plain.tokens, encoded, spans, strict=True)
    ]
  )
  lengths = np.asarray([len(out) for out in plain.tokens])
  groups = {
    'all': np.ones(len(prompts), bool),
    **{name: np.asarray([p.category == name for p in prompts]) for name in _in_order(prompts)},
    f'copied >= {_COPIED:.0%}': copied >= _COPIED,
  }
  print('| prompts | number | tokens copied |', ' | '.join(found), '|')
  print('|---|---|---|', '---|' * len(found), sep='')
  for name, rows in groups.items():
    if not rows.any():
      continue
    rates = [f'{lengths[rows].sum() / each.calls[rows].sum():.2f}' for each in found.values()]
    share = (copied * lengths)[rows].sum() / lengths[rows].sum()
    print(f'| {name} | {rows.sum()} | {share:.0%} |', ' | '.join(rates), '|')
  record = {
    'prompts': [prompt.id for prompt in prompts],
    'copied': copied.tolist(),
    'tokens': lengths.tolist(),
    'calls': {name: each.calls.tolist() for name, each in found.items()},
  }
  files.write_whole(args.out / 'copying.json', files.to_json(record))
  return 0


def _in_order(prompts):
  return dict.fromkeys(prompt.category for prompt in prompts)


def _source_span(tokenizer, ids, text):
  """Returns (start, end) of the tokens of what follows the instruction's empty line."""
  _, _, body = text.partition('\n\n')
  wanted = tokenizer.encode(body)
  core = wanted[1:-1]  # what the text's ends become depends on what stands next to them
  for start in range(len(ids) - len(core) + 1):
    if ids[start : start + len(core)] == core:
      return start - 1, start + len(core) + 1
  return 0, len(ids)


# --- Sweep -------------------------------------------------------------------------------------


def _sweep(args, setup):
  """Counts calls over windows and n-gram lengths of lookahead; draws a heat map."""
  tokenizer = setup.target.tokenizer
  prompts = [cli.encode_prompt(tokenizer, p.text) for p in _some_of_each(args.num_prompts)]
  count = functools.partial(count_calls, setup, prompts, max_new_tokens=args.max_new_tokens)
  grid = np.zeros((len(_NGRAMS), len(_WINDOWS)))
  for i, ngram in enumerate(_NGRAMS):
    for j, window in enumerate(_WINDOWS):
      found = count(
        drafters.lookahead(window=window, ngram=ngram, num_ngrams=window, from_text=args.from_text)
      )
      grid[i, j] = sum(map(len, found.tokens)) / found.calls.sum()
      print(f'{ngram=} {window=}: {grid[i, j]:.3f}', file=sys.stderr, flush=True)
  print('| n-gram |', ' | '.join(f'W = G = {window}' for window in _WINDOWS), '|')
  print('|---|', '---|' * len(_WINDOWS), sep='')
  for ngram, row in zip(_NGRAMS, grid, strict=True):
    cells = [f'{v:.2f} ({_width(w, ngram)})' for v, w in zip(row, _WINDOWS, strict=True)]
    print(f'| {ngram} |', ' | '.join(cells), '|')
  _heat_map(grid, args.out / 'lookahead_sweep.png')
  record = {
    'windows': _WINDOWS, 'ngrams': _NGRAMS, 'from_text': args.from_text,
    'tokens_per_call': grid.tolist(),
  }  # fmt: skip
  files.write_whole(args.out / 'sweep.json', files.to_json(record))
  return 0


def _width(window, ngram):
  """Returns the tokens of a block with as many n-grams as columns: the most a call reads."""
  return 2 * window * (ngram - 1)


def _heat_map(grid, path):
  figure = Figure(figsize=(5, 3.4), layout='constrained')
  axis = figure.subplots()
  image = axis.imshow(grid, cmap='viridis', aspect='auto')
  axis.set_xticks(range(len(_WINDOWS)), [str(window) for window in _WINDOWS])
  axis.set_yticks(range(len(_NGRAMS)), [str(ngram) for ngram in _NGRAMS])
  axis.set_xlabel('columns of the window (and n-grams tried)')
  axis.set_ylabel('tokens of an n-gram')
  middle = (grid.min() + grid.max()) / 2
  for (i, j), value in np.ndenumerate(grid):
    text = f'{value:.2f}\n{_width(_WINDOWS[j], _NGRAMS[i])} wide'
    axis.text(j, i, text, ha='center', va='center', color='white' if value < middle else 'black')
  figure.colorbar(image, ax=axis, label='tokens/call')
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  sys.exit(main())

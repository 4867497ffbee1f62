"""Which method decodes fastest, on your model and your prompts?

  python -m experiments.compare
  python -m experiments.compare --model path/to/model --prompts mine.jsonl --temperature 0.8
  python -m experiments.compare --list
  python -m experiments.compare --model tiny-diffusion

Expect, for the first: SmolLM2-135M-Instruct answers 48 prompts with every method that needs no
other weights, the outputs are those of plain decoding, and n-gram lookup gains where text is
copied (code editing). Tables and plots are explained in docs/experiments.md. The last compares the
policies of masked diffusion on a tiny network, which is trained first.
"""

from collections.abc import Sequence
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

import decodax
from experiments import cli
from experiments import diffusion_compare
from experiments import files
from experiments import measure
from experiments import report
from experiments.display import Display
from experiments.display import make_console
from experiments.methods import METHODS
from experiments.methods import PLAIN
from experiments.methods import Setup

SCHEMA = 1
_NARROW = 100  # columns of a terminal too narrow for the wide table


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 if a run failed, 2 for wrong options, 128 + signal if stopped."""
  return cli.run('compare', lambda: _main(argv))


def _main(argv):
  args = _parser().parse_args(argv)
  console = make_console()
  if diffusion_compare.is_diffusion(args.model):
    return diffusion_compare.run(args, argv, console)
  if args.list:
    console.print(_list_methods())
    return 0
  names = cli.choose_methods(args.methods, args)
  names = [PLAIN, *(name for name in names if name != PLAIN)]  # what all are compared with
  prompts = cli.read_prompts(args.prompts, args.num_prompts)
  out = args.out or files.default_directory('compare', args.model)
  with files.results_directory(out) as directory:
    with Display(console) as display:
      comparison = _prepare(args, names, prompts, display)
      interrupt = comparison.run(display)
    if not comparison.runs[PLAIN]:
      raise interrupt or KeyboardInterrupt()
    with cli.uninterrupted():
      results = comparison.results(argv, partial=interrupt is not None)
      _report(console, results, directory, comparison.outputs())
  if interrupt is not None:
    return cli.exit_code_of(interrupt)
  return int(any(method['num_failed'] for method in results['methods']))


def _parser():
  parser = cli.Parser(
    prog='python -m experiments.compare',
    description='Decode the same prompts with several methods, side by side, and compare them.',
  )
  cli.add_model_options(parser)
  parser.add_argument(
    '--methods', metavar='A,B,C', help='default: every method whose weights are there'
  )
  parser.add_argument('--list', action='store_true', help='show the methods and stop')
  group = parser.add_argument_group('prompts')
  group.add_argument(
    '--prompts',
    default=cli.DEFAULT_PROMPTS,
    metavar='FILE.jsonl',
    help="default: the project's own",
  )
  group.add_argument(
    '--num-prompts', type=cli.at_least(1), metavar='N', help='only the first N (default all)'
  )
  group.add_argument(
    '--max-new-tokens', type=cli.at_least(1), default=48, metavar='N', help='default 48'
  )
  cli.add_sampling_options(parser)
  group = parser.add_argument_group('measuring')
  group.add_argument('--batch-size', type=cli.at_least(1), default=1, metavar='B', help='default 1')
  group.add_argument(
    '--repeats', type=cli.at_least(1), default=1, metavar='R', help='times each prompt (default 1)'
  )
  group.add_argument(
    '--out', type=pathlib.Path, metavar='DIR', help='default: a new folder under results/'
  )
  return parser


def _list_methods():
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('method', style='bold', no_wrap=True)
  for heading in ('what it does', 'when sampling', 'drafts', 'needs'):
    table.add_column(heading)
  for method in METHODS.values():
    table.add_row(
      method.name,
      method.summary,
      method.exactness(temperature=1.0),
      method.candidates.value,
      '--draft' if method.needs_draft else '--head' if method.needs_head else '',
    )
  table.caption = 'At temperature 0 every lossless method is token-identical to plain decoding.'
  table.caption_justify = 'left'
  return table


# --- Measuring ---------------------------------------------------------------------------------


def _head_of(setup, names):
  """Returns the head that drafts for one of the methods, or None."""
  return setup.own_head() if any(METHODS[name].needs_head for name in names) else setup.head


def _prepare(args, names, prompts, display):
  """Returns the comparison, with models loaded and prompts encoded."""
  start = time.perf_counter()
  display.stage(f'loading {args.model}')
  setup = cli.load_setup(args, display.stage)
  display.done('model', f'{_describe(setup.target)}, {time.perf_counter() - start:.1f} s')
  if setup.draft is not None:
    display.done('draft', _describe(setup.draft))
  head = _head_of(setup, names)
  if head is not None:
    display.done('head', f'{head.name} from {args.head or cli.shipped_head(args.model)}')
  config, tokenizer = setup.target.transformer.config, setup.target.tokenizer
  encoded = []
  for prompt in prompts:
    tokens = cli.encode_prompt(tokenizer, prompt.text)
    where = f'prompt {prompt.id}'
    cli.check_length(where, len(tokens), args.max_new_tokens, config.max_position)
    encoded.append(measure.EncodedPrompt(prompt.id, prompt.category, tokens, prompt.row_id))
  total = sum(len(prompt.tokens) for prompt in encoded)
  display.done(
    'prompts',
    f'{len(encoded)} of {total / len(encoded):.0f} tokens on average, '
    f'{args.max_new_tokens} to emit at most, temperature {args.temperature:g}',
  )
  setting = measure.Setting(
    max_new_tokens=args.max_new_tokens,
    vocab_size=config.vocab_size,
    eos_ids=setup.target.eos_ids,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    seed=args.seed,
    batch_size=min(args.batch_size, len(encoded)),
    repeats=args.repeats,
  )
  return _Comparison(args, names, setup, encoded, setting)


def _describe(loaded):
  transformer = loaded.transformer
  return (
    f'{loaded.name}, {_num_parameters(loaded) / 1e6:.1f} M parameters, {transformer.dtype} on '
    f'{_device()["kind"]}'
  )


class _Comparison:
  """The methods on the prompts, and what was measured until now."""

  def __init__(self, args, names, setup: Setup, prompts, setting: measure.Setting):
    self.args, self.names, self.setup = args, names, setup
    self.prompts, self.setting = prompts, setting
    self.compiled: dict[str, measure.CompiledMethod] = {}
    self.runs: dict[str, list[measure.Run]] = {name: [] for name in names}
    with cli.user_errors():
      self.decoders = {name: METHODS[name].build(setup) for name in names}
      self.requests = measure.make_requests(prompts, setting)

  def run(self, display) -> KeyboardInterrupt | None:
    """Compiles and runs everything; returns the interrupt if one came."""
    try:
      for name in self.names:
        self._compile(name, display)
      self._measure(display)
    except KeyboardInterrupt as interrupt:
      return interrupt
    return None

  def _compile(self, name, display):
    display.stage(f'compiling {name}')
    decoder, verifier = self.decoders[name], METHODS[name].verifier_for(self.setup)
    self.compiled[name] = measure.compile_method(decoder, verifier, self.requests[0])
    display.done('compiled', f'{name} in {self.compiled[name].compile_seconds:.1f} s')

  def _measure(self, display):
    repeats, num_prompts = self.setting.repeats, len(self.prompts)
    display.begin(self.names, num_prompts * repeats)
    for name, runs in measure.measure(self.compiled, self.requests, num_prompts, repeats):
      self.runs[name] += runs
      good = [run for run in self.runs[name] if not run.failed]
      tokens = sum(len(run.tokens) for run in good)
      seconds = sum(run.decode_seconds for run in good)
      calls = sum(int(run.stats.num_target_calls) for run in good)
      speed, per_call = tokens / seconds if good else 0.0, tokens / calls if good else 0.0
      display.advance(name, len(self.runs[name]), speed, per_call)

  def results(self, argv, *, partial: bool) -> dict[str, Any]:
    """Returns what results.json holds."""
    head = _head_of(self.setup, self.names)
    return {
      'schema': SCHEMA,
      'partial': partial,
      'command': cli.command_line('experiments.compare', argv),
      'model': _model_facts(self.setup.target),
      'draft': None if self.setup.draft is None else _model_facts(self.setup.draft),
      'head': None if head is None else dict(head.facts),
      'device': _device(),
      'versions': _versions(),
      'config': self._config(),
      'methods': [self._method_results(name) for name in self.names if self.runs[name]],
    }

  def _config(self):
    args, setting = self.args, self.setting
    return {
      'methods': self.names,
      'prompts': str(args.prompts),
      'num_prompts': len(self.prompts),
      'max_new_tokens': setting.max_new_tokens,
      'temperature': setting.temperature,
      'top_p': setting.top_p,
      'top_k': setting.top_k,
      'num_drafts': args.num_drafts,
      'exit_layer': args.exit_layer,
      'batch_size': setting.batch_size,
      'repeats': setting.repeats,
      'seed': setting.seed,
      'capacity': self.requests[0].tokens.shape[1],
      'eos_ids': list(setting.eos_ids),
      'confidence': measure.CONFIDENCE,
      'num_resamples': measure.NUM_RESAMPLES,
    }

  def _method_results(self, name):
    method, temperature = METHODS[name], self.setting.temperature
    exactness = method.exactness(temperature)
    runs, plain, batch_size = self.runs[name], self.runs[PLAIN], self.setting.batch_size
    comparable = temperature == 0 or exactness == 'token-identical'
    summary = measure.summarize(runs, plain, batch_size=batch_size, comparable=comparable)
    failed = {self.prompts[run.prompt].id: None for run in runs if run.failed}
    return {
      'name': name,
      'exactness': exactness,
      'temperature': temperature,
      **summary,
      'compile_seconds': self.compiled[name].compile_seconds,
      'failed_prompts': list(failed),
      'categories': measure.by_category(runs, plain, self.prompts, batch_size=batch_size),
    }

  def outputs(self) -> list[dict[str, Any]]:
    """Returns what outputs.jsonl holds: the first run of each prompt with each method."""
    tokenizer = self.setup.target.tokenizer
    return [
      {
        'prompt_id': self.prompts[run.prompt].id,
        'category': self.prompts[run.prompt].category,
        'method': name,
        'result': run.result.name.lower(),
        'tokens': list(run.tokens),
        'text': tokenizer.decode(run.tokens),
      }
      for name in self.names
      for run in self.runs[name]
      if run.repeat == 0
    ]


# --- Facts -------------------------------------------------------------------------------------


def _model_facts(loaded):
  return {
    'name': loaded.name,
    'source': loaded.source,
    'num_parameters': _num_parameters(loaded),
    'dtype': str(loaded.transformer.dtype),
  }


def _num_parameters(loaded):
  """Returns how many there are; a head that is a copy of the embedding counts once."""
  transformer = loaded.transformer
  stored = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(transformer)))
  if transformer.head is None:
    return stored
  head, embedding = transformer.head[...], transformer.embedding[...]
  return stored - (head.size if jnp.array_equal(head, embedding.T) else 0)


def _device():
  device = jax.devices()[0]
  kind = device.device_kind
  if device.platform == 'cpu':
    kind = f'{platform.machine()} CPU, {_num_cores()} cores'
  return {'platform': device.platform, 'kind': kind, 'count': jax.device_count()}


def _num_cores():
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _versions():
  found = {'python': platform.python_version(), 'decodax': decodax.__version__}
  for name in ('jax', 'jaxlib', 'flax', 'numpy'):
    found[name] = importlib.metadata.version(name)
  return found


# --- The end -----------------------------------------------------------------------------------


def _report(console, results, directory, outputs):
  """Writes the files and prints the tables; files first, since a terminal may be gone."""
  names = report.write_all(directory, results, outputs)
  console.print()
  console.print(report.methods_table(results, narrow=console.width < _NARROW))
  if len(results['methods']) > 1:
    console.print('Speed-up and tokens/call by category', style='bold')
    console.print(report.categories_table(results))
  for note in report.notes(results):
    console.print(note, soft_wrap=True)
  console.print(f'Written to {directory}/: {", ".join(names)}', soft_wrap=True, markup=False)


if __name__ == '__main__':
  sys.exit(main())

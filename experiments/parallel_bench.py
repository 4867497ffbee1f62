"""What does writing several tokens at once cost, on tasks whose tokens depend on each other or not?

  python -m experiments.parallel_bench
  python -m experiments.parallel_bench --methods threshold,factor,klass --num-examples 100
  python -m experiments.parallel_bench --model exact --temperature 1
  python -m experiments.parallel_bench --data waiting_line/copy.jsonl waiting_line/shuffle.jsonl

Trains the tiny diffusion network first if it is not there. Sweeps every unmasking policy over its
knob on ten list tasks (examples of our own, or published ones), and prints accuracy beside tokens
per forward. Expect, with the exact network: where the question fixes the answer, all of it in one
forward and right; where it leaves a choice, an accuracy that falls as tokens per forward rise.
docs/diffusion.md explains the plots.
"""

from collections.abc import Mapping, Sequence
import io
import math
import pathlib
import sys
from typing import Any

from matplotlib.figure import Figure
import numpy as np
from rich import box
from rich.table import Table

from decodax import diffusion
from decodax.diffusion import limits
from decodax.types import Result
from experiments import cli
from experiments import files
from experiments import tiny_diffusion
from experiments.diffusion_methods import METHODS
from experiments.diffusion_methods import ORACLE
from experiments.diffusion_methods import STATIC
from experiments.diffusion_methods import Runner
from experiments.diffusion_methods import choose
from experiments.display import make_console
from experiments.exact_network import exact_network
from experiments.exact_network import make_worlds
from train import list_tasks
from train.list_tasks.published import read_published

SCHEMA = 1
EXACT = 'exact'  # the network that knows all laws
BLOCK_SIZES = (4, 2)  # where rules of blocks are compared
BLOCK_TAU = 0.9
CACHE_BLOCK = 4  # slots of a block where caches are compared: the canvas has several
# Okabe and Ito's colours, which colour-blind people can tell apart, then some between.
_COLORS = ('#222222', '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#7F7F7F',
           '#B8A100', '#5E3C99')  # fmt: skip
_MARKERS = 'os^vDPX<>*'
_LINES = ('-', '--', '-.')  # from ten methods to the next


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong options, 128 + signal if stopped."""
  return cli.run('parallel_bench', lambda: _main(argv))


def _main(argv):
  args = _parser().parse_args(argv)
  console = make_console()
  say = lambda text: console.print(text, style='dim', markup=False)  # noqa: E731
  with cli.user_errors():
    examples = _examples(args)
  runner = _make_runner(args, examples, say)
  with cli.user_errors():
    available = [name for name in runner.available() if args.model != EXACT or name != 'guided']
    names = choose(args.methods, available)
  points = []
  for name in names:
    for knob in METHODS[name].knobs:
      point = measure(runner, name, knob, examples)
      points.append(point)
      say(_line(point))
  no_caches = args.no_caches or args.model == EXACT
  caches = [] if no_caches else compare_caches(runner, examples, say)
  blocks = compare_blocks(runner, examples, say) if args.blocks else []
  results = {
    'schema': SCHEMA,
    'command': cli.command_line('experiments.parallel_bench', argv),
    'model': args.model,
    'temperature': args.temperature,
    'block_size': args.block_size,
    'num_examples': args.num_examples,
    'data': [str(path) for path in args.data or ()],
    'points': points,
    'caches': caches,
    'blocks': blocks,
    'limits': limit_curves(),
  }
  files.write_whole(args.out / 'parallel_bench.json', files.to_json(results))
  files.write_whole(args.out / 'diffusion_pareto.png', _png(plot_pareto(results)))
  files.write_whole(args.out / 'diffusion_tasks.png', _png(plot_tasks(results)))
  console.print(points_table(points))
  if caches:
    console.print(caches_table(caches))
  if blocks:
    console.print(blocks_table(blocks))
  for sentence in findings(points):
    console.print(sentence, markup=False)
  console.print(f'Written to {args.out}/', markup=False)
  return 0


def _examples(args) -> list[list_tasks.Example]:
  if args.data:
    return [example for path in args.data for example in read_published(path)[: args.num_examples]]
  return [
    example
    for task in list_tasks.TASKS
    for example in list_tasks.examples(args.num_examples, args.seed + 1, (task,))
  ]


def _make_runner(args, examples, say) -> Runner:
  """Returns what runs methods on the examples with the model that was asked for."""
  options = dict(temperature=args.temperature, seed=args.seed)
  if args.model == EXACT:
    net, params, trained = exact_network(), make_worlds(examples), {}
  else:
    with cli.user_errors():
      loaded = tiny_diffusion.load(args.model, say)
      trained = tiny_diffusion.trained_parts(say) if args.model == tiny_diffusion.NAME else {}
    net, params = loaded.net, loaded.params
  request = tiny_diffusion.make_request(examples, net.mask_id, **options)
  blocks = diffusion.fixed_blocks(args.block_size)
  return Runner(net, params, request, blocks=blocks, trained=trained)


def _parser():
  parser = cli.Parser(
    prog='python -m experiments.parallel_bench',
    description='Accuracy against tokens per forward, for every unmasking policy.',
  )
  parser.add_argument(
    '--model', default=tiny_diffusion.NAME, metavar='DIR',
    help="a network trained on the list tasks (default: the tiny one, trained if need be), or "
    f"'{EXACT}': one that knows all laws, untrained",
  )  # fmt: skip
  parser.add_argument(
    '--data', nargs='+', type=pathlib.Path, metavar='FILE.jsonl',
    help='published waiting-line tasks, instead of examples of our own',
  )  # fmt: skip
  parser.add_argument('--methods', metavar='A,B,C', help='default: all whose weights are there')
  parser.add_argument(
    '--num-examples', type=cli.at_least(1), default=40, metavar='N', help='per task (default 40)'
  )
  parser.add_argument(
    '--block-size', type=cli.at_least(1), default=list_tasks.CANVAS, metavar='S',
    help='slots of a block (default: the whole canvas)',
  )  # fmt: skip
  parser.add_argument('--temperature', type=float, default=0.0, metavar='T', help='default 0')
  parser.add_argument('--seed', type=int, default=0, metavar='N')
  parser.add_argument('--no-caches', action='store_true', help='leave the caches out')
  parser.add_argument(
    '--blocks', action='store_true', help='compare blocks of fixed size with adaptive ones too'
  )
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('results/parallel_bench'), metavar='DIR'
  )
  return parser


# --- Measuring ------------------------------------------------------------------------------------


def measure(
  runner: Runner, name: str, knob: float, examples: Sequence[list_tasks.Example]
) -> dict[str, Any]:
  """Returns what one method reaches at one value of its knob, by task and overall."""
  result, seconds = runner.run(METHODS[name], knob)
  return {'method': name, 'knob': knob, 'seconds': seconds, **summarize(result, examples)}


def summarize(result: Any, examples: Sequence[list_tasks.Example]) -> dict[str, Any]:
  """Returns accuracy and tokens per forward by task, and of the two kinds of tasks.

  Tokens per forward are slots filled by forwards; the static sampler's are 1 by definition. Of
  tasks without an example all numbers are None.
  """
  right = np.array([
    list_tasks.is_right(example, answer)
    for example, answer in zip(examples, tiny_diffusion.answers(result), strict=True)
  ])  # fmt: skip
  filled, calls = result.stats.num_committed - result.stats.num_revoked, result.stats.num_calls
  tasks = np.array([example.task for example in examples])
  fixed = np.isin(tasks, list_tasks.INDEPENDENT)

  def of(rows):
    if not rows.any():
      return dict.fromkeys(('accuracy', 'tokens_per_forward', 'forwards'))
    return {
      'accuracy': float(right[rows].mean()),
      'tokens_per_forward': float(filled[rows].sum() / calls[rows].sum()),
      'forwards': float(calls[rows].mean()),
    }

  return {
    'num_failed': int((result.result == Result.NON_FINITE).sum()),
    'queries_per_token': float(result.stats.num_queries.sum() / filled.sum()),
    'fixed': of(fixed),
    'chosen': of(~fixed),
    'tasks': {task: of(tasks == task) for task in list_tasks.TASKS},
  }


def compare_caches(runner: Runner, examples, say) -> list[dict[str, Any]]:
  """Returns what each cache costs and saves, in blocks of `CACHE_BLOCK` slots."""
  found = []
  rules = {
    'none': diffusion.no_cache(),
    'prefix': diffusion.prefix_cache(),
    'dual': diffusion.dual_cache(),
    'delayed, every 4': diffusion.delayed_cache(4),
    'delayed, every 8': diffusion.delayed_cache(8),
  }
  for name, rule in rules.items():
    blocks = diffusion.fixed_blocks(CACHE_BLOCK)
    other = Runner(
      runner.net, runner.params, runner.request, blocks=blocks, cache=diffusion.audited(rule)
    )
    result, _ = other.run(METHODS['threshold'], 0.9)
    plain = Runner(runner.net, runner.params, runner.request, blocks=blocks, cache=rule)
    plain.run(METHODS['threshold'], 0.9)
    _, seconds = plain.run(METHODS['threshold'], 0.9)
    slots = result.cache.num_slots.sum()
    found.append({
      'cache': name,
      'exactness': rule.exactness,
      'seconds': seconds,
      'kl': float(result.cache.kl.sum() / slots),
      'same_best': float(result.cache.same_best.sum() / slots),
      **summarize(result, examples),
    })  # fmt: skip
    say(f'cache {name}: done')
  return found


def compare_blocks(runner: Runner, examples, say) -> list[dict[str, Any]]:
  """Returns what blocks of fixed size reach and what those do that end where the answer does.

  Decoded with `threshold`, at `BLOCK_TAU`. The delimiter of adaptive blocks is the end of text,
  which they look for in twice their size.
  """
  rules = {'the whole canvas': diffusion.fixed_blocks(list_tasks.CANVAS)}
  for size in BLOCK_SIZES:
    rules[f'fixed, {size}'] = diffusion.fixed_blocks(size)
    rules[f'adaptive, {size}'] = diffusion.adaptive_blocks(
      size, [list_tasks.EOS_ID], window=2 * size
    )
  found = []
  for name, rule in rules.items():
    other = Runner(runner.net, runner.params, runner.request, blocks=rule)
    result, _ = other.run(METHODS['threshold'], BLOCK_TAU)
    num_blocks = float(result.stats.num_blocks.mean())
    found.append({'blocks': name, 'num_blocks': num_blocks, **summarize(result, examples)})
    say(f'blocks, {name}: done')
  return found


def limit_curves() -> dict[str, dict[str, Any]]:
  """Returns, for each task, what a network that knows all laws reaches with k slots a forward.

  Slots are written from left to right and drawn at temperature 1; lengths are as in the tasks.
  """
  sizes = range(1, list_tasks.LONGEST + 2)
  curves = {}
  for task in list_tasks.TASKS:
    accuracy = [float(np.mean(list(_perfect(task, size)))) for size in sizes]
    curves[task] = {
      'slots': list(sizes),
      'accuracy': accuracy,
      'total_correlation_nats': float(np.mean(list(_dependence(task)))),
    }
  return curves


def _lengths():
  return range(list_tasks.SHORTEST, list_tasks.LONGEST + 1)


def _perfect(task, size):
  for length in _lengths():
    if task in list_tasks.INDEPENDENT:
      yield 1.0
    elif task == 'shuffle':
      yield limits.shuffle_accuracy(length, size)
    else:
      worlds = _worlds(task, length)
      groups = limits.left_to_right(len(worlds[0]), size)
      yield limits.accuracy_of_groups(worlds, groups)


def _dependence(task):
  for length in _lengths():
    if task in list_tasks.INDEPENDENT:
      yield 0.0
    elif task == 'shuffle':
      yield length * math.log(length) - math.lgamma(length + 1)
    else:
      yield limits.total_correlation(_worlds(task, length))


def _worlds(task, length):
  rng = np.random.default_rng(0)
  return list_tasks.possible_answers(list_tasks.make_example(task, rng, length))


# --- For a person ---------------------------------------------------------------------------------


def _line(point):
  return (
    f'{point["method"]} at {point["knob"]:g}: {_accuracy(point, "fixed")} at '
    f'{_speed(point, "fixed")} tokens/forward where answers are fixed, '
    f'{_accuracy(point, "chosen")} at {_speed(point, "chosen")} where chosen'
  )


def _accuracy(point, kind):
  value = point[kind]['accuracy']
  return '-' if value is None else f'{value:.3f}'


def _speed(point, kind):
  value = point[kind]['tokens_per_forward']
  return '-' if value is None else f'{value:.2f}'


def _forwards(point, kind):
  value = point[kind]['forwards']
  return '-' if value is None else f'{value:.2f}'


def points_table(points: Sequence[Mapping[str, Any]]) -> Table:
  """Returns the table of all points."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('method', style='bold')
  for heading in ('knob', 'fixed: accuracy', 'tokens/forward', 'chosen: accuracy',
                  'tokens/forward', 'seconds'):  # fmt: skip
    table.add_column(heading, justify='right')
  for point in points:
    table.add_row(
      point['method'],
      f'{point["knob"]:g}',
      _accuracy(point, 'fixed'),
      _speed(point, 'fixed'),
      _accuracy(point, 'chosen'),
      _speed(point, 'chosen'),
      f'{point["seconds"]:.2f}',
    )
  return table


def caches_table(caches: Sequence[Mapping[str, Any]]) -> Table:
  """Returns the table of caches."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('cache', style='bold')
  for heading in ('fixed: accuracy', 'chosen: accuracy', 'queries/token', 'seconds', 'KL, nats',
                  'same best token'):  # fmt: skip
    table.add_column(heading, justify='right')
  for each in caches:
    table.add_row(
      each['cache'],
      _accuracy(each, 'fixed'),
      _accuracy(each, 'chosen'),
      f'{each["queries_per_token"]:.1f}',
      f'{each["seconds"]:.2f}',
      f'{each["kl"]:.4f}',
      f'{each["same_best"]:.4f}',
    )
  return table


def blocks_table(blocks: Sequence[Mapping[str, Any]]) -> Table:
  """Returns the table of blocks."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('blocks', style='bold')
  for heading in ('fixed: accuracy', 'tokens/forward', 'forwards', 'chosen: accuracy',
                  'tokens/forward', 'forwards', 'blocks finished'):  # fmt: skip
    table.add_column(heading, justify='right')
  for each in blocks:
    cells = [
      cell(each, kind)
      for kind in ('fixed', 'chosen')
      for cell in (_accuracy, _speed, _forwards)
    ]  # fmt: skip
    table.add_row(each['blocks'], *cells, f'{each["num_blocks"]:.2f}')
  return table


def findings(points: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns what the points say: the fastest at the static sampler's accuracy, task by task.

  The oracle, which is told the answer, does not take part.
  """
  points = [p for p in points if p['method'] != ORACLE]
  reference = next(p for p in points if p['method'] == STATIC)
  found = []
  for kind, what in (('fixed', 'the question fixes the answer'), ('chosen', 'it leaves a choice')):
    if reference[kind]['accuracy'] is None:
      continue
    best = _best(points, reference, lambda p, kind=kind: p[kind])
    found.append(f'Where {what}: {best}')
  for task in list_tasks.TASKS:
    if reference['tasks'][task]['accuracy'] is None:
      continue
    best = _best(points, reference, lambda p, task=task: p['tasks'][task])
    found.append(f'  {task}: {best}')
  return found


def _best(points, reference, part):
  wanted = part(reference)['accuracy'] - 0.01
  good = [p for p in points if part(p)['accuracy'] >= wanted]
  best = max(good, key=lambda p: part(p)['tokens_per_forward'])
  share = part(best)['forwards'] / part(reference)['forwards']
  return (
    f'static {part(reference)["accuracy"]:.3f}; within 0.01 of it {best["method"]} at '
    f'{best["knob"]:g} with {part(best)["tokens_per_forward"]:.2f} tokens/forward, '
    f'{share:.2f} of the forwards'
  )


def plot_pareto(results: Mapping[str, Any]) -> Figure:
  """Returns accuracy against tokens per forward, for the two kinds of tasks."""
  figure = Figure(figsize=(10, 5.4), layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  titles = {
    'fixed': 'The question fixes the answer',
    'chosen': 'It leaves a choice',
  }
  for axes, (kind, title) in zip(panels, titles.items(), strict=True):
    _curves(axes, results['points'], lambda p, kind=kind: p[kind])
    axes.set_title(title, fontsize=10, loc='left')
  tasks = [results['limits'][t] for t in list_tasks.TASKS if t not in list_tasks.INDEPENDENT]
  mean = np.mean([t['accuracy'] for t in tasks], axis=0)
  panels[1].plot(tasks[0]['slots'], mean, color='#222222', linestyle=':', label='all laws known')
  _finish(figure, panels, results)
  return figure


def plot_tasks(results: Mapping[str, Any]) -> Figure:
  """Returns accuracy against tokens per forward for each task, with its limit."""
  figure = Figure(figsize=(12, 6.4), layout='constrained')
  panels = figure.subplots(2, 5, sharex=True, sharey=True)
  for axes, task in zip(panels.flat, list_tasks.TASKS, strict=True):
    _curves(axes, results['points'], lambda p, task=task: p['tasks'][task], size=3)
    limit = results['limits'][task]
    axes.plot(limit['slots'], limit['accuracy'], color='#222222', linestyle=':',
              label='all laws known')  # fmt: skip
    axes.set_title(f'{task}: {limit["total_correlation_nats"]:.1f} nats', fontsize=9, loc='left')
  _finish(figure, list(panels.flat), results)
  return figure


def _curves(axes, points, part, size=5):
  for index, name in enumerate(dict.fromkeys(p['method'] for p in points)):
    some = [part(p) for p in points if p['method'] == name]
    some = [each for each in some if each['accuracy'] is not None]
    some.sort(key=lambda each: each['tokens_per_forward'])
    axes.plot(
      [each['tokens_per_forward'] for each in some],
      [each['accuracy'] for each in some],
      marker=_MARKERS[index % len(_MARKERS)], markersize=size, linewidth=1,
      color=_COLORS[index % len(_COLORS)], linestyle=_LINES[index // len(_COLORS) % len(_LINES)],
      label=name,
    )  # fmt: skip


def _finish(figure, panels, results):
  for axes in panels:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='#CCCCCC', linewidth=0.5)
    axes.set_ylim(-0.02, 1.04)
  figure.supxlabel('tokens per forward (right is faster)', fontsize=9)
  figure.supylabel('accuracy', fontsize=9)
  handles, labels = panels[-1].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right upper', frameon=False, fontsize=8)
  figure.suptitle(
    f'Parallel decoding, {results["model"]}, temperature {results["temperature"]:g}, '
    f'{results["num_examples"]} '
    f'examples a task', fontsize=11, x=0.01, ha='left',
  )  # fmt: skip


def _png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  return buffer.getvalue()


if __name__ == '__main__':
  sys.exit(main())

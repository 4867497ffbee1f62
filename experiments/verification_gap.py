"""How far is each rule for several drafts of one token from the best that any rule could do?

  python -m experiments.verification_gap
  python -m experiments.verification_gap --families zipf,dirichlet --synthetic-vocab 2048
  python -m experiments.verification_gap --model path/to/model --draft path/to/smaller-model

Takes next-token laws of a target and of a draft for it, and tabulates for k = 1, 2, ... drafts the
acceptance of every multi-draft rule beside the optimum for drafts made in the same way. Laws come
from a model reading the prompts (the draft being its own first layers, itself at a higher
temperature, or another model) and from two synthetic families.

Expect, for the first: a few minutes on two cores; the tables of docs/verification_gap.md.
"""

from collections.abc import Iterator, Mapping, Sequence
import io
import pathlib
import sys
import time
from typing import Any, NamedTuple

from matplotlib.figure import Figure
import numpy as np
from rich import box
from rich.table import Table

from experiments import cli
from experiments import files as files_lib
from experiments.acceptance import CHOSEN
from experiments.acceptance import DISTINCT
from experiments.acceptance import IID
from experiments.acceptance import RULES
from experiments.acceptance import Array
from experiments.acceptance import Curves
from experiments.acceptance import acceptance_curves
from experiments.display import Display
from experiments.display import make_console
from experiments.laws import choose_sites
from experiments.laws import read_logits
from experiments.laws import softmax
from models.registry import DEFAULT_MODEL

SCHEMA = 1
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_MAX_DRAFTS = 16
_MAX_SEED = 2**31 - 1

_TEXT_FAMILIES = ('early-exit', 'warmer', 'draft')
_FAMILIES = (*_TEXT_FAMILIES, 'zipf', 'dirichlet')


class Family(NamedTuple):
  """Pairs of laws."""

  name: str
  title: str
  p: Array  # f64[M, V] the target's
  q: Array  # f64[M, V] the draft's


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong options, 128 + signal if stopped."""
  return cli.run('verification_gap', lambda: _main(argv))


def _main(argv):
  args = _parser().parse_args(argv)
  names = _choose_families(args)
  console = make_console()
  out = args.out or files_lib.default_directory('verification-gap')
  with files_lib.results_directory(out) as directory:
    start = time.perf_counter()
    with Display(console) as display:
      families = _measure(names, args, display)
    results = _results(argv, args, families, time.perf_counter() - start)
    with cli.uninterrupted():
      files = _write(directory, results)
  for family in families:
    console.print()
    console.print(_table(family))
    for sentence in family['findings']:
      console.print(sentence, soft_wrap=True)
  console.print(f'Written to {directory}/: {", ".join(files)}', soft_wrap=True, markup=False)
  return 0


def _measure(names, args, display):
  found = []
  for family in _families(names, args, display):
    start = time.perf_counter()
    display.stage(f'{family.title}: {len(family.p)} laws over {family.p.shape[-1]:,} tokens')
    curves = acceptance_curves(
      family.p, family.q, args.max_drafts, num_samples=args.num_samples, seed=args.seed
    )
    found.append(summarize(family, curves, args.seed))
    display.done('family', f'{family.title}, in {time.perf_counter() - start:.0f} s')
  return found


# --- Options -----------------------------------------------------------------------------------


def _parser():
  parser = cli.Parser(
    prog='python -m experiments.verification_gap',
    description='Acceptance of every multi-draft rule beside the optimum.',
  )
  parser.set_defaults(num_drafts=None, head=None)
  add = parser.add_argument_group('models').add_argument
  add('--model', default=DEFAULT_MODEL, metavar='NAME|DIR|FILE.gguf', help='the target')
  add('--draft', metavar='NAME|DIR|FILE.gguf', help='adds a family: this model drafts')
  add('--exit-layer', type=cli.at_least(1), metavar='L', help='layers that draft (default 3/4)')
  add('--temperature', type=cli.at_least(0.01), default=1.0, metavar='T', help='default 1')
  add(
    '--warmer', type=cli.at_least(0.01), default=1.5, metavar='F',
    help='factor on the temperature for the family where the target drafts for itself (1.5)',
  )  # fmt: skip
  add = parser.add_argument_group('laws').add_argument
  add('--families', metavar='A,B', help=f'of {", ".join(_FAMILIES)} (default all there are)')
  add('--num-laws', type=cli.at_least(2), default=256, metavar='M', help='per family (256)')
  add('--prompts', default=cli.DEFAULT_PROMPTS, metavar='FILE.jsonl', help='default: ours')
  add('--num-prompts', type=cli.at_least(1), metavar='N', help='only the first N (default all)')
  add('--synthetic-vocab', type=cli.at_least(_MAX_DRAFTS), default=512, metavar='V', help='512')
  add('--zipf-exponent', type=cli.at_least(0.0), default=1.1, metavar='S', help='default 1.1')
  add('--zipf-jitter', type=cli.at_least(0.0), default=0.7, metavar='J',
      help="standard deviation of the noise on the draft's log ranks (0.7)")  # fmt: skip
  add('--concentration', type=cli.at_least(0.01), default=0.3, metavar='C',
      help="of the Dirichlet law that laws are drawn from (0.3)")  # fmt: skip
  add = parser.add_argument_group('measuring').add_argument
  add('--max-drafts', type=cli.at_least(1, _MAX_DRAFTS), default=8, metavar='K', help='default 8')
  add('--num-samples', type=cli.at_least(2), default=16, metavar='N',
      help='draws per law for the rules without a closed form (16)')  # fmt: skip
  add('--seed', type=cli.at_least(0, _MAX_SEED), default=0, metavar='S', help='default 0')
  add('--out', type=pathlib.Path, metavar='DIR', help='default: a new folder under results/')
  return parser


def _choose_families(args):
  if args.families is None:
    return [name for name in _FAMILIES if name != 'draft' or args.draft is not None]
  names = list(dict.fromkeys(each.strip() for each in args.families.split(',') if each.strip()))
  if not names:
    raise cli.UserError(f'no family named; valid are: {", ".join(_FAMILIES)}')
  for name in names:
    if name not in _FAMILIES:
      near = cli.nearest_text(name, _FAMILIES, show_all=True)
      raise cli.UserError(f'unknown family {name!r}{near}')
  if 'draft' in names and args.draft is None:
    raise cli.UserError("family 'draft' needs the weights of a draft model: give --draft")
  return names


# --- Laws --------------------------------------------------------------------------------------


def _families(names, args, display) -> Iterator[Family]:
  """Yields one family at a time: those of a real vocabulary are large."""
  rng = np.random.default_rng(args.seed)
  text = [name for name in _TEXT_FAMILIES if name in names]
  if text:
    yield from _text_families(text, args, rng, display)
  if 'zipf' in names:
    yield _zipf(args, rng)
  if 'dirichlet' in names:
    yield _dirichlet(args, rng)


def _zipf(args, rng):
  """The target's laws fall with the rank; the draft has the same law over ranks it mistakes."""
  ranks = np.arange(1, args.synthetic_vocab + 1)
  weights = ranks ** -float(args.zipf_exponent)
  noise = args.zipf_jitter * rng.normal(size=(args.num_laws, args.synthetic_vocab))
  mistaken = np.argsort(np.argsort(np.log(ranks) + noise, axis=-1), axis=-1)
  law = weights / weights.sum()
  title = f'Zipf, exponent {args.zipf_exponent:g}, jitter {args.zipf_jitter:g}'
  return Family('zipf', title, np.broadcast_to(law, mistaken.shape), law[mistaken])


def _dirichlet(args, rng):
  concentration = np.full(args.synthetic_vocab, args.concentration)
  p, q = rng.dirichlet(concentration, (2, args.num_laws))
  return Family('dirichlet', f'Dirichlet, concentration {args.concentration:g}', p, q)


def _text_families(names, args, rng, display):
  setup = cli.load_setup(args, display.stage)
  target, temperature = setup.target, args.temperature
  layers = target.transformer.config.num_layers
  exit_layer = args.exit_layer or max(1, layers * 3 // 4)
  if exit_layer > layers:
    raise cli.UserError(f'--exit-layer {exit_layer} is above the {layers} layers of {target.name}')
  draft = setup.draft
  if draft is not None:
    _check_vocabularies(draft, target)
  texts = _encode(target, cli.read_prompts(args.prompts, args.num_prompts))
  sites = choose_sites(texts, args.num_laws, rng)
  display.stage(f'{target.name}: reading the prompts')
  with cli.user_errors():
    logits, early = read_logits(target, texts, sites, exit_layer)
  p = softmax(logits, temperature)
  if 'early-exit' in names:
    title = f'{target.name}, its first {exit_layer} of {layers} layers draft'
    yield Family('early-exit', title, p, softmax(early, temperature))
  del early
  if 'warmer' in names:
    title = f'{target.name}, itself at {args.warmer:g} times the temperature drafts'
    yield Family('warmer', title, p, softmax(logits, temperature * args.warmer))
  if 'draft' in names and draft is not None:
    display.stage(f'{draft.name}: reading the prompts')
    with cli.user_errors():
      drafted, _ = read_logits(draft, texts, sites, draft.transformer.config.num_layers)
    title = f'{target.name}, {draft.name} drafts'
    yield Family('draft', title, p, softmax(drafted, temperature))


def _check_vocabularies(draft, target):
  sizes = [each.transformer.config.vocab_size for each in (draft, target)]
  if sizes[0] != sizes[1]:
    raise cli.UserError(
      f'the draft model {draft.name} has a vocabulary of {sizes[0]}, {target.name} one of '
      f'{sizes[1]}: they must share one'
    )


def _encode(target, prompts):
  texts, room = [], target.transformer.config.max_position
  for prompt in prompts:
    texts.append(cli.encode_prompt(target.tokenizer, prompt.text))
    if len(texts[-1]) > room:
      raise cli.UserError(
        f'prompt {prompt.id} has {len(texts[-1])} tokens, but {target.name} has {room} positions'
      )
  return texts


# --- Findings ----------------------------------------------------------------------------------


def summarize(family: Family, curves: Curves, seed: int) -> dict[str, Any]:
  """Returns what the results hold of a family: means over laws, intervals and sentences."""
  num_laws, vocab_size = family.p.shape
  max_drafts = curves.acceptance['optimum'].shape[-1]
  return {
    'name': family.name,
    'title': family.title,
    'num_laws': num_laws,
    'vocab_size': vocab_size,
    'max_drafts': max_drafts,
    'rules': [_rule_results(rule, curves, seed) for rule in RULES],
    'findings': _findings(curves, max_drafts, seed),
  }


def _rule_results(rule, curves, seed):
  values = curves.acceptance[rule.name]
  error = curves.error.get(rule.name)
  if error is not None:
    error = (np.sqrt((error**2).sum(axis=0)) / len(error)).tolist()
  return {
    'name': rule.name,
    'drafts': rule.drafts,
    'is_optimum': rule.is_optimum,
    'acceptance': values.mean(axis=0).tolist(),
    'acceptance_ci': _intervals(values, seed).tolist(),
    'sampling_error': error,
  }


def _intervals(values, seed) -> Array:
  """f[K, 2], percentile bootstrap intervals of the mean over laws f[M, K]."""
  num_laws = len(values)
  counts = np.random.default_rng(seed).multinomial(
    num_laws, np.full(num_laws, 1 / num_laws), NUM_RESAMPLES
  )
  tail = (1 - CONFIDENCE) / 2
  return np.quantile(counts @ values / num_laws, [tail, 1 - tail], axis=0).T


def _findings(curves, max_drafts, seed):
  found = []
  if max_drafts > 1:
    found = [_gap_sentence(curves, drafts, seed) for drafts in (IID, DISTINCT)]
  return [*found, _chosen_sentence(curves, max_drafts)]


def _gap_sentence(curves, drafts, seed):
  """Names the number of drafts where the best rule, on average, falls shortest of the optimum."""
  acceptance = curves.acceptance
  rules = [r.name for r in RULES if r.drafts == drafts and not r.is_optimum | r.one_draft_only]
  optimum = acceptance[next(r.name for r in RULES if r.drafts == drafts and r.is_optimum)]
  means = np.stack([acceptance[name].mean(axis=0) for name in rules])
  k = int(np.argmax(optimum.mean(axis=0) - means.max(axis=0)))
  best = rules[int(means[:, k].argmax())]
  gap = (optimum - acceptance[best])[:, k : k + 1]
  low, high = _intervals(gap, seed)[0]
  return (
    f'Drafts {drafts}: the gap between the best rule and the optimum is widest at k = {k + 1}, '
    f'where {best} accepts {acceptance[best][:, k].mean():.3f} of {optimum[:, k].mean():.3f}: '
    f'{gap.mean():.4f} less ({low:.4f} to {high:.4f}).'
  )


def _chosen_sentence(curves, max_drafts):
  means = {name: values[:, -1].mean() for name, values in curves.acceptance.items()}
  return (
    f'Drafts chosen by probability: at k = {max_drafts} the top k accept {means["top k"]:.3f} and '
    f'greedy draft {means["greedy draft"]:.3f}, beside the optimum of {means["optimum"]:.3f} for '
    f'drafts with and {means["optimum, distinct"]:.3f} for drafts without replacement.'
  )


def _results(argv, args, families, seconds):
  """Returns what verification_gap.json holds."""
  has_text = any(family['name'] in _TEXT_FAMILIES for family in families)
  config = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in vars(args).items()
    if name not in ('out', 'num_drafts')
  }
  return {
    'schema': SCHEMA,
    'command': cli.command_line('experiments.verification_gap', argv),
    'config': {**config, 'model': args.model if has_text else None},
    'confidence': CONFIDENCE,
    'num_resamples': NUM_RESAMPLES,
    'seconds': seconds,
    'families': families,
  }


# --- Tables, files, plot -----------------------------------------------------------------------


def _table(family):
  heading = f'{family["title"]}: mean acceptance of {family["num_laws"]} laws, k drafts'
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=heading, title_justify='left')
  table.add_column('rule', no_wrap=True)
  table.add_column('drafts', no_wrap=True)
  for k in range(1, family['max_drafts'] + 1):
    table.add_column(f'k={k}', justify='right')
  for rule in family['rules']:
    table.add_row(*_cells(rule, family), style='bold' if rule['is_optimum'] else '')
  return table


def _cells(rule, family):
  values = [f'{value:.3f}' for value in rule['acceptance']]
  return [rule['name'], rule['drafts'], *values, *[''] * (family['max_drafts'] - len(values))]


def markdown(results: Mapping[str, Any]) -> str:
  """Returns the tables and the findings as Markdown."""
  lines = [f'`{results["command"]}`', '']
  for family in results['families']:
    counts = f'{family["num_laws"]} pairs of laws over {family["vocab_size"]:,} tokens.'
    lines += [f'### {family["title"]}', '', f'{counts} {_precision(family)}', '']
    columns = ['rule', 'drafts', *(f'k={k}' for k in range(1, family['max_drafts'] + 1))]
    lines += [_line(columns), _line(['---'] * 2 + ['---:'] * (len(columns) - 2))]
    for rule in family['rules']:
      mark = '**' if rule['is_optimum'] else ''
      lines.append(_line([f'{mark}{c}{mark}' if c else '' for c in _cells(rule, family)]))
    lines += ['', *(f'* {sentence}' for sentence in family['findings']), '']
  return '\n'.join(lines)


def _line(cells):
  return f'| {" | ".join(cells)} |'


def _precision(family):
  half = max((high - low) / 2 for rule in family['rules'] for low, high in rule['acceptance_ci'])
  errors = [e for rule in family['rules'] for e in rule['sampling_error'] or ()]
  return (
    f'95 % intervals over laws: ±{half:.3f} at most. Standard error of the sampled rules: '
    f'{max(errors):.4f} at most.'
  )


def _write(directory, results):
  files = {
    'verification_gap.json': files_lib.to_json(results),
    'verification_gap.md': markdown(results).encode(),
    'verification_gap.png': _png(plot(results)),
  }
  for name, data in files.items():
    files_lib.write_whole(directory / name, data)
  return list(files)


def plot(results: Mapping[str, Any]) -> Figure:
  """Returns the acceptance against the number of drafts, one panel per family."""
  families = results['families']
  columns = min(2, len(families))
  rows = -(-len(families) // columns)
  figure = Figure(figsize=(5 * columns, 3.4 * rows + 1), layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False).flat
  for axes, family in zip(panels, families, strict=False):
    _panel(axes, family)
  for axes in list(panels)[len(families) :]:
    axes.set_axis_off()
  first = figure.axes[0]
  figure.legend(
    *first.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False,
    fontsize=8,
  )  # fmt: skip
  return figure


def _panel(axes, family):
  numbers = range(1, family['max_drafts'] + 1)
  for rule, found in zip(RULES, family['rules'], strict=True):
    values = found['acceptance']
    style = {IID: '-', DISTINCT: '--', CHOSEN: ':'}[rule.drafts]
    axes.plot(
      numbers[: len(values)], values, style, color=rule.color, label=rule.name,
      marker='x' if rule.one_draft_only else 'o', markersize=5 if rule.one_draft_only else 2.5,
      linewidth=2 if rule.is_optimum else 1.2, zorder=3 if rule.is_optimum else 2,
    )  # fmt: skip
  axes.set_title(family['title'], fontsize=9, loc='left')
  axes.set_xticks(numbers)
  axes.set_xlabel('drafts k', fontsize=8)
  axes.set_ylabel('acceptance', fontsize=8)
  axes.tick_params(labelsize=8)
  axes.grid(color='#DDDDDD', linewidth=0.5)
  axes.spines[['top', 'right']].set_visible(False)


def _png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=100)
  return buffer.getvalue()


if __name__ == '__main__':
  sys.exit(main())

"""What remains of a comparison: tables for a person, files for programs, plots."""

from collections.abc import Mapping, Sequence
import io
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text

from experiments import files as files_lib
from experiments.methods import PLAIN

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLORS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#7F7F7F', '#F0E442')
_INK, _FAINT = '#222222', '#BBBBBB'
_GAIN, _LOSS, _ALARM = 'green', 'red', 'bold red'
_UNSET = '-'
_INTERVALS = 'In brackets: 95 % intervals over prompts. Numbers are defined in docs/experiments.md.'
_NO_INTERVALS = 'No intervals: they take two prompts, or two batches of them.'

Results = Mapping[str, Any]  # what results.json holds


# --- Tables ------------------------------------------------------------------------------------


def methods_table(results: Results, *, narrow: bool = False) -> Table:
  """Returns the table of methods; a narrow one fits 80 columns."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=narrow)
  table.add_column('method', style='bold', overflow='fold')
  table.add_column('exactness', min_width=len('exactness' if narrow else 'token-identical'))
  for heading in ('tokens/call', 'tokens/s', 'speed-up', 'identical to plain'):
    table.add_column(heading, justify='right', min_width=9 if 'plain' in heading else 11)
  for method in results['methods']:
    is_plain = method['name'] == PLAIN
    exactness = method['exactness'].replace('-identical', '' if narrow else '-identical')
    table.add_row(
      method['name'],
      'reference' if is_plain else exactness,
      _with_interval(method['tokens_per_call'], method['tokens_per_call_ci'], 2),
      _with_interval(method['tokens_per_second'], method['tokens_per_second_ci'], 1),
      Text('1.00') if is_plain else _speedup_text(method),
      _identity_text(method),
    )
  return table


def categories_table(results: Results) -> Table:
  """Returns the table of speed-up and tokens/call by category."""
  methods = [method for method in results['methods'] if method['name'] != PLAIN]
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('category', style='bold', no_wrap=True)
  table.add_column('prompts', justify='right')
  for method in methods:
    table.add_column(method['name'], justify='right')
  for category in _categories(results):
    rows = [method['categories'].get(category) for method in methods]
    counts = [method['categories'].get(category, {}) for method in results['methods']]
    num_prompts = max(count.get('num_prompts', 0) for count in counts)
    table.add_row(category, str(num_prompts), *map(_category_text, rows))
  table.add_section()
  table.add_row('all', str(_num_prompts(results)), *map(_category_text, methods))
  return table


def notes(results: Results) -> list[Text]:
  """Returns what a reader of the tables should know, one line each."""
  has_intervals = any(method['tokens_per_second_ci'] for method in results['methods'])
  return [
    Text(_INTERVALS if has_intervals else _NO_INTERVALS),
    Text(_time_note(results)),
    *(Text(alarm, _ALARM) for alarm in _alarms(results)),
  ]


def _time_note(results):
  stages = {'compiling': 'compile', 'reading prompts': 'prefill', 'decoding': 'decode'}
  seconds = {
    stage: sum(method[f'{name}_seconds'] for method in results['methods'])
    for stage, name in stages.items()
  }
  parts = ', '.join(f'{stage} {total:.1f} s' for stage, total in seconds.items())
  return f'Time of all methods together: {parts}.'


def _alarms(results):
  for method in results['methods']:
    if method['num_failed']:
      ids = ', '.join(map(str, method['failed_prompts']))
      yield (
        f'FAILED: {method["num_failed"]} of {method["num_runs"]} runs of {method["name"]} met '
        f'logits that are not finite; they count nowhere. Prompts: {ids}.'
      )
  if results['partial']:
    planned = results['config']['num_prompts'] * results['config']['repeats']
    made = ', '.join(f'{method["name"]} {method["num_runs"]}' for method in results['methods'])
    yield f'INTERRUPTED: of {planned} runs of each method these were made: {made}.'


def _with_interval(value, interval, digits):
  if value is None:
    return _UNSET
  text = f'{value:.{digits}f}'
  if interval is None or interval[0] == interval[1]:
    return text
  low, high = interval
  return Text.assemble(text, ' ', (f'({low:.{digits}f}–{high:.{digits}f})', 'dim'))


def _speedup_text(summary):
  text = _with_interval(summary['speedup'], summary['speedup_ci'], 2)
  interval = summary['speedup_ci']
  if isinstance(text, Text) and interval is not None:
    number = len(text.plain.split(' ')[0])
    text.stylize(_GAIN if interval[0] > 1 else _LOSS if interval[1] < 1 else '', 0, number)
  return text


def _category_text(summary):
  if not summary or summary['speedup'] is None:
    return _UNSET
  return f'{summary["speedup"]:.2f} × at {summary["tokens_per_call"]:.2f}'


def _identity_text(method):
  if not method['compared_to_plain']:
    return 'law' if method['exactness'] == 'law-identical' else _UNSET
  text = Text(f'{method["identical_to_plain"]}/{method["compared_to_plain"]}')
  if method['identical_to_plain'] < method['compared_to_plain']:
    text.stylize(_LOSS)
  return text


def _categories(results):
  found = (name for method in results['methods'] for name in method['categories'])
  return list(dict.fromkeys(found))


def _num_prompts(results):
  return max((method['num_prompts'] for method in results['methods']), default=0)


# --- Files -------------------------------------------------------------------------------------


def write_all(
  directory: pathlib.Path, results: Results, outputs: Sequence[Mapping[str, Any]]
) -> list[str]:
  """Writes results, outputs and plots; returns the names of the files.

  Each file is replaced as a whole, so that a reader never sees half of one.
  """
  files = {
    'results.json': files_lib.to_json(results),
    'outputs.jsonl': ''.join(
      json.dumps(output, ensure_ascii=False) + '\n' for output in outputs
    ).encode(),
  }
  for name, figure in (
    ('speedup_by_category.png', plot_speedup(results)),
    ('acceptance_by_depth.png', plot_acceptance(results)),
  ):
    if figure is not None:
      files[name] = _png(figure)
  for name, data in files.items():
    files_lib.write_whole(directory / name, data)
  return list(files)


# --- Plots -------------------------------------------------------------------------------------


def plot_speedup(results: Results) -> Figure | None:
  """Returns the speed-up of each method in each category; None if there is nothing to show."""
  methods = [m for m in results['methods'] if m['name'] != PLAIN and m['speedup'] is not None]
  categories = _categories(results)
  rows = ['all', *(categories if len(categories) > 1 else [])]
  if not methods:
    return None
  height = 0.8 / len(methods)
  figure = Figure(figsize=(8, 1.6 + 0.28 * len(rows) * (len(methods) + 0.6)), layout='constrained')
  axes = figure.add_subplot()
  for index, method in enumerate(methods):
    found = [method if row == 'all' else method['categories'].get(row) or {} for row in rows]
    ys = [y + (index - (len(methods) - 1) / 2) * height for y in range(len(rows))]
    _bars(axes, ys, found, height, _COLORS[index % len(_COLORS)], method['name'])
  axes.axvline(1, color=_INK, linewidth=1)
  axes.set_yticks(range(len(rows)), rows)
  axes.get_yticklabels()[0].set_fontweight('bold')
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlim(left=0)
  axes.margins(x=0.08)
  axes.set_xlabel('speed-up: tokens/s over plain decoding (right of the line is faster)')
  axes.grid(axis='x', color=_FAINT, linewidth=0.5)
  _finish(figure, axes, 'Speed-up by category', results, len(methods))
  return figure


def _bars(axes, ys, summaries, height, color, label):
  kept = [(y, s) for y, s in zip(ys, summaries, strict=True) if s.get('speedup') is not None]
  values = [s['speedup'] for _, s in kept]
  axes.barh([y for y, _ in kept], values, height * 0.9, color=color, label=label, zorder=2)
  for y, summary in kept:
    value, interval = summary['speedup'], summary['speedup_ci']
    end = value
    if interval is not None:
      axes.plot(interval, [y, y], color=_INK, linewidth=1, zorder=3)
      end = max(value, interval[1])
    axes.annotate(
      f'{value:.2f}', (end, y), xytext=(3, 0), textcoords='offset points',
      va='center', fontsize=7, color=_INK, zorder=4,
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
    )  # fmt: skip


def plot_acceptance(results: Results) -> Figure | None:
  """Returns conditional and unconditional acceptance by depth; None if nothing was drafted."""
  methods = [
    m for m in results['methods'] if any(a is not None for a in m['conditional_acceptance'])
  ]
  if not methods:
    return None
  figure = Figure(figsize=(8, 3.8), layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  titles = ('Conditional: all before it accepted', 'Unconditional: the path reached it')
  kinds = ('conditional_acceptance', 'unconditional_acceptance')
  for axes, title, kind in zip(panels, titles, kinds, strict=True):
    for index, method in enumerate(methods):
      points = [(d, a) for d, a in enumerate(method[kind], 1) if a is not None]
      color = _COLORS[index % len(_COLORS)]
      axes.plot(*zip(*points, strict=True), marker='o', color=color, label=method['name'])
    axes.set_title(title, fontsize=9, loc='left', color=_INK)
    axes.set_xlabel('depth of the draft')
    axes.set_ylim(0, 1.02)
    deepest = max(len(m[kind]) for m in methods)
    axes.set_xlim(0.7, max(deepest, 2) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_FAINT, linewidth=0.5)
  panels[0].set_ylabel('fraction accepted')
  _finish(figure, panels, 'Acceptance by depth', results, len(methods))
  return figure


def _finish(figure, axes, title, results, num_series):
  axes = [axes] if not hasattr(axes, '__iter__') else list(axes)
  for each in axes:
    each.spines[['top', 'right']].set_visible(False)
    each.set_axisbelow(True)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=min(num_series, 4), frameon=False, fontsize=9
  )
  config = results['config']
  state = ', interrupted' if results['partial'] else ''
  figure.suptitle(
    f'{title}: {results["model"]["name"]}, temperature {config["temperature"]:g}, '
    f'{_num_prompts(results)} prompts{state}',
    fontsize=11, x=0.01, ha='left', color=_INK,
  )  # fmt: skip


def _png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=150)
  return buffer.getvalue()

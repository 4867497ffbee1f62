"""What `experiments.drafters` leaves behind: tables, a plot, drafters.json, orders that hold."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from experiments import files

Results = Mapping[str, Any]

# (better, worse, by which number): what the literature leads one to expect.
_EXPECTED = (
  ('hydra', 'medusa', 'tokens_per_call'),
  ('hydra_pp', 'hydra', 'tokens_per_call'),
  ('eagle3', 'eagle', 'tokens_per_call'),
  ('distillspec', 'draft_lm', 'tokens_per_call'),
  ('acceptance', 'distillspec*', 'speedup'),  # the best fixed length
  *((head, 'ngram', 'tokens_per_call') for head in (
    'medusa', 'hydra', 'hydra_pp', 'eagle', 'eagle3', 'kangaroo', 'draft_lm', 'distillspec')),
)  # fmt: skip


def table(found: Results) -> Table:
  """Returns the table of one temperature."""
  out = Table(
    title=f'temperature {found["temperature"]:g}; {found["repeated"]:.0%} of the 4-grams of the '
    'text were there before',
    box=box.SIMPLE_HEAD, pad_edge=False, title_justify='left',
  )  # fmt: skip
  out.add_column('drafter', style='bold', no_wrap=True)
  for heading in ('parameters', 'tokens/call', 'draft share', 'speed-up', 'identical'):
    out.add_column(heading, justify='right', no_wrap=True)
  for row in found['methods']:
    out.add_row(*cells(row))
  return out


def cells(row: Results) -> list[str]:
  """Returns the cells of a method's row."""
  share, compared = row['draft_share'], row['compared_to_plain']
  return [
    row['name'],
    _count(row['num_parameters']),
    _interval(row['tokens_per_call'], row['tokens_per_call_ci']),
    '-' if share is None else f'{share:.0%}',
    _interval(row['speedup'], row['speedup_ci']),
    f'{row["identical_to_plain"]}/{compared}' if compared else 'law',
  ]


def _count(number):
  return f'{number / 1e6:.2f} M' if number >= 5000 else str(number or '-')


def _interval(value, interval):
  if value is None:
    return '-'
  return f'{value:.2f}' + (f' [{interval[0]:.2f}, {interval[1]:.2f}]' if interval else '')


def orders(results: Results) -> list[dict[str, Any]]:
  """Returns, for each temperature, which of the expected orders hold, with the two numbers."""
  found = []
  for each in results['temperatures']:
    rows = {row['name']: row for row in each['methods']}
    for better, worse, key in _EXPECTED:
      names = [n for n in rows if n == worse or (worse[-1] == '*' and _is_length(n, worse[:-1]))]
      if better not in rows or not names:
        continue
      name = max(names, key=lambda n, rows=rows, key=key: rows[n][key])
      above, below = rows[better], rows[name]
      found.append(
        {
          'temperature': each['temperature'],
          'better': better,
          'worse': name,
          'by': key,
          'values': [above[key], below[key]],
          'intervals': [above[f'{key}_ci'], below[f'{key}_ci']],
          'holds': above[key] > below[key],
        }
      )
  return found


def _is_length(name, head):
  """Is this the head at a fixed length: 'distillspec', 'distillspec 2'?"""
  return name == head or (name.startswith(f'{head} ') and name.split(' ')[-1].isdigit())


def order_lines(results: Results) -> list[str]:
  """Returns one line for each expected order."""
  lines = []
  for each in results['orders']:
    verdict = 'holds' if each['holds'] else 'DOES NOT HOLD'
    above, below = each['values']
    lines.append(
      f'T={each["temperature"]:g}: {each["better"]} above {each["worse"]} in '
      f'{each["by"].replace("_", " ")} ({above:.2f}, {below:.2f}): {verdict}'
    )
  return lines


def acceptance_lines(results: Results) -> list[str]:
  """Returns what the trees of prompt tokens were built for and were expected to reach."""
  rows = [row for row in results['temperatures'][0]['methods'] if row.get('acceptance')]
  tables = {row['head']: row['acceptance'] for row in rows}
  lines = [
    f'{head}, depth {depth}: accepted by rank {", ".join(f"{value:.3f}" for value in ranks)}'
    for head, table in tables.items()
    for depth, ranks in enumerate(table, 1)
  ]
  return lines + [
    f'{row["name"]}: {row["expected_tokens_per_call"]:.2f} tokens per call expected with these'
    for row in rows
  ]


def write(directory: pathlib.Path, results: Results) -> list[str]:
  """Writes drafters.json, tables.md and drafters.png; returns their names."""
  files.write_whole(directory / 'drafters.json', files.to_json(results))
  files.write_whole(directory / 'tables.md', markdown(results).encode())
  plot(results['temperatures']).savefig(directory / 'drafters.png', dpi=130)
  return ['drafters.json', 'tables.md', 'drafters.png']


def markdown(results: Results) -> str:
  """Returns the tables and the orders as Markdown."""
  parts = [f'    {results["command"]}\n']
  for found in results['temperatures']:
    parts.append(
      f'Temperature {found["temperature"]:g}; {found["repeated"]:.0%} of the 4-grams of the text '
      'were there before.\n'
    )
    parts.append('| drafter | parameters | tokens/call | draft share | speed-up | identical |')
    parts.append('|---|---:|---:|---:|---:|---:|')
    parts += [f'| {" | ".join(cells(row))} |' for row in found['methods']]
    parts.append('')
  parts += [f'* {line}' for line in (*order_lines(results), *acceptance_lines(results))]
  return '\n'.join(parts) + '\n'


def plot(temperatures: Sequence[Results]) -> Figure:
  """Returns tokens/call and speed-up of every method, with intervals."""
  names = [row['name'] for row in temperatures[0]['methods'] if row['name'] != 'plain']
  figure = Figure(figsize=(10, 0.3 * len(names) + 1.5), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  colors, height = ('#0072B2', '#E69F00', '#009E73'), 0.8 / len(temperatures)
  for index, found in enumerate(temperatures):
    rows = {row['name']: row for row in found['methods']}
    places = [i + (index - (len(temperatures) - 1) / 2) * height for i in range(len(names))]
    for ax, key in zip(axes, ('tokens_per_call', 'speedup'), strict=True):
      values = [rows[name][key] for name in names]
      spans = [rows[name][f'{key}_ci'] or [v, v] for name, v in zip(names, values, strict=True)]
      errors = [
        [max(v - low, 0) for v, (low, _) in zip(values, spans, strict=True)],
        [max(high - v, 0) for v, (_, high) in zip(values, spans, strict=True)],
      ]
      label = f'temperature {found["temperature"]:g}'
      ax.barh(places, values, height, xerr=errors, color=colors[index % 3], label=label)
  axes[0].set_yticks(range(len(names)), names)
  axes[0].invert_yaxis()
  axes[0].set_xlabel('tokens/call')
  axes[1].set_xlabel('speed-up over plain decoding')
  for ax in axes:
    ax.axvline(1, color='#222222', linewidth=0.8)
  axes[1].legend(frameon=False)
  return figure

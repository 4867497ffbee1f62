"""What a run shows and keeps of itself: a live table, TensorBoard, metrics.jsonl, PNG curves.

Only process 0 shows and writes anything.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import time
from typing import Any, TextIO

import matplotlib
from rich.console import Console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn
from rich.table import Table

from train.losses import tokens_per_call
from train.rollout import Measured

matplotlib.use('Agg')


class Reporter:
  """Takes the numbers of a run as they come."""

  def __init__(
    self, directory: pathlib.Path, title: str, num_steps: int, start: int, *, show: bool = True
  ):
    from tensorboardX import SummaryWriter

    self._console = Console(stderr=False)
    self._directory, self._num_steps = directory, num_steps
    self._progress = Progress(
      TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
      console=self._console,
    )  # fmt: skip
    self._task = self._progress.add_task(title, total=num_steps, completed=start)
    self._rows: dict[str, str] = {}
    self._live = Live(console=self._console, refresh_per_second=4, transient=False)
    self._plain = not (show and self._console.is_terminal)
    self._show = show
    _forget_later(directory / 'metrics.jsonl', start)
    self._file: TextIO = open(directory / 'metrics.jsonl', 'a', encoding='utf-8')
    self._board = SummaryWriter(str(directory / 'tensorboard'), purge_step=start)
    self._last: tuple[float, int] | None = None

  def __enter__(self) -> 'Reporter':
    if not self._plain:
      self._live.start()
    return self

  def __exit__(self, *_: object) -> None:
    if not self._plain:
      self._live.stop()
    self._file.close()
    self._board.close()

  def stage(self, text: str) -> None:
    """Says what is being done."""
    if self._show:
      self._console.print(text, markup=False, soft_wrap=True)

  def step(self, step: int, numbers: Mapping[str, float], num_tokens: int) -> None:
    """Takes the numbers of step `step` (done so far) and how many tokens were read up to it."""
    numbers = dict(numbers)
    now = time.monotonic()
    if self._last is not None and num_tokens > self._last[1]:
      numbers['tokens_per_second'] = (num_tokens - self._last[1]) / (now - self._last[0])
    self._last = now, num_tokens
    simulated = tokens_per_call(numbers)
    if simulated is not None:
      numbers['simulated_tokens_per_call'] = simulated
    self._record(step, numbers)
    self._rows |= _shown(numbers)
    self._progress.update(self._task, completed=step)
    self._refresh(f'step {step}/{self._num_steps}')

  def measured(self, step: int, found: Sequence[Measured]) -> None:
    """Takes what real decoding reached."""
    numbers = {}
    for each in found:
      numbers[f'tokens_per_call/T={each.temperature:g}'] = each.tokens_per_call
      for depth, value in enumerate(each.conditional, 1):
        numbers[f'accepted/T={each.temperature:g}/{depth}'] = value
    self._last = None  # decoding does not count as training time
    self._record(step, numbers)
    self._rows |= {f'real {k}': f'{v:.3f}' for k, v in numbers.items() if 'tokens' in k}
    self._refresh(f'step {step}: decoded')

  def _record(self, step, numbers):
    line = {'step': step, **{key: float(value) for key, value in numbers.items()}}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    for key, value in numbers.items():
      self._board.add_scalar(key, float(value), step)

  def _refresh(self, heading):
    if not self._show:
      return
    if self._plain:
      text = ', '.join(f'{key} {value}' for key, value in self._rows.items())
      self._console.print(f'{heading}: {text}', markup=False, soft_wrap=True)
      return
    table = Table.grid(padding=(0, 2))
    for key, value in self._rows.items():
      table.add_row(key, value)
    self._live.update(Group(self._progress, table))


def _shown(numbers):
  """Returns what a person wants to see, as text; accuracies of all depths on one line."""
  rows = {}
  names = ('loss', 'token_accuracy', 'simulated_tokens_per_call', 'tokens_per_second')
  for name in names:
    if name in numbers:
      value = numbers[name]
      rows[name.replace('_', ' ')] = f'{value:.0f}' if value >= 100 else f'{value:.3f}'
  depths = [f'{v:.3f}' for k, v in numbers.items() if k.startswith('accuracy/')]
  if depths:
    rows['accuracy by depth'] = ' '.join(depths)
  return rows


def _forget_later(path, start):
  """Drops the lines that a resumed run is going to write again."""
  if not path.exists():
    return
  kept = [
    line for line in path.read_text(encoding='utf-8').splitlines() if _step_of(line, start) <= start
  ]
  path.write_text(''.join(f'{line}\n' for line in kept), encoding='utf-8')


def _step_of(line, start):
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):
    return start + 1  # cut short when the run was killed


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl."""
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def draw_curves(directory: pathlib.Path) -> list[str]:
  """Draws the curves in a run's metrics.jsonl, and returns the names of the files written."""
  import matplotlib.pyplot as plt

  lines = read_metrics(directory / 'metrics.jsonl')
  figures = {
    'loss.png': ('loss', lambda key: key == 'loss'),
    'accuracy.png': (
      'accuracy',
      lambda key: key.startswith('accuracy/') or key == 'token_accuracy',
    ),
    'tokens_per_call.png': ('tokens/call', lambda key: 'tokens_per_call' in key),
  }
  written = []
  for name, (label, wanted) in figures.items():
    keys = sorted({key for line in lines for key in line if wanted(key)})
    if not keys:
      continue
    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    for key in keys:
      points = [(line['step'], line[key]) for line in lines if key in line]
      axes.plot(*zip(*points, strict=True), label=key.replace('_', ' '))
    axes.set_xlabel('step')
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.savefig(directory / name, dpi=120)
    plt.close(figure)
    written.append(name)
  return written

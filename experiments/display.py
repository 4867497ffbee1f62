"""What a person sees while an experiment runs: live on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
import os
import time

from rich.console import Console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.spinner import Spinner
from rich.text import Text

_PLAIN_WIDTH = 132  # where there is no terminal to ask
_LINES = 6  # progress lines per method where there is no terminal


def make_console() -> Console:
  """Returns a console on stdout: as wide as the terminal, or wide enough for every table."""
  console = Console(highlight=False)
  if console.is_terminal or 'COLUMNS' in os.environ:
    return console
  return Console(highlight=False, width=_PLAIN_WIDTH)


class Display:
  """Shows stages, then the progress of each method. A context manager."""

  def __init__(self, console: Console):
    self.console = console
    self._alive = console.is_terminal and not console.is_dumb_terminal
    self._spinner = Spinner('dots')
    self._progress = Progress(
      TextColumn('{task.description}'),
      BarColumn(bar_width=None),
      MofNCompleteColumn(),
      TextColumn('[bold]{task.fields[speed]}[/]'),
      TextColumn('{task.fields[per_call]}'),
      console=console,
      expand=True,
    )
    self._live = Live(console=console, refresh_per_second=8, transient=True)
    self._tasks = {}
    self._total = 0
    self._start = time.monotonic()

  def __enter__(self) -> 'Display':
    if self._alive:
      self._live.start()
    return self

  def __exit__(self, *exc) -> None:
    if self._alive:
      self._live.stop()

  def stage(self, text: str) -> None:
    """Shows what is being done now."""
    if self._alive:
      self._spinner.update(text=Text(f' {text}', style='dim'))
      self._refresh()
    else:
      self._line(f'{text} ...')

  def done(self, label: str, text: str) -> None:
    """Leaves a line about a stage that is over."""
    if self._alive:
      self.console.print(Text.assemble((f'{label:<9}', 'cyan'), text))
    else:
      self._line(f'{label}: {text}')

  def begin(self, names: Sequence[str], total: int) -> None:
    """Starts the progress of these methods, `total` runs each."""
    width = max(map(len, names))
    self._tasks = {
      name: self._progress.add_task(f'{name:<{width}}', total=total, speed='', per_call='')
      for name in names
    }
    self._total, self._start = total, time.monotonic()
    self.stage(f'decoding with {len(names)} methods in turn')

  def advance(self, name: str, num_done: int, speed: float, per_call: float) -> None:
    """Shows how far a method is: runs done, tokens per second and per call until now."""
    speed_text, call_text = f'{speed:.1f} tokens/s', f'{per_call:.2f} tokens/call'
    task = self._tasks[name]
    before = int(self._progress.tasks[task].completed)
    self._progress.update(task, completed=num_done, speed=speed_text, per_call=call_text)
    if self._alive:
      self._spinner.update(text=Text(f' {self._remaining()}', style='dim'))
      self._refresh()
    elif num_done * _LINES // self._total > before * _LINES // self._total:
      self._line(f'{name}: {num_done}/{self._total} runs, {speed_text}, {call_text}')

  def _remaining(self):
    passed = time.monotonic() - self._start
    tasks = self._progress.tasks
    fraction = sum(task.completed for task in tasks) / (self._total * len(tasks))
    left = passed / fraction - passed if fraction else 0
    return f'{passed:.0f} s passed, about {left:.0f} s left; Ctrl-C keeps what is measured'

  def _refresh(self):
    parts = [self._progress, self._spinner] if self._tasks else [self._spinner]
    self._live.update(Group(*parts), refresh=True)

  def _line(self, text):
    print(text, file=self.console.file, flush=True)

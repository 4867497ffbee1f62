"""What small commands share: how they end, and the options of those that write training data."""

import argparse
from collections.abc import Callable
import pathlib
import sys

USAGE_EXIT = 2


def exit_code(name: str, work: Callable[[], object]) -> int:
  """Returns 0, or 2 after a line that says what the user can mend.

  Args:
    name: of the command, which the line begins with.
    work: what the command does; a ValueError or an OSError of it is the user's.
  """
  try:
    work()
  except (ValueError, OSError) as error:
    print(f'{name}: {" ".join(str(error).split())}', file=sys.stderr)
    return USAGE_EXIT
  return 0


def writer_parser(name: str, description: str, *, batch_size: int) -> argparse.ArgumentParser:
  """Returns a parser with the options of every command that has a target write data.

  Args:
    name: of the command in `train`.
    description: of the command.
    batch_size: the default of --batch-size.
  """
  parser = argparse.ArgumentParser(prog=f'python -m train.{name}', description=description)
  parser.add_argument('--model', required=True, metavar='NAME|DIR|FILE.gguf', help='the target')
  parser.add_argument('--out', required=True, type=pathlib.Path, metavar='FILE.jsonl')
  parser.add_argument('--batch-size', type=int, default=batch_size, metavar='B')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--quiet', action='store_true', help='show nothing')
  return parser

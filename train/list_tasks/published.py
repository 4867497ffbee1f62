"""The published waiting-line tasks of ParallelBench, put into the words of the list tasks.

A file has a row for each example, as the benchmark's own tool writes them: `input` with the line
of people as a JSON list (`context`), perhaps a `word` and a position `index`; `answer`, the list
wanted or an `example` of it; `metadata`, with the position counted from 0. Columns may be JSON in
strings, as on the Hugging Face Hub. Names of people become items in alphabetical order, so that
sorting stays sorting. The file or its folder names the task: `waiting_line/copy.jsonl`.

Source: ParallelBench, arXiv:2510.04767, github.com/furiosa-ai/ParallelBench.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from train.list_tasks import CANVAS
from train.list_tasks import ITEMS
from train.list_tasks import TASKS
from train.list_tasks import Example
from train.list_tasks import is_right


def read_published(path: pathlib.Path) -> list[Example]:
  """Returns the examples of one file of JSON lines.

  Raises:
    ValueError: if the file is of no list task, or a row is not as published, is too long for the
      canvas, or its answer is wrong.
    OSError: if it cannot be read.
  """
  task = _task_of(path)
  examples = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    if line.strip():
      try:
        examples.append(_example(task, json.loads(line)))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}, line {number}: {type(error).__name__}: {error}') from error
  if not examples:
    raise ValueError(f'{path} has no examples')
  return examples


def _task_of(path):
  for name in (path.stem, path.parent.name):
    for task in sorted(TASKS, key=len, reverse=True):
      if name == task or name.endswith((f'-{task}', f'_{task}')):
        return task
  raise ValueError(
    f'{path} is named after no list task: the file or its folder must end in one of '
    f'{", ".join(TASKS)}. Text writing and puzzles are not list tasks.'
  )


def _example(task, row: Mapping[str, Any]) -> Example:
  given, answer = _decoded(row['input']), _decoded(row['answer'])
  metadata = _decoded(row.get('metadata') or {})
  people = _decoded(given['context'])
  word = given.get('word')
  wanted = _decoded(answer['example']) if isinstance(answer, Mapping) else answer
  if max(len(people), len(wanted)) >= CANVAS:
    raise ValueError(f'a line of {len(people)} does not fit the canvas of {CANVAS} slots')
  names = sorted({*people, *([] if word is None else [word])})
  if len(names) != len(people) + (word is not None):
    raise ValueError('names must be distinct')
  item_of = dict(zip(names, ITEMS, strict=False))
  example = Example(
    task,
    tuple(item_of[name] for name in people),
    metadata['index'] if task.endswith('index') else None,
    None if word is None else item_of[word],
    tuple(item_of[name] for name in wanted),
  )
  if not is_right(example, example.answer):
    raise ValueError(f'the answer {wanted} is not one to {task} of {people}')
  return example


def _decoded(value):
  """Returns a value that may have been written as JSON in a string."""
  return json.loads(value) if isinstance(value, str) else value

"""Small tasks on lists: what parallel decoding costs where tokens depend on each other.

A line of people waits; the task says what to do with it. Some answers are fixed by the question
(copy, reverse, sort, edits at an index): their tokens are independent given it, and all of them can
be written at once. Others are chosen (shuffle, edits at a random place): their tokens depend on
each other, and writing them at once is a mistake that no network can mend.

An example is a row of tokens: the question, and a canvas of `CANVAS` slots with the answer, filled
up with the end of text.

Source: the waiting-line tasks of ParallelBench, arXiv:2510.04767, on a vocabulary of single tokens.
"""

from collections.abc import Callable, Iterator, Sequence
import pathlib
from typing import NamedTuple

import numpy as np

END = '<|endoftext|>'
ITEMS = tuple('abcdefghijklmnop')
TASKS = (
  'copy', 'reverse', 'sort', 'shuffle', 'insert_index', 'remove_index', 'replace_index',
  'insert_random', 'remove_random', 'replace_random',
)  # fmt: skip
INDEPENDENT = ('copy', 'reverse', 'sort', 'insert_index', 'remove_index', 'replace_index')
"""Tasks whose answers the question fixes."""
VOCABULARY = (END, '=', ':', *TASKS, *'0123456', *ITEMS)
CANVAS = 8
SHORTEST, LONGEST = 3, 6
LONGEST_PROMPT = LONGEST + 5  # a task, an index, an item, ':' and '='
TOKENIZER = pathlib.Path(__file__).parent  # a folder with tokenizer.json
NUM_DOCUMENTS = 100_000

_IDS = {word: index for index, word in enumerate(VOCABULARY)}
EOS_ID = _IDS[END]


class Example(NamedTuple):
  """A task and one right answer to it."""

  task: str
  line: tuple[str, ...]  # who waits
  index: int | None  # where, for edits at an index
  item: str | None  # what is inserted or put in place
  answer: tuple[str, ...]

  @property
  def prompt(self) -> tuple[str, ...]:
    """The question as words."""
    options = () if self.index is None else (str(self.index),)
    options += () if self.item is None else (self.item,)
    return (self.task, *options, ':', *self.line, '=')


def make_example(task: str, rng: np.random.Generator, length: int | None = None) -> Example:
  """Returns a random example.

  Args:
    task: one of `TASKS`.
    rng: random numbers.
    length: of the line; None draws one.

  Raises:
    ValueError: if there is no such task.
  """
  if task not in TASKS:
    raise ValueError(f'task must be one of {", ".join(TASKS)}: {task!r}')
  length = int(rng.integers(SHORTEST, LONGEST + 1)) if length is None else length
  *line, item = (ITEMS[i] for i in rng.permutation(len(ITEMS))[: length + 1])
  line = tuple(line)
  places = length + task.startswith('insert')
  index = int(rng.integers(places))
  while True:
    answer = _EDITS[task](line, index, item, rng)
    if task != 'shuffle' or answer != line:
      break
  edits = task.startswith(('insert', 'remove', 'replace'))
  return Example(
    task,
    line,
    index if task.endswith('index') else None,
    item if edits and not task.startswith('remove') else None,
    answer,
  )


def is_right(example: Example, answer: Sequence[str]) -> bool:
  """Returns whether an answer is right: any that the task allows, where it leaves a choice."""
  answer, line = tuple(answer), example.line
  if example.task == 'shuffle':
    return sorted(answer) == sorted(line) and answer != line
  if example.task.endswith('random'):
    return answer in possible_answers(example)
  return answer == fixed_answer(example)


def fixed_answer(example: Example) -> tuple[str, ...]:
  """Returns the one right answer of a task whose answer the question fixes."""
  return _EDITS[example.task](example.line, example.index, example.item, None)


def possible_answers(example: Example) -> list[tuple[str, ...]]:
  """Returns every right answer of a task that edits at a random place, each equally likely."""
  places = len(example.line) + example.task.startswith('insert')
  edit = _EDITS[example.task]
  return [edit(example.line, index, example.item, None) for index in range(places)]


def to_ids(words: Sequence[str]) -> list[int]:
  """Returns the ids of words."""
  return [_IDS[word] for word in words]


def to_words(ids: Sequence[int]) -> tuple[str, ...]:
  """Returns the words of ids up to the end of text; ids outside the vocabulary are '?'."""
  words = [VOCABULARY[i] if 0 <= i < len(VOCABULARY) else '?' for i in ids]
  return tuple(words[: words.index(END)] if END in words else words)


def canvas_of(example: Example) -> list[int]:
  """Returns the ids of the answer, filled up with the end of text."""
  ids = to_ids(example.answer)
  return ids + [EOS_ID] * (CANVAS - len(ids))


def examples(num: int, seed: int, tasks: Sequence[str] = TASKS) -> Iterator[Example]:
  """Yields `num` examples, the tasks in turn."""
  rng = np.random.default_rng(seed)
  for index in range(num):
    yield make_example(tasks[index % len(tasks)], rng)


def _insert(line, index, item, rng):
  del rng
  return (*line[:index], item, *line[index:])


def _remove(line, index, item, rng):
  del item, rng
  return line[:index] + line[index + 1 :]


def _replace(line, index, item, rng):
  del rng
  return (*line[:index], item, *line[index + 1 :])


_EDITS: dict[str, Callable] = {
  'copy': lambda line, index, item, rng: line,
  'reverse': lambda line, index, item, rng: line[::-1],
  'sort': lambda line, index, item, rng: tuple(sorted(line)),
  'shuffle': lambda line, index, item, rng: tuple(line[i] for i in rng.permutation(len(line))),
  'insert_index': _insert,
  'insert_random': _insert,
  'remove_index': _remove,
  'remove_random': _remove,
  'replace_index': _replace,
  'replace_random': _replace,
}

"""Makes users' turns of texts, for training data: an instruction and a passage that it is about.

  python -m train.instruct --data stdlib pydoc --num 800 --out about.jsonl
  python -m train.regenerate --model smollm2-135m-instruct --data about.jsonl --out own.jsonl

What a model invents itself (`train.invent`) are chats more than anything. Here it is asked to work
on a given text: to finish, explain or change code, to summarise, translate, correct or search
prose, to bring it into a form. Code comes from files of Python, prose from their docstrings and
other texts. A line of the result is a conversation with one turn, which `train.regenerate` answers.
"""

import argparse
import ast
from collections.abc import Iterable, Iterator, Sequence
import copy
import inspect
import json
import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np

from train.command import exit_code
from train.sources import Document
from train.sources import read_sources

LANGUAGES = ('French', 'German', 'Spanish', 'Italian', 'Portuguese', 'Dutch')
CODE_LINES = (4, 30)  # of a function that is asked about
PROSE_WORDS = (25, 130)  # of a passage
SIGNATURE_WORDS = (5, 130)  # of what a function is said to do
SENTENCE_WORDS = (7, 30)  # of what is to be translated

INSTRUCTIONS = {
  'function': (
    'Explain step by step what this function does.\n\n```python\n{text}\n```',
    'Add type hints to this function and return the changed code.\n\n```python\n{text}\n```',
    'Rename the variables of this function so that they say more. Return only the code.'
    '\n\n```python\n{text}\n```',
    'Find a bug or a weakness in the code below and fix it.\n\n```python\n{text}\n```',
    'Write unit tests for this function:\n\n```python\n{text}\n```',
    'Rewrite this function so that it is easier to read, and say what you changed.'
    '\n\n```python\n{text}\n```',
  ),
  'signature': (
    'Complete this function.\n\n```python\n{text}\n```',
    '{text}',
    'Write the Python function that is described here:\n\n{text}',
    'Implement the following function and show how it is called.\n\n```python\n{text}\n```',
  ),
  'passage': (
    'Summarise this text in two or three sentences.\n\n{text}',
    'Write a one-sentence summary.\n\n{text}',
    'List the key points of the passage below.\n\n{text}',
    'What is the following text about, and what does it say? Quote the most important sentence.'
    '\n\n{text}',
    'Rewrite the following text in plain words.\n\n{text}',
    'Correct mistakes in this text and return it, changing nothing else.\n\n{text}',
    'Give me a JSON object with the keys "title", "summary" and "keywords" for this text. '
    'Return only the JSON.\n\n{text}',
    'Make a Markdown table of the terms in this text and what they mean.\n\n{text}',
    'Passage: {text}\n\nWrite three questions that the passage answers, and the answers.',
  ),
  'sentence': (
    'Translate into {language}: "{text}"',
    'How do you say this in {language}?\n\n{text}',
    'Translate the following sentence to {language}.\n\n{text}',
    'Say this in three other ways: {text}',
  ),
}  # fmt: skip


class Passages(NamedTuple):
  """What can be asked about, by the kinds of INSTRUCTIONS."""

  function: list[str]
  signature: list[str]  # with its docstring, but no body
  passage: list[str]
  sentence: list[str]


def find_passages(documents: Iterable[Document]) -> Passages:
  """Returns what the documents hold that can be asked about; conversations hold nothing.

  Args:
    documents: texts; one whose place ends in `.py` and that parses is code.
  """
  found = Passages([], [], [], [])
  for document in documents:
    if document.text is None:
      continue
    tree = _parse(document)
    prose = [document.text]
    if tree is not None:
      prose = _docstrings(tree)
      for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
          found.function.extend(_function(node))
          found.signature.extend(_signature(node))
    for passage in filter(_is_passage, _paragraphs(prose)):
      found.passage.append(passage)
      found.sentence.extend(filter(_is_sentence, re.split(r'(?<=[.?!]) ', passage)[:1]))
  return Passages(*(list(dict.fromkeys(kind)) for kind in found))


def instruct(passages: Passages, num: int, seed: int = 0) -> Iterator[dict]:
  """Yields `num` conversations of one turn, the kinds in turn, no passage twice in a kind.

  Raises:
    ValueError: if there are fewer passages of a kind than are wanted of it.
  """
  rng = np.random.default_rng(seed)
  kinds = list(passages._asdict().items())
  orders = [rng.permutation(len(texts)) for _, texts in kinds]
  fewest = min(zip(map(len, orders), passages._fields, strict=True))
  if num > fewest[0] * len(kinds):
    raise ValueError(
      f'{num} turns need {-(-num // len(kinds))} passages of each kind, but there are '
      f'{fewest[0]} of the kind {fewest[1]!r}; ask for fewer or give more texts'
    )
  for number in range(num):
    turn, which = divmod(number, len(kinds))
    kind, texts = kinds[which]
    form = INSTRUCTIONS[kind][rng.integers(len(INSTRUCTIONS[kind]))]
    language = LANGUAGES[rng.integers(len(LANGUAGES))]
    content = form.format(text=texts[orders[which][turn]], language=language)
    yield {'id': number, 'messages': [{'role': 'user', 'content': content}]}


def _parse(document):
  if not document.where.split(':')[0].endswith('.py'):
    return None
  try:
    return ast.parse(document.text)
  except (SyntaxError, ValueError):
    return None


def _docstrings(tree):
  owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
  texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
  return [text for text in texts if text]


def _function(node) -> list[str]:
  bare = copy.copy(node)
  if ast.get_docstring(node):
    bare.body = node.body[1:] or [ast.Pass()]
  text = ast.unparse(bare)
  return [text] if CODE_LINES[0] <= text.count('\n') + 1 <= CODE_LINES[1] else []


def _signature(node) -> list[str]:
  said = ast.get_docstring(node)
  if not said or not SIGNATURE_WORDS[0] <= len(said.split()) <= SIGNATURE_WORDS[1]:
    return []
  bare = copy.copy(node)
  bare.body, bare.decorator_list = [ast.Pass()], []
  head = ast.unparse(bare).rpartition('\n')[0]
  indented = said.replace('\n', '\n    ')
  return [f'{head}\n    """{indented}"""']


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for paragraph in re.split(r'\n\s*\n', text):
      yield ' '.join(inspect.cleandoc(paragraph).split())


def _is_passage(text: str) -> bool:
  """Whether it reads like prose: sentences of words, few signs."""
  words = PROSE_WORDS[0] <= len(text.split()) <= PROSE_WORDS[1]
  return words and text[0].isupper() and text[-1] in '.!?' and _lettered(text) > 0.9


def _is_sentence(text: str) -> bool:
  words = SENTENCE_WORDS[0] <= len(text.split()) <= SENTENCE_WORDS[1]
  return words and text[-1] in '.!?' and _lettered(text) > 0.95


def _lettered(text: str) -> float:
  return sum(each.isalpha() or each in " ,.'" for each in text) / len(text)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('instruct', lambda: _write(args))


def _write(args):
  if args.num < 1:
    raise ValueError(f'--num must be at least 1, got {args.num}')
  records = list(instruct(find_passages(read_sources(args.data)), args.num, args.seed))
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(''.join(json.dumps(each) + '\n' for each in records), encoding='utf-8')


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m train.instruct', description="Make users' turns that are about given texts."
  )
  parser.add_argument(
    '--data', nargs='+', default=['stdlib', 'pydoc'], metavar='FILE|DIR|NAME', help='the texts'
  )
  parser.add_argument('--num', type=int, default=1000, help='how many turns')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', required=True, type=pathlib.Path, metavar='FILE.jsonl')
  return parser


if __name__ == '__main__':
  sys.exit(main())

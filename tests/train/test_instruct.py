"""Users' turns are made of code and prose, each passage once, the same ones every time."""

import ast
import json

import pytest

from train import instruct
from train.sources import Document
from train.sources import read_sources

_PROSE = (
  'The reader asks the library for a book, and the library answers with the shelf where it stands, '
  'the days for which it may be kept, and the name of whoever has it now. A second reader waits.'
)
_CODE = f'''
"""{_PROSE}"""

import os


class Shelf:
  @property
  def books(self):
    """Returns the names of all books that stand on the shelf."""
    found = []
    for name in os.listdir(self.path):
      found.append(name)
    return found

  def empty(self):
    pass
'''


@pytest.fixture
def passages():
  return instruct.find_passages([Document('library.py', text=_CODE)])


def test_code_is_found_with_and_without_its_body(passages):
  (function,), (signature,) = passages.function, passages.signature
  assert function.startswith('@property\ndef books(self):\n    found = []')
  assert 'Returns the names' not in function
  assert signature == (
    'def books(self):\n    """Returns the names of all books that stand on the shelf."""'
  )
  ast.parse(function)
  ast.parse(signature)


def test_prose_is_found_in_docstrings_and_in_texts(passages):
  assert passages.passage == [_PROSE] and passages.sentence == []  # the first one is too long
  found = instruct.find_passages(
    [Document('notes.txt', text=f'Heading\n\n  {_PROSE}\n\nx = [1, 2, 3]\n\n{_PROSE}')]
  )
  assert found.passage == [_PROSE] and found.function == []


def test_what_is_no_python_is_prose_and_conversations_hold_nothing():
  found = instruct.find_passages(
    [
      Document('broken.py', text=f'def (:\n\n{_PROSE}'),
      Document('chat.jsonl:1', messages=({'role': 'user', 'content': _PROSE},)),
    ]
  )
  assert found.passage == [_PROSE]


def test_kinds_come_in_turn_and_no_passage_twice():
  texts = [f'{kind} {number}' for kind in 'abcd' for number in range(5)]
  passages = instruct.Passages(*(texts[i : i + 5] for i in range(0, 20, 5)))
  turns = [record['messages'][0]['content'] for record in instruct.instruct(passages, 20, seed=3)]
  for number, turn in enumerate(turns):
    assert f'{"abcd"[number % 4]} ' in turn
  assert sum(text in turn for turn in turns for text in texts) == 20
  assert turns == [r['messages'][0]['content'] for r in instruct.instruct(passages, 20, seed=3)]
  assert turns != [r['messages'][0]['content'] for r in instruct.instruct(passages, 20, seed=4)]


def test_every_instruction_holds_its_passage():
  for forms in instruct.INSTRUCTIONS.values():
    for form in forms:
      assert 'PASSAGE {x}' in form.format(text='PASSAGE {x}', language='French')


def test_the_command_writes_what_can_be_answered(tmp_path):
  out = tmp_path / 'new' / 'about.jsonl'
  assert instruct.main(['--data', 'pydoc', 'stdlib', '--num', '8', '--out', str(out)]) == 0
  documents = list(read_sources([str(out)]))
  assert len(documents) == 8
  assert [json.loads(line)['id'] for line in out.read_text().splitlines()] == list(range(8))


@pytest.mark.parametrize(
  'options, message',
  [
    (['--num', '0'], '--num must be at least 1, got 0'),
    (['--num', '5'], "there are 0 of the kind 'function'"),
    (['--data', 'nowhere.txt'], 'nowhere.txt'),
  ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, message):
  notes = tmp_path / 'notes.txt'
  notes.write_text(_PROSE)
  out = tmp_path / 'o.jsonl'
  assert instruct.main(['--data', str(notes), '--out', str(out), *options]) == 2
  error = capsys.readouterr().err
  assert error.startswith('instruct: ') and message in error and error.count('\n') == 1
  assert not out.exists()

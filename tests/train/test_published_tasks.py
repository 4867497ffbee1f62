"""Published waiting-line tasks become examples of list tasks, and what does not fit is named."""

import json

import pytest

from train.list_tasks.published import read_published

_LINE = ['Cora Wu', 'Abel Ito', 'Dina Roy']


def _row(answer, *, word=None, index=None, as_strings=False):
  given = {'context': json.dumps(_LINE)}
  given |= {} if word is None else {'word': word}
  row = {'input': given, 'answer': answer, 'metadata': {'length': 3, 'index': index}}
  return (
    {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} if as_strings else row
  )


def _write(folder, name, *rows):
  path = folder / name
  path.parent.mkdir(exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return path


@pytest.mark.parametrize('as_strings', [False, True])
@pytest.mark.parametrize(
  ('name', 'answer', 'word', 'index', 'wanted'),
  [
    ('copy.jsonl', _LINE, None, None, 'bac'),
    ('waiting_line_sort.jsonl', sorted(_LINE), None, None, 'abc'),
    ('waiting_line-reverse/test.jsonl', _LINE[::-1], None, None, 'cab'),
    ('insert_index.jsonl', [*_LINE[:2], 'Bela Nagy', 'Dina Roy'], 'Bela Nagy', 2, 'cabd'),
    ('remove_index.jsonl', _LINE[1:], None, 0, 'ac'),
  ],
)
def test_a_fixed_answer(tmp_path, name, answer, word, index, wanted, as_strings):
  row = _row(json.dumps(answer), word=word, index=index, as_strings=as_strings)
  (example,) = read_published(_write(tmp_path, name, row))
  assert ''.join(example.answer) == wanted
  assert example.index == index and (example.item is None) == (word is None)
  assert len(example.line) == 3


def test_a_chosen_answer(tmp_path):
  answer = {'input': _LINE, 'word': 'Zoe Ek', 'example': json.dumps(['Zoe Ek', *_LINE[1:]])}
  path = _write(tmp_path, 'replace_random.jsonl', _row(answer, word='Zoe Ek', index=None))
  (example,) = read_published(path)
  assert example.item == 'd' and example.index is None
  assert example.answer == ('d', 'a', 'c')


def test_what_does_not_fit_is_named(tmp_path):
  with pytest.raises(
    ValueError, match='named after no list task.*copy.*puzzles are not list tasks'
  ):
    read_published(_write(tmp_path, 'sudoku_n4.jsonl', _row(json.dumps(_LINE))))
  with pytest.raises(ValueError, match='line 1: ValueError: the answer .* is not one to copy'):
    read_published(_write(tmp_path, 'copy.jsonl', _row(json.dumps(_LINE[::-1]))))
  with pytest.raises(ValueError, match="line 1: KeyError: 'answer'"):
    read_published(_write(tmp_path, 'copy.jsonl', {'input': {'context': '[]'}}))
  long = {'input': {'context': json.dumps([f'n{i}' for i in range(9)])}, 'answer': '[]'}
  with pytest.raises(ValueError, match='a line of 9 does not fit the canvas of 8'):
    read_published(_write(tmp_path, 'copy.jsonl', long))
  with pytest.raises(ValueError, match='has no examples'):
    read_published(_write(tmp_path, 'copy.jsonl'))

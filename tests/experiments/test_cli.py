"""What a user gets wrong is told in one line, with what was probably meant."""

import json
import os
import signal

import pytest

from experiments import cli
from experiments import compare
from experiments import generate


def fails(main, argv, capsys):
  """Returns the one line on stderr of a call that must be refused."""
  assert main(argv) == 2
  captured = capsys.readouterr()
  lines = captured.err.strip().splitlines()
  assert len(lines) == 1 and 'Traceback' not in captured.err
  return lines[0]


@pytest.mark.parametrize(
  ('argv', 'expected'),
  [
    (['--methods', 'plain,ngrm'], "unknown method 'ngrm'; nearest: ngram"),
    (['--methods', 'zzz'], 'valid are: plain, ngram, early-exit'),
    (['--methods', ' ,'], 'no method named; valid are: plain'),
    (['--methods', 'draft-model'], 'give --draft'),
    (['--metods', 'ngram'], 'nearest: --methods'),
    (['--num-prompts', '0'], "'0' is not an integer of at least 1"),
    (['--batch-size', 'two'], "'two' is not an integer"),
    (['--temperature', '-0.1'], "'-0.1' is not a number of at least 0"),
    (['--temperature', 'nan'], "'nan' is not a number"),
    (['--top-p', '0'], 'above 0 and at most 1'),
    (['--seed', str(2**40)], 'from 0 to 2147483647'),
    (['--model', 'smollm2-135m-instrukt'], 'smollm2-135m-instruct'),
    (['--model', './no/such.gguf'], 'no such model file'),
  ],
)
def test_wrong_options(argv, expected, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert expected in fails(compare.main, argv, capsys)
  assert list(tmp_path.rglob('*.json')) == []


def test_an_unknown_model_file_names_its_neighbours(tmp_path, capsys):
  (tmp_path / 'llama.gguf').touch()
  argv = ['--model', str(tmp_path / 'lama.gguf'), '--out', str(tmp_path / 'out')]
  assert f'nearest: {tmp_path / "llama.gguf"}' in fails(compare.main, argv, capsys)
  assert not (tmp_path / 'out').exists()


def test_an_unknown_prompt_file_names_its_neighbours(tmp_path, capsys):
  (tmp_path / 'questions.jsonl').touch()
  argv = ['--prompts', str(tmp_path / 'question.jsonl')]
  assert f'nearest: {tmp_path / "questions.jsonl"}' in fails(compare.main, argv, capsys)
  argv = ['--prompts', str(tmp_path / 'no' / 'defaults.jsonl')]
  assert str(cli.DEFAULT_PROMPTS) in fails(compare.main, argv, capsys)


GOOD = '{"turns": ["hello"]}'


@pytest.mark.parametrize(
  ('lines', 'expected'),
  [
    ([GOOD, '', '{"turns": ["x"'], 'line 3: not valid JSON'),
    ([GOOD, '["x"]'], 'line 2: expected an object with "turns"'),
    (['{"turns": []}'], 'line 1: expected an object with "turns"'),
    (['{"turns": "x"}'], 'line 1: expected an object with "turns"'),
    (['{"turns": [" "]}'], 'line 1: the first turn is empty'),
    (['{"turns": ["x"], "question_id": 1.5}'], 'line 1: question_id must be'),
    (['{"turns": ["x"], "question_id": 1}'] * 2, 'line 2: question_id 1 is already on line 1'),
    (['', ' '], 'holds no prompts'),
  ],
)
def test_a_malformed_prompt_file(lines, expected, tmp_path, capsys):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n'.join(lines) + '\n')
  assert expected in fails(compare.main, ['--prompts', str(path)], capsys)


def test_prompts_are_read_as_they_are(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  records = [
    {'question_id': 5, 'category': 'a', 'turns': ['one\u2028line', 'a second turn']},
    {'question_id': 'five', 'turns': ['two']},
    {'turns': ['three']},
  ]
  path.write_text('\ufeff' + '\n'.join(json.dumps(r, ensure_ascii=False) for r in records))
  first, second, third = cli.read_prompts(path)
  assert (first.id, first.category, first.text, first.row_id) == (5, 'a', 'one\u2028line', 5)
  assert (second.id, second.category) == ('five', 'uncategorised')
  assert (third.id, third.row_id) == (3, 3)
  assert len({first.row_id, second.row_id, third.row_id}) == 3
  assert cli.read_prompts(path, limit=2) == [first, second]


def test_the_line_with_an_error_beyond_the_limit_is_not_read(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(f'{GOOD}\nnot json\n')
  assert len(cli.read_prompts(path, limit=1)) == 1


def test_errors_of_generate_are_of_the_same_kind(capsys):
  assert 'nearest: ngram' in fails(generate.main, ['--method', 'ngrams', 'x'], capsys)
  assert 'takes one method' in fails(generate.main, ['--method', 'plain,ngram', 'x'], capsys)
  assert 'the prompt is empty' in fails(generate.main, ['  '], capsys)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt(number, capsys):
  before = signal.getsignal(number)

  def main():
    os.kill(os.getpid(), number)
    raise AssertionError('not interrupted')

  assert cli.run('test', main) == 128 + number
  assert 'interrupted' in capsys.readouterr().err
  assert signal.getsignal(number) is before


def test_results_are_written_without_interruption():
  def main():
    with cli.uninterrupted():
      os.kill(os.getpid(), signal.SIGINT)
    return 5

  assert cli.run('test', main) == 5


def test_other_errors_are_not_hidden():
  def main():
    raise ValueError('a bug')

  with pytest.raises(ValueError, match='a bug'):
    cli.run('test', main)

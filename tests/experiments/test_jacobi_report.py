"""The report on Jacobi decoding: what counts as copied, and where the source stands."""

import json

import numpy as np
import pytest

from experiments import cli
from experiments import jacobi_report
from experiments.jacobi_report import copied_fraction


def test_what_is_copied():
  source = [1, 2, 3, 4, 5, 6]
  assert copied_fraction([1, 2, 3, 4], source) == 1.0
  assert copied_fraction([9, 2, 3, 4, 5, 9, 9, 9], source) == 0.5
  assert copied_fraction([1, 2, 3], source) == 0.0  # shorter than a run
  assert copied_fraction([1, 3, 2, 4], source) == 0.0
  assert copied_fraction([], source) == 0.0


class _Characters:
  """A tokenizer of characters."""

  def encode(self, text):
    return [ord(character) for character in text]


def test_the_source_is_what_follows_the_instruction():
  text = 'Correct this.\n\nIt were nice.'
  ids = [1, 2, *_Characters().encode(text), 3]
  start, end = jacobi_report._source_span(_Characters(), ids, text)
  assert bytes(ids[start:end]).decode() == 'It were nice.'
  assert jacobi_report._source_span(_Characters(), [7, 8, 9], text) == (0, 3)


def test_every_category_has_prompts():
  prompts = jacobi_report._some_of_each(3)
  assert len(prompts) == 18
  for prompt in cli.read_prompts(jacobi_report._EDITING):
    instruction, _, source = prompt.text.partition('\n\n')
    assert instruction and len(source.split()) > 20, prompt.id


@pytest.mark.parametrize('low, high', [(1.0, 2.5), (1.0, 1.0)])
def test_the_heat_map_is_drawn(tmp_path, low, high):
  shape = (len(jacobi_report._NGRAMS), len(jacobi_report._WINDOWS))
  grid = np.linspace(low, high, np.prod(shape)).reshape(shape)
  jacobi_report._heat_map(grid, tmp_path / 'map.png')
  assert (tmp_path / 'map.png').stat().st_size > 5000


def test_the_copying_table(tmp_path, tiny_model, monkeypatch, capsys):
  """On a tiny model: identical outputs are checked by the script itself."""
  lines = [
    {'question_id': i, 'category': kind, 'turns': ['Copy.\n\n' + 'the cat sat on the mat ' * 3]}
    for i, kind in enumerate(['a', 'b'], 1)
  ]
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  monkeypatch.setattr(jacobi_report, '_EDITING', path)
  options = ['copying', '--model', str(tiny_model), '--max-new-tokens', '8']
  assert jacobi_report.main([*options, '--out', str(tmp_path)]) == 0
  assert '| all | 2 |' in capsys.readouterr().out
  found = json.loads((tmp_path / 'copying.json').read_text())
  assert set(found['calls']) == {'ngram', 'lookahead', 'iad', 'iad, source given'}

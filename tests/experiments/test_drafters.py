"""The comparison of trained drafters, from training to the table, on one small head."""

import dataclasses
import json

import pytest

from experiments import cli
from experiments import drafters
from experiments import drafters_report
from experiments.measure import Run
from tests.train.conftest import OPTIONS
from tests.train.conftest import config  # noqa: F401
from tests.train.conftest import corpus  # noqa: F401
from tests.train.conftest import tokenizer_folder  # noqa: F401
from train.config import EvalConfig

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def test_heads_are_trained_and_compared(config, tmp_path, monkeypatch, capsys):  # noqa: F811
  evaluation = EvalConfig(every=6, num_prompts=2, prompt_length=8, max_new_tokens=8)
  head = dataclasses.replace(config, target='runs/tiny_target/export', eval=evaluation)
  configs = {
    'tiny_target': dataclasses.replace(config, options=OPTIONS | {'as_target': True}),
    'tiny_medusa': dataclasses.replace(head, objective='medusa', options={'num_heads': 3}),
    'tiny_ppd': dataclasses.replace(head, objective='ppd', options={'num_anchors': 8}),
  }
  monkeypatch.setattr(drafters, 'load_config', configs.get)
  monkeypatch.setattr(drafters, '_PROMPT_LENGTH', 8)
  arguments = ['--workdir', str(tmp_path), '--only', 'tiny_medusa,tiny_ppd', '--nodes', '4',
               '--target-steps', '3', '--num-steps', '4', '--num-prompts', '2',
               '--max-new-tokens', '8']  # fmt: skip
  assert drafters.main(arguments) == 0
  results = json.loads((tmp_path / 'drafters' / 'drafters.json').read_text())
  steps = {name: facts['num_steps'] for name, facts in results['training'].items()}
  assert steps == {'tiny_target': 3, 'tiny_medusa': 4, 'tiny_ppd': 4}
  greedy, sampled = results['temperatures']
  rows = {row['name']: row for row in greedy['methods']}
  assert list(rows) == ['plain', 'free drafts', 'ngram', 'medusa', 'medusa tree', 'ppd', 'ppd 8',
                        'ppd 16']  # fmt: skip
  for row in rows.values():  # lossless: every prompt's tokens are those of plain decoding
    assert row['identical_to_plain'] == row['compared_to_plain'] == 2
  assert rows['plain']['tokens_per_call'] == 1
  assert rows['medusa']['num_parameters'] > 0 and 0 <= rows['medusa']['draft_share'] < 1
  assert all(row['num_failed'] == 0 for row in sampled['methods'])
  shown = capsys.readouterr().out
  assert 'medusa above ngram in tokens per call' in shown
  assert 'tiny_ppd, depth 3: accepted by rank' in shown
  assert len(rows['ppd']['acceptance']) == 3 and rows['ppd 8']['expected_tokens_per_call'] >= 1
  names = {path.name for path in (tmp_path / 'drafters').iterdir()}
  assert names == {'drafters.json', 'tables.md', 'drafters.png'}
  assert drafters.main([*arguments, '--train-only']) == 0  # nothing is trained twice


def test_orders_name_the_best_fixed_length():
  def row(name, value):
    return {'name': name, 'tokens_per_call': value, 'tokens_per_call_ci': None,
            'speedup': value, 'speedup_ci': None}  # fmt: skip

  rows = [row('ngram', 1.1), row('distillspec', 1.3), row('distillspec 2', 1.6),
          row('distillspec tree', 9.0), row('acceptance', 1.5)]  # fmt: skip
  results = {'temperatures': [{'temperature': 0.0, 'methods': rows}]}
  results['orders'] = found = drafters_report.orders(results)
  (rule,) = [each for each in found if each['better'] == 'acceptance']
  assert rule['worse'] == 'distillspec 2' and not rule['holds']
  assert any('distillspec above ngram' in x and 'holds' in x
             for x in drafters_report.order_lines(results))  # fmt: skip


def test_repetition_is_measured():
  def run(tokens):
    return Run(0, 0, tokens, None, None, 1.0, 1.0)  # pyright: ignore[reportArgumentType]

  assert drafters.repeated_fraction([run((1, 2, 3, 4, 1, 2, 3, 4))]) == pytest.approx(1 / 5)
  assert drafters.repeated_fraction([run((1, 2))]) == 0


def test_unknown_heads_are_named():
  assert drafters.choose_heads('tiny_eagle3,tiny_medusa') == ['tiny_medusa', 'tiny_eagle3']
  with pytest.raises(cli.UserError, match="unknown head 'tiny_eagel'; nearest: tiny_eagle"):
    drafters.choose_heads('tiny_eagel')

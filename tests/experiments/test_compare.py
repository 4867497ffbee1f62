"""The main job from end to end on a tiny model: tables, files, failures, interruption."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from experiments import compare
from experiments import measure
from experiments.display import Display
from tests.experiments.conftest import MAX_POSITION
from tests.experiments.conftest import save_tiny_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEW_TOKENS = 12
NUMBER, INTERVAL, COUNT = (int, float), list, int
METHOD_SCHEMA = {
  'name': str,
  'exactness': str,
  'temperature': NUMBER,
  'num_prompts': COUNT,
  'num_tokens': COUNT,
  'num_target_calls': COUNT,
  'tokens_per_call': NUMBER,
  'tokens_per_call_ci': INTERVAL,
  'tokens_per_second': NUMBER,
  'tokens_per_second_ci': INTERVAL,
  'speedup': NUMBER,
  'speedup_ci': INTERVAL,
  'conditional_acceptance': list,
  'unconditional_acceptance': list,
  'compile_seconds': NUMBER,
  'prefill_seconds': NUMBER,
  'decode_seconds': NUMBER,
  'identical_to_plain': COUNT,
  'compared_to_plain': COUNT,
}


def arguments(model, prompts, out, *more):
  return [
    '--model', str(model), '--prompts', str(prompts), '--out', str(out),
    '--max-new-tokens', str(NEW_TOKENS), *more,
  ]  # fmt: skip


def read_results(out):
  results = json.loads((out / 'results.json').read_text())
  return results, {method['name']: method for method in results['methods']}


def read_outputs(out):
  return [json.loads(line) for line in (out / 'outputs.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(tiny_model, tmp_path_factory):
  """A whole comparison: (exit code, what it printed, its folder)."""
  folder = tmp_path_factory.mktemp('compare')
  prompts = folder / 'prompts.jsonl'
  texts = {1: ('a', 'xyz xyz'), 2: ('b', 'Hello!'), 3: ('a', '1, 2, 3'), 4: ('b', 'Why?')}
  prompts.write_text(
    ''.join(
      json.dumps({'question_id': i, 'category': category, 'turns': [text]}) + '\n'
      for i, (category, text) in texts.items()
    )
  )
  out = folder / 'out'
  stdout, sys.stdout = sys.stdout, io.StringIO()
  try:
    code = compare.main(arguments(tiny_model, prompts, out, '--repeats', '2'))
    return code, sys.stdout.getvalue(), out
  finally:
    sys.stdout = stdout


def test_it_ends_well(finished):
  code, printed, out = finished
  assert code == 0
  assert sorted(path.name for path in out.iterdir()) == [
    'acceptance_by_depth.png', 'outputs.jsonl', 'results.json', 'speedup_by_category.png',
  ]  # fmt: skip
  assert str(out) in printed
  for path in out.glob('*.png'):
    assert path.read_bytes().startswith(b'\x89PNG')


def test_plain_lines_where_there_is_no_terminal(finished):
  _, printed, _ = finished
  assert '\x1b' not in printed and '\r' not in printed
  assert 'compiled: ngram in ' in printed
  assert 'early-exit: 8/8 runs, ' in printed
  assert max(map(len, printed.splitlines())) < 200


def test_tables(finished):
  _, printed, out = finished
  _, methods = read_results(out)
  row = next(line for line in printed.splitlines() if line.strip().startswith('ngram  '))
  assert f'{methods["ngram"]["speedup"]:.2f} (' in row and '4/4' in row
  assert 'token-identical' in row
  category = next(line for line in printed.splitlines() if line.strip().startswith('b  '))
  assert f'{methods["ngram"]["categories"]["b"]["speedup"]:.2f} × at' in category


def test_results_follow_the_schema(finished):
  results, methods = read_results(finished[2])
  assert results['schema'] == 1 and results['partial'] is False
  assert {'model', 'device', 'versions', 'config', 'methods'} <= results.keys()
  assert list(methods) == ['plain', 'ngram', 'early-exit']
  for method in methods.values():
    for name, kind in METHOD_SCHEMA.items():
      assert isinstance(method[name], kind), (method['name'], name)
      if name.endswith('_ci'):
        low, high = method[name]
        assert low <= method[name.removesuffix('_ci')] <= high


def test_results_agree_with_each_other_and_with_the_outputs(finished):
  results, methods = read_results(finished[2])
  outputs = read_outputs(finished[2])
  assert [(o['method'], o['prompt_id']) for o in outputs] == [
    (name, prompt) for name in methods for prompt in (1, 2, 3, 4)
  ]
  for name, method in methods.items():
    emitted = sum(len(o['tokens']) for o in outputs if o['method'] == name)
    assert method['num_prompts'] == 4
    assert method['num_tokens'] == emitted * results['config']['repeats']
    per_call = method['num_tokens'] / method['num_target_calls']
    assert method['tokens_per_call'] == pytest.approx(per_call)
    per_second = method['num_tokens'] / method['decode_seconds']
    assert method['tokens_per_second'] == pytest.approx(per_second)
    speedup = per_second / methods['plain']['tokens_per_second']
    assert method['speedup'] == pytest.approx(speedup)


def test_greedy_output_is_that_of_plain_decoding(finished):
  _, methods = read_results(finished[2])
  for method in methods.values():
    assert method['exactness'] == 'token-identical'
    assert (method['identical_to_plain'], method['compared_to_plain']) == (4, 4)
  texts = {}
  for output in read_outputs(finished[2]):
    texts.setdefault(output['prompt_id'], set()).add(output['text'])
    assert output['result'] in ('length', 'eos')
  assert all(len(found) == 1 for found in texts.values())


def test_sampling(tiny_model, tiny_draft, prompts_file, tmp_path, capsys):
  methods = 'draft-model,early-exit/speculative'
  argv = arguments(tiny_model, prompts_file, tmp_path / 'out', '--methods', methods)
  argv += ['--draft', str(tiny_draft), '--temperature', '0.8', '--top-p', '0.9']
  assert compare.main([*argv, '--num-drafts', '2', '--batch-size', '2']) == 0
  results, found = read_results(tmp_path / 'out')
  assert list(found) == ['plain', 'draft-model', 'early-exit/speculative']  # plain always runs
  coupled, ratio = found['draft-model'], found['early-exit/speculative']
  assert (coupled['exactness'], coupled['compared_to_plain']) == ('token-identical', 3)
  assert coupled['identical_to_plain'] == 3
  assert (ratio['exactness'], ratio['compared_to_plain']) == ('law-identical', 0)
  assert len(ratio['conditional_acceptance']) == 2
  assert results['draft']['name'] == 'tiny-draft' and results['config']['top_p'] == 0.9
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ['early-exit/speculative', 'law-identical', 'law'] in [[*r[:2], r[-1]] for r in rows if r]


# --- What goes wrong -----------------------------------------------------------------------------


def test_rows_that_fail_are_reported_and_count_nowhere(tmp_path, prompts_file, capsys):
  save_tiny_model(tmp_path / 'broken', broken=True)
  argv = arguments(tmp_path / 'broken', prompts_file, tmp_path / 'out', '--methods', 'plain')
  assert compare.main(argv) == 1
  assert 'FAILED: 3 of 3 runs of plain' in capsys.readouterr().out
  _, methods = read_results(tmp_path / 'out')
  plain = methods['plain']
  assert (plain['num_tokens'], plain['num_prompts'], plain['num_failed']) == (0, 0, 3)
  assert plain['failed_prompts'] == [7, 8, 'nine']
  assert plain['tokens_per_second'] is None and plain['compared_to_plain'] == 0


def test_a_prompt_that_does_not_fit(tiny_model, tmp_path, capsys):
  prompts = tmp_path / 'prompts.jsonl'
  lines = [{'question_id': 4, 'turns': ['short']}, {'question_id': 5, 'turns': ['x' * 240]}]
  prompts.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert compare.main(arguments(tiny_model, prompts, tmp_path / 'out')) == 2
  error = capsys.readouterr().err
  assert 'prompt 5 is too long' in error and f'{MAX_POSITION} positions' in error
  assert error.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_an_exit_layer_that_does_not_exist(tiny_model, prompts_file, tmp_path, capsys):
  argv = arguments(tiny_model, prompts_file, tmp_path / 'out', '--exit-layer', '9')
  assert compare.main(argv) == 2
  assert 'exit_layer must be in 1..4' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def interrupt_after(monkeypatch, num_batches):
  """Lets Ctrl-C fall into the batch after these, warm-ups not counted."""
  run_batch, count = measure.run_batch, 0

  def interrupted(method, request):
    nonlocal count
    warm_up = int(request.max_new_tokens[0]) < NEW_TOKENS
    if not warm_up and count == num_batches:
      raise KeyboardInterrupt
    count += not warm_up
    return run_batch(method, request)

  monkeypatch.setattr(measure, 'run_batch', interrupted)


def test_interruption_keeps_what_was_measured(
  tiny_model, prompts_file, tmp_path, capsys, monkeypatch
):
  interrupt_after(monkeypatch, 3)  # plain and ngram on the first prompt, ngram on the second
  argv = arguments(tiny_model, prompts_file, tmp_path / 'out', '--methods', 'plain,ngram')
  assert compare.main(argv) == 130
  assert 'INTERRUPTED: of 3 runs of each method these were made: plain 1, ngram 2.' in (
    capsys.readouterr().out
  )
  results, methods = read_results(tmp_path / 'out')
  assert results['partial'] is True
  assert (methods['plain']['num_prompts'], methods['ngram']['num_prompts']) == (1, 2)
  assert methods['ngram']['compared_to_plain'] == 1
  assert methods['ngram']['speedup'] is not None and methods['ngram']['speedup_ci'] is None
  assert [(o['method'], o['prompt_id']) for o in read_outputs(tmp_path / 'out')] == [
    ('plain', 7), ('ngram', 7), ('ngram', 8),
  ]  # fmt: skip


def test_interruption_before_anything_was_measured_leaves_nothing(
  tiny_model, prompts_file, tmp_path, capsys, monkeypatch
):
  interrupt_after(monkeypatch, 0)
  argv = arguments(tiny_model, prompts_file, tmp_path / 'out', '--methods', 'plain')
  assert compare.main(argv) == 130
  assert 'compare: interrupted' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_a_terminated_process_keeps_what_was_measured(tiny_model, prompts_file, tmp_path):
  argv = arguments(tiny_model, prompts_file, tmp_path / 'out', '--methods', 'plain')
  command = [sys.executable, '-m', 'experiments.compare', *argv, '--repeats', '100000']
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
  assert process.stdout is not None
  for line in process.stdout:
    if line.startswith('decoding'):
      process.send_signal(signal.SIGTERM)
      break
  rest, _ = process.communicate(timeout=60)
  if (tmp_path / 'out').exists():  # the signal may come before the first batch is over
    assert 'INTERRUPTED' in rest
    assert read_results(tmp_path / 'out')[0]['partial'] is True
  assert process.returncode == 128 + signal.SIGTERM


# --- The rest ------------------------------------------------------------------------------------


def test_list_shows_every_method(capsys):
  assert compare.main(['--list']) == 0
  printed = capsys.readouterr().out
  for name in compare.METHODS:
    assert f' {name} ' in printed


def test_a_terminal_sees_progress():
  screen = io.StringIO()
  console = Console(file=screen, force_terminal=True, width=100, _environ={})
  with Display(console) as display:
    display.stage('loading')
    display.done('model', 'tiny')
    display.begin(['plain', 'ngram'], 4)
    display.advance('ngram', 2, 123.4, 1.5)
  printed = screen.getvalue()
  assert '123.4 tokens/s' in printed and '2/4' in printed and '1.50 tokens/call' in printed


@pytest.mark.real
@pytest.mark.parametrize('more', [[], ['--methods', 'jacobi,jacobi-ngram,lookahead,iad']])
def test_the_default_model(tmp_path, more):
  argv = ['--num-prompts', '2', '--max-new-tokens', '8', '--out', str(tmp_path / 'out')]
  assert compare.main([*argv, *more]) == 0
  results, methods = read_results(tmp_path / 'out')
  assert results['model']['name'] == 'smollm2-135m-instruct'
  for method in methods.values():
    assert method['num_tokens'] == 16
    assert method['identical_to_plain'] == method['compared_to_plain'] == 2
  if not more:  # chats, which the head that comes along was trained on the like of
    assert results['head']['target'] == 'smollm2-135m-instruct'
    assert methods['trained-head-tree']['tokens_per_call'] > 1.2

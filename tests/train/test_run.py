"""Whole runs: resumed to the bit, killed, stopped, broken, spread over devices and processes."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.registry import load_model
from tests.train.conftest import OPTIONS
from tests.train.conftest import read_steps
from tests.train.conftest import write_config
from tests.train.test_step import _probe_objective
from train import export
from train import run as run_module
from train import sharding
from train.checkpoints import Checkpoints
from train.config import EvalConfig
from train.config import MeshConfig
from train.main import main
from train.run import Outcome
from train.run import Run

_ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def _train(config, workdir) -> Run:
  run = Run(config, workdir, show=False)
  assert run.train() is Outcome.FINISHED
  return run


def _state_at(run, step):
  checkpoints = Checkpoints(run.workdir / 'checkpoints', keep_last=2)
  state = checkpoints.restore(step, run.like)
  checkpoints.close()
  return jax.tree.map(np.asarray, state)


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """A run that nothing has disturbed."""
  return _train(config, tmp_path_factory.mktemp('whole') / 'run')


def test_a_run_leaves_what_it_promises(whole, config):
  names = {path.name for path in whole.workdir.iterdir()}
  assert {'config.json', 'data', 'checkpoints', 'export', 'metrics.jsonl', 'tensorboard',
          'loss.png', 'accuracy.png'} <= names  # fmt: skip
  found = read_steps(whole.workdir)
  assert list(found) == [2, 4, 6] and found[6] < found[2]
  assert {path.name for path in (whole.workdir / 'checkpoints').iterdir()} == {'4', '6'}
  loaded = load_model(whole.workdir / 'export')
  state = _state_at(whole, 6)
  average = nnx.to_pure_dict(state.average)
  np.testing.assert_array_equal(loaded.transformer.embedding[...], average['embedding'])
  with pytest.raises(AssertionError):
    np.testing.assert_array_equal(state.params['embedding'][...], average['embedding'])
  assert loaded.tokenizer.decode(loaded.tokenizer.encode('word1 is 3')) == 'word1 is 3'


def test_kill_nine_and_resume_give_the_same_parameters(whole, config, tmp_path):
  slow = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=2))
  path = write_config(tmp_path / 'config.py', slow)
  workdir = tmp_path / 'run'
  command = [sys.executable, '-c', _SLOW_STEPS, '--config', str(path), '--workdir', str(workdir)]
  process = subprocess.Popen([*command, '--quiet'], cwd=_ROOT, stderr=subprocess.PIPE)
  while not (workdir / 'checkpoints' / '2').exists():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.02)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  process.communicate()
  killed = Checkpoints(workdir / 'checkpoints', keep_last=2)
  assert killed.last_step is not None and killed.last_step < 6
  killed.close()
  resumed = _train(slow, workdir)
  _assert_same(_state_at(resumed, 6), _state_at(whole, 6))
  assert read_steps(workdir) == read_steps(whole.workdir)


# Steps that leave time for a signal in between.
_SLOW_STEPS = """
import sys, time
from train import run
from train.main import main
batch = run.Run._batch
run.Run._batch = lambda self, step: (time.sleep(0.4), batch(self, step))[1]
sys.exit(main(sys.argv[1:]))
"""


def test_a_terminated_run_saves_and_resumes(whole, config, tmp_path, monkeypatch):
  rare = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=100))
  run = Run(rare, tmp_path / 'run', show=False)
  batch = run._batch

  def batch_and_signal(step):
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch(step)

  monkeypatch.setattr(run, '_batch', batch_and_signal)
  assert run.train() is Outcome.STOPPED
  assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'3'}
  again = _train(rare, tmp_path / 'run')
  _assert_same(_state_at(again, 6), _state_at(whole, 6))


def test_a_loss_that_is_not_a_number_stops_the_run(config, tmp_path, monkeypatch):
  run = Run(config, tmp_path / 'run', show=False)
  step_fn = run.step_fn

  def break_step_three(state, target_params, batch, features):
    if int(state.step) == 3:
      state = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    return step_fn(state, target_params, batch, features)

  monkeypatch.setattr(run, 'step_fn', break_step_three)
  assert run.train() is Outcome.NON_FINITE
  assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'2'}
  saved = np.load(tmp_path / 'run' / 'non_finite' / 'step_3.npz')
  expected = run.corpus.batch(3, config.batch_size, config.seed)
  np.testing.assert_array_equal(saved['tokens'], expected.tokens)


@pytest.mark.parametrize(
  ('objective', 'options'),
  [
    ('language_model', OPTIONS | {'num_drafts': 2}),
    ('ppd', {'num_prompts': 2, 'num_anchors': 8}),
  ],
)
def test_a_head_is_decoded_exported_and_loaded(config, target_folder, tmp_path, objective, options):
  head_config = dataclasses.replace(
    config,
    objective=objective,
    options=options,
    target=str(target_folder),
    eval=EvalConfig(every=4, num_prompts=3, prompt_length=8, max_new_tokens=12),
  )
  run = _train(head_config, tmp_path / 'run')
  lines = [json.loads(x) for x in (run.workdir / 'metrics.jsonl').read_text().splitlines()]
  measured = {x['step']: x for x in lines if 'tokens_per_call/T=0' in x}
  assert set(measured) == {0, 4, 6}
  for line in measured.values():
    assert 1 <= line['tokens_per_call/T=0'] <= 3 and 1 <= line['tokens_per_call/T=1'] <= 3
  checkpoints = Checkpoints(run.workdir / 'checkpoints', keep_last=2)
  best = max((4, 6), key=lambda step: (measured[step]['tokens_per_call/T=0'], step))
  assert checkpoints.best_step == best
  checkpoints.close()
  assert run.target is not None
  loaded = export.load_head(run.workdir / 'export', run.target)
  assert loaded.facts['step'] == best and loaded.facts['options'] == options
  average = _state_at(run, best).average
  _assert_same(nnx.to_pure_dict(nnx.state(loaded.head)), nnx.to_pure_dict(average))
  again = Run(
    dataclasses.replace(head_config, init_from=str(run.workdir / 'export')), tmp_path / 'again'
  )
  _assert_same(nnx.to_pure_dict(again.first_state().params), nnx.to_pure_dict(average))


def test_the_best_checkpoint_outlives_later_ones(whole, tmp_path):
  checkpoints = Checkpoints(tmp_path / 'checkpoints', keep_last=2)
  state = whole.first_state()
  for step, value in [(1, 1.2), (2, 1.9), (3, 1.5), (4, None), (5, 1.4)]:
    checkpoints.save(step, state, {'step': step}, value)
  checkpoints.wait()
  assert checkpoints.best_step == 2 and checkpoints.last_step == 5
  assert checkpoints.facts(2) == {'step': 2}
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {'2', '4', '5'}
  checkpoints.close()


def _again_as_users_compile(request):
  """Returns the exit code of a test in its own process, without the flags to compile quickly."""
  test = f'{pathlib.Path(__file__)}::{request.node.name}'
  command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', test]
  return subprocess.run(command, cwd=_ROOT, env={**os.environ, 'XLA_FLAGS': ''}).returncode


def test_tapes_from_disk_give_the_same_run(request, config, target_folder, tmp_path, monkeypatch):
  if os.environ['XLA_FLAGS']:  # two programs: compiled quickly they need not round alike
    assert _again_as_users_compile(request) == 0
    return
  monkeypatch.setattr(run_module, 'get_objective', lambda *_: _probe_objective())
  few = dataclasses.replace(
    config, target=str(target_folder), data=dataclasses.replace(config.data, max_tokens=300)
  )  # fewer rows than steps read: most come back
  plain = _train(few, tmp_path / 'plain')
  cached_config = dataclasses.replace(few, tape_cache=str(tmp_path / 'tapes'))
  cached = _train(cached_config, tmp_path / 'cached')
  assert cached.tapes is not None and cached.tapes._known.all()
  _assert_same(_state_at(cached, 6).params, _state_at(plain, 6).params)
  monkeypatch.setattr(cached.tapes, '_tape', None)  # nothing is made a second time
  assert _train(cached_config, tmp_path / 'third').corpus.facts == cached.corpus.facts


# --- Errors --------------------------------------------------------------------------------------


def test_another_configuration_in_the_same_folder_is_refused(whole, config):
  other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, b1=0.5))
  with pytest.raises(ValueError, match=r'other settings: optimizer.b1: 0.9, now 0.5'):
    Run(other, whole.workdir)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'objective': 'eagle9'}, "unknown objective 'eagle9'"),
    ({'options': {}}, "objective 'language_model' needs a target"),
    ({'target': 'nothing'}, "objective 'language_model' has no use for a target"),
    ({'mesh': MeshConfig(tensor=7)}, 'is not 1 devices'),
  ],
)
def test_what_cannot_run_says_why(config, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    Run(dataclasses.replace(config, **changes), tmp_path / 'run')


def test_the_command_line_tells_errors_in_one_line(config, tmp_path, capsys):
  assert main(['--config', 'tiny_targt', '--workdir', str(tmp_path / 'run')]) == 2
  assert 'nearest: tiny_target' in capsys.readouterr().err
  path = write_config(tmp_path / 'config.py', config)
  arguments = ['--config', str(path), '--workdir', str(tmp_path / 'run')]
  assert main([*arguments, '--process-id', '1']) == 2
  assert '--coordinator, --num-processes and --process-id go together' in capsys.readouterr().err
  assert main([*arguments, '--set', 'data.sources=nowhere.txt']) == 2
  assert 'no such file or folder: nowhere.txt' in capsys.readouterr().err


# --- Meshes --------------------------------------------------------------------------------------


def test_parameters_are_split_by_their_names():
  sizes = {'data': 2, 'fsdp': 4, 'tensor': 8}
  spec = sharding.partition_spec
  big = 512
  assert spec(['embedding', 'value'], (big, big), sizes) == jax.P('tensor', 'fsdp')
  assert spec(['layers', 'mlp', 'down'], (3, big, big), sizes) == jax.P(None, 'tensor', 'fsdp')
  assert spec(['layers', 'attention', 'qkv'], (3, big, 8, 3, 64), sizes) == jax.P(
    None, 'fsdp', 'tensor', None, None
  )
  assert spec(['qkv'], (big, 3, 3, 64), sizes) == jax.P('fsdp', None, None, None)  # 3 heads
  assert spec(['fc'], (33, 4 * big), sizes) == jax.P(None, 'fsdp')
  assert spec(['scale'], (16,), sizes) == jax.P()


def test_rows_that_do_not_split_are_refused(config, tmp_path):
  devices = jax.devices() * 1
  mesh = sharding.make_mesh(MeshConfig(), devices)
  assert sharding.my_rows(8, mesh) == slice(0, 8)
  with pytest.raises(ValueError, match='-1 once'):
    sharding.make_mesh(MeshConfig(data=-1, fsdp=-1), devices)

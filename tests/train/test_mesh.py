"""One, two and four devices, and two processes, train the same model."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.train.conftest import read_steps
from tests.train.conftest import write_config
from train.checkpoints import Checkpoints
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


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """A run on one device."""
  return _train(config, tmp_path_factory.mktemp('whole') / 'run')


_DEVICES = """
import sys, pathlib, jax, numpy as np
jax.config.update('jax_numpy_rank_promotion', 'raise')
from train import run, sharding
from train.config import MeshConfig, load_config
import dataclasses
config, folder = load_config(sys.argv[1]), pathlib.Path(sys.argv[2])
make_mesh = sharding.make_mesh
for name, mesh in {'1': (1, 1, 1), '2': (2, 1, 1), '4': (4, 1, 1), 'all': (1, 2, 2)}.items():
  count = int(np.prod(mesh))
  sharding.make_mesh = lambda c, count=count: make_mesh(c, jax.devices()[:count])
  changed = dataclasses.replace(config, mesh=MeshConfig(*mesh))
  assert run.Run(changed, folder / name, show=False).train() is run.Outcome.FINISHED
"""


@pytest.mark.slow
def test_one_two_and_four_devices_agree_and_read_each_others_checkpoints(config, tmp_path, whole):
  big = dataclasses.replace(  # large enough that parameters are really split
    config, num_steps=4, options=config.options | {'hidden_size': 64, 'intermediate_size': 256,
                                                   'num_kv_heads': 2},
  )  # fmt: skip
  path = write_config(tmp_path / 'config.py', big)
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '4', 'NPROC': '8'}
  subprocess.run(
    [sys.executable, '-c', _DEVICES, str(path), str(tmp_path)],
    cwd=_ROOT, env=environment, check=True, timeout=900,
  )  # fmt: skip
  here = _train(big, tmp_path / 'here')
  expected = _state_at(here, 4)
  for name in ('1', '2', '4', 'all'):
    checkpoints = Checkpoints(tmp_path / name / 'checkpoints', keep_last=2)
    state = checkpoints.restore(4, here.like)  # onto this mesh of one device
    checkpoints.close()
    assert read_steps(tmp_path / name) == pytest.approx(read_steps(here.workdir), rel=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
      state.params, expected.params,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_agree_with_one(config, tmp_path, whole):
  path = write_config(tmp_path / 'config.py', config)
  port = 20000 + os.getpid() % 20000
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '2', 'NPROC': '8'}
  command = [sys.executable, '-m', 'train.main', '--config', str(path), '--workdir',
             str(tmp_path / 'run'), '--quiet', '--coordinator', f'127.0.0.1:{port}',
             '--num-processes', '2', '--process-id']  # fmt: skip
  processes = [
    subprocess.Popen([*command, str(i)], cwd=_ROOT, env=environment, stderr=subprocess.PIPE)
    for i in range(2)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()[-3000:]
  assert read_steps(tmp_path / 'run') == pytest.approx(read_steps(whole.workdir), rel=1e-5)
  checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints', keep_last=2)
  state = checkpoints.restore(6, whole.like)
  checkpoints.close()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
    state.params, _state_at(whole, 6).params,
  )  # fmt: skip

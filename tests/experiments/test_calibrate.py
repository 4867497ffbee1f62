"""The calibration: what is measured, written, and read back by those who choose by it."""

import json

import numpy as np
import pytest

from decodax import controllers
from decodax import static_trees
from experiments import calibrate


@pytest.fixture(scope='module')
def calibration(tiny_model, tiny_draft, tmp_path_factory):
  path = tmp_path_factory.mktemp('out') / 'deeper' / 'calibration.json'
  code = calibrate.main([
    '--model', str(tiny_model), '--draft', str(tiny_draft), '--out', str(path),
    '--batch-sizes', '2,1', '--max-block-size', '2', '--repeats', '2',
  ])  # fmt: skip
  assert code == 0
  return path


def test_curves_rise_from_one_and_are_read_back(calibration):
  for batch_size in (1, 2):
    read = calibrate.read_calibration(calibration, batch_size=batch_size)
    assert read.target.block_sizes.tolist() == [1, 2]
    assert set(read.drafts) == {'early-exit', 'draft-model'}
    for curve in (read.target, *read.drafts.values()):
      assert (np.asarray(curve.times_ms) > 0).all()
  assert [p.name for p in calibration.parent.iterdir()] == ['calibration.json']
  record = json.loads(calibration.read_text())
  assert record['command'].startswith('python -m experiments.calibrate --model')


def test_controllers_and_builders_take_it(calibration):
  read = calibrate.read_calibration(calibration)
  step_ms = float(read.drafts['early-exit'].times_ms[0])
  times = controllers.round_times_ms(read.target, 1, step_ms)
  assert np.isfinite(times).all()
  assert controllers.optimal_length(0.9, times).lengths[0] in (0, 1)
  assert controllers.online(times, (0, 1)).lengths == (0, 1)
  choice = static_trees.best_sequoia(np.array([0.6, 0.2]), read.target, draft_step_ms=step_ms)
  assert choice.speedup > 0.999  # the root alone is plain decoding


def test_what_is_no_calibration_is_refused(calibration, tmp_path):
  with pytest.raises(ValueError, match=r'batch sizes \[1, 2\], not 3'):
    calibrate.read_calibration(calibration, batch_size=3)
  other = tmp_path / 'other.json'
  other.write_text('{"results": []}')
  with pytest.raises(ValueError, match='not a calibration'):
    calibrate.read_calibration(other)
  with pytest.raises(FileNotFoundError):
    calibrate.read_calibration(tmp_path / 'missing.json')


def test_wrong_options_are_one_line(capsys):
  assert calibrate.main(['--batch-sizes', '0']) == 2
  assert 'not an integer of at least 1' in capsys.readouterr().err

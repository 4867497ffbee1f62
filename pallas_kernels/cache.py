"""Where the project keeps what it fetched or compiled."""

import os
import pathlib


def cache_directory() -> pathlib.Path:
  """Returns `DECODAX_CACHE`, or `~/.cache/decodax`."""
  default = pathlib.Path.home() / '.cache' / 'decodax'
  return pathlib.Path(os.environ.get('DECODAX_CACHE') or default).expanduser()

"""The CPU kernel of skinny_matmul: C++, compiled once per machine, called by XLA.

The library is kept in `DECODAX_CACHE` (or `~/.cache/decodax`) under a name that tells source,
compiler flags, XLA's headers and the processor's features apart, so a changed one is compiled anew.
The compiler is `CXX`, or `c++`.
"""

from collections.abc import Sequence
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp

from pallas_kernels.cache import cache_directory
from pallas_kernels.skinny_matmul.reference import skinny_matmul_reference

MAX_ROWS = 12  # with more XLA is faster
_SOURCE = pathlib.Path(__file__).with_name('skinny_matmul.cc')
_SYMBOL = 'decodax_skinny_matmul'
_FLAGS = ('-O3', '-march=native', '-std=c++17', '-shared', '-fPIC', '-w')
_LONGEST = 120  # seconds for the compiler


@jax.custom_jvp
def skinny_matmul_cpu(x: jax.Array, layer: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
  """Returns f32[M, N] for x f32[M, K], i32[] and L times f32[K, N]."""
  shape = jax.ShapeDtypeStruct((x.shape[0], matrices[0].shape[1]), jnp.float32)
  return jax.ffi.ffi_call(_SYMBOL, shape, vmap_method='sequential')(x, layer, *matrices)


@skinny_matmul_cpu.defjvp
def _jvp(primals, tangents):
  x, layer, matrices = primals
  x_dot, _, matrices_dot = tangents
  y = skinny_matmul_cpu(x, layer, matrices)
  through_x = skinny_matmul_reference(x_dot, layer, matrices)
  return y, through_x + skinny_matmul_reference(x, layer, matrices_dot)


def why_not(x: jax.Array, matrices: Sequence[jax.Array]) -> str | None:
  """Returns what keeps the kernel from a problem, or None. Compiles it if that was not done."""
  if any(array.dtype != jnp.float32 for array in (x, *matrices)):
    return f'float32 only: {x.dtype} and {matrices[0].dtype} were given'
  if not 1 <= x.shape[0] <= MAX_ROWS:
    return f'1 to {MAX_ROWS} rows only: {x.shape[0]} were given'
  return prepare()


@functools.cache
def prepare() -> str | None:
  """Compiles the kernel if need be and makes it known to XLA; returns what went wrong, or None."""
  try:
    handler = jax.ffi.pycapsule(getattr(_library(), _SYMBOL))
  except subprocess.CalledProcessError as error:
    said = error.stderr.decode(errors='replace').strip().splitlines()[:1]
    return f'{error.cmd[0]} could not compile the kernel: {" ".join(said)}'
  except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
    return f'the kernel could not be made: {error}'
  jax.ffi.register_ffi_target(_SYMBOL, handler, platform='cpu')
  return None


def _library():
  path = cache_directory() / 'kernels' / f'skinny_matmul-{_fingerprint()}.so'
  if path.exists():
    with contextlib.suppress(OSError):  # damaged: made anew
      return ctypes.CDLL(str(path))
  _compile(path)
  return ctypes.CDLL(str(path))


def _compile(path):
  """Writes the library as a whole or not at all."""
  compiler = shutil.which(os.environ.get('CXX') or 'c++')
  if compiler is None:
    raise FileNotFoundError('there is no C++ compiler (CXX, or c++ in the path)')
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    made = pathlib.Path(scratch) / path.name
    command = [compiler, *_FLAGS, '-I', jax.ffi.include_dir(), str(_SOURCE), '-o', str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST)
    os.replace(made, path)


def _fingerprint():
  """Returns a hash of all that the library depends on."""
  digest = hashlib.sha256(_SOURCE.read_bytes())
  facts = (*_FLAGS, os.environ.get('CXX', ''), platform.platform(), platform.machine(),
           jax.__version__, _processor())  # fmt: skip
  digest.update('\n'.join(facts).encode())
  return digest.hexdigest()[:16]


def _processor():
  """Returns the features of the processor as Linux lists them, else its name."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line for line in lines if line.startswith(('flags', 'Features'))), '')

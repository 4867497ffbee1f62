"""Tapes of packed rows on disk, for runs that go over their data several times.

Each process keeps the rows that it has read, in one file for `hidden` and one for every tap, with
the row's number in the corpus as index. A row is made by the target the first time and read back
from then on. The disk holds R x T x D x (1 + taps) numbers, in the compute dtype; rows never read
take no space where the file system has sparse files.

Axes: `R` rows of the corpus, `B` rows of this process's batch, `T` tokens, `D` width.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from train import sharding
from train.tape import make_tape

_NAMES = 'known.npy'


class TapeCache:
  """What the target said about rows that were read before."""

  def __init__(self, run):
    config, learner = run.config, run.learner
    if run.target is None or run.objective.rewrite is not None:
      raise ValueError(
        'tape_cache needs a target, and an objective that does not rewrite its batches'
      )
    self._mesh, self._target_params = run.mesh, run.target_params
    self._folder = pathlib.Path(config.tape_cache) / f'process_{jax.process_index()}'
    taps = tuple(f'layer_{tap}' for tap in dict.fromkeys(learner.taps))
    self._names = ('hidden', *taps)
    rows, length = run.corpus.tokens.shape
    shape = (rows, length, run.target.config.hidden_size)
    about = {
      'corpus': run.corpus.facts['signature'],
      'target': run.loaded.source.get('sha256') or run.config.target,
      'names': list(self._names),
      'dtype': str(run.dtype),
    }
    self._open(about, shape, run.dtype)

    def tape(target_params, batch):
      made = make_tape(learner.target(target_params), batch, learner.taps)
      return made.hidden, dict(made.taps)

    self._tape = jax.jit(tape, out_shardings=sharding.row_sharding(run.mesh))

  def _open(self, about, shape, dtype):
    """Opens the files, or starts anew where they are of something else."""
    path = self._folder / 'about.json'
    fresh = not path.exists() or json.loads(path.read_text()) != about
    self._folder.mkdir(parents=True, exist_ok=True)
    mode = 'w+' if fresh else 'r+'
    # NumPy has no bfloat16 of its own; the bits are kept as integers.
    stored = np.dtype(f'u{jnp.dtype(dtype).itemsize}')
    self._dtype = jnp.dtype(dtype)
    self._files = {
      name: np.memmap(self._folder / f'{name}.bin', stored, mode, shape=shape)
      for name in self._names
    }
    self._known = np.memmap(self._folder / _NAMES, np.bool_, mode, shape=shape[:1])
    if fresh:
      path.write_text(json.dumps(about))

  def features(self, ids: np.ndarray, batch):
    """Returns (hidden, taps) as global arrays of a batch, from disk where all rows are known.

    Args:
      ids: i64[B], this process's rows of the batch.
      batch: the whole batch on the mesh.
    """
    known = bool(self._known[ids].all())
    if jax.process_count() > 1:  # all processes must take the same way
      from jax.experimental import multihost_utils

      known = bool(np.all(multihost_utils.process_allgather(np.asarray(known))))
    if known:
      arrays = [np.asarray(self._files[name][ids]).view(self._dtype) for name in self._names]
      hidden, *taps = (sharding.to_mesh(each, self._mesh) for each in arrays)
      return hidden, dict(zip(self._names[1:], taps, strict=True))
    hidden, taps = self._tape(self._target_params, batch)
    for name, array in {'hidden': hidden, **taps}.items():
      self._files[name][ids] = _own_rows(array).view(self._files[name].dtype)
    for file in self._files.values():
      file.flush()
    self._known[ids] = True  # only when the rows are there
    self._known.flush()
    return hidden, taps


def _own_rows(array):
  """Returns this process's rows of a global array, in order, each once."""
  pieces = {}
  for shard in array.addressable_shards:
    pieces.setdefault(shard.index[0].start or 0, shard.data)
  return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

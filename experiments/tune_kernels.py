"""Finds the block sizes of block attention for the device it runs on, and prints the table's line.

    python -m experiments.tune_kernels

On a TPU: how many slots a step reads, and over how many splits. On a GPU: how many thread blocks
are wanted for each multiprocessor. Every candidate is timed on prefixes of 1k, 8k and 32k slots
with 1, 16 and 64 tokens, on a cache of 8 bits and in float32: one table serves all. The one with
the smallest geometric mean of times, each relative to the best of its problem, is printed as an
entry for `pallas_kernels/block_attention/block_sizes.py`.
"""

import argparse
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from experiments.kernel_problems import Attention
from experiments.kernel_problems import Problem
from experiments.kernel_problems import attention
from experiments.kernel_problems import fill
from experiments.timing import seconds_per_call
from pallas_kernels.block_attention import block_sizes

_SHAPES = [
  Attention(num_queries=num_queries, prefix=prefix)
  for prefix in (1024, 8192, 32768)
  for num_queries in (1, 16, 64)
]
_SHAPES += [
  Attention(num_queries=num_queries, **options)
  for options in (dict(cache_dtype=jnp.int8), dict(dtype=jnp.float32))
  for num_queries in (1, 16)
]
_TPU = list(itertools.product((128, 256, 512, 1024), (1, 2)))
_GPU = [1, 2, 3, 4]


def score(times: list[dict]) -> dict:
  """Returns for each candidate the geometric mean of its time over the best, by problem.

  Args:
    times: for each problem the seconds of every candidate; one that failed has infinity.
  """
  logs = dict.fromkeys(times[0], 0.0)
  for by_candidate in times:
    best = min(by_candidate.values())
    for candidate, seconds in by_candidate.items():
      logs[candidate] += math.log(seconds / best) / len(times)
  return {candidate: math.exp(mean) for candidate, mean in logs.items()}


def time_candidates(problem: Problem, table: dict, kind: str, candidates, repeats: int) -> dict:
  """Returns the seconds a call takes with each candidate in the table."""
  args, seconds = fill(problem), {}
  for candidate in candidates:
    table[kind] = candidate
    # A new function each time: the table is read when it is traced.
    run = functools.partial(problem.run, implementation=jax.default_backend())
    compiled = jax.jit(lambda queries, run=run: run(queries, *args[1:]))
    try:
      seconds[candidate] = seconds_per_call(compiled, args[0], repeats=repeats)
    except Exception as error:  # sizes that do not fit are not candidates
      print(f'{problem.name}, {candidate}: {" ".join(str(error).split())[:200]}')
      seconds[candidate] = math.inf
  table.pop(kind, None)
  return seconds


def main(argv=None) -> int:
  """Times every candidate and prints the best."""
  parser = argparse.ArgumentParser(
    description='Finds the block sizes of block attention for this device.'
  )
  parser.add_argument('--repeats', type=int, default=3)
  options = parser.parse_args(argv)
  backend, kind = jax.default_backend(), jax.devices()[0].device_kind
  if backend not in ('tpu', 'gpu'):
    print(f'Kernels run on a TPU or a GPU; this is {backend!r}.')
    return 2
  table = block_sizes.TPU_TABLE if backend == 'tpu' else block_sizes.GPU_TABLE
  candidates = _TPU if backend == 'tpu' else _GPU
  problems = [attention(shape) for shape in _SHAPES]
  times = [time_candidates(p, table, kind, candidates, options.repeats) for p in problems]
  scores = score(times)
  for candidate, mean in sorted(scores.items(), key=lambda item: item[1]):
    print(f'{candidate}: {mean:.3f} of the best')
  best = min(scores, key=scores.__getitem__)
  print(f'Entry of {"TPU" if backend == "tpu" else "GPU"}_TABLE:\n  {kind!r}: {best!r},')
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

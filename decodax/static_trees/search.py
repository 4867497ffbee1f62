"""What the builders share: best-first search, and times read off a cost curve.

Axes: `N` tree nodes, `D` depth, `R` ranks, `M` measured points.
"""

import heapq

import numpy as np

from decodax import theory
from decodax.static_trees.tree import MAX_NODES
from decodax.static_trees.tree import acceptance_table


def deep_table(acceptance: np.ndarray) -> np.ndarray:
  """Returns the acceptances as f64[D, R]."""
  table = acceptance_table(acceptance)
  if table.ndim != 2:
    raise ValueError(
      f'acceptance must be [D, R] by depth and rank, got {table.shape=}; np.tile(a, (depth, 1)) '
      'repeats one row for every depth.'
    )
  return table


def best_first(
  table: np.ndarray, num_nodes: int, block_size: int = 1, max_expanded: int | None = None
) -> list[tuple[int, ...]]:
  """Returns the `num_nodes` paths of largest value, largest first, parents before children."""
  if num_nodes > MAX_NODES:
    raise ValueError(f'A tree has at most {MAX_NODES} nodes, got {num_nodes=}.')
  heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
  paths = []
  num_expanded = np.zeros(table.shape[0] + 1, int)  # by depth
  while heap and len(paths) < num_nodes:
    value, depth, path = heapq.heappop(heap)
    paths.append(path)
    ends_block = depth % block_size == 0
    if ends_block and max_expanded is not None and num_expanded[depth] == max_expanded:
      continue
    num_expanded[depth] += 1
    if depth < table.shape[0]:
      for rank, factor in enumerate(table[depth]):
        heapq.heappush(heap, (value * float(factor), depth + 1, (*path, rank)))
  if len(paths) < num_nodes:
    raise ValueError(
      f'The table of {table.shape[0]} depths and {table.shape[1]} ranks holds only {len(paths)} '
      f'such nodes, got {num_nodes=}; ask for fewer or measure a larger table.'
    )
  return paths


def as_cost_curve(curve: theory.CostCurve) -> tuple[np.ndarray, np.ndarray]:
  """Returns (block sizes f64[M], times f64[M]) of a curve, once they have been checked."""
  sizes = np.asarray(curve.block_sizes, np.float64)
  times = np.asarray(curve.times_ms, np.float64)
  if sizes.ndim != 1 or sizes.shape != times.shape or not len(sizes):
    raise ValueError(
      'A cost curve has one time per block size, each [M]: got shapes '
      f'{sizes.shape} and {times.shape}.'
    )
  if sizes[0] != 1 or not (np.diff(sizes) > 0).all():
    raise ValueError(
      f'Block sizes must rise strictly from 1, which is plain decoding, got {sizes}.'
    )
  if not (np.isfinite(times) & (times > 0)).all():
    raise ValueError(f'Times must be positive milliseconds, got {times}.')
  return sizes, times


def call_times_ms(sizes: np.ndarray, times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Returns the times of calls on `wanted` tokens, read off a checked cost curve."""
  if wanted.max() > sizes[-1] or wanted.min() < sizes[0]:
    raise ValueError(
      f'The cost curve was measured from {sizes[0]:.0f} to {sizes[-1]:.0f} tokens, but a call on '
      f'{wanted.min():.0f} to {wanted.max():.0f} is to be judged; measure there or ask for less.'
    )
  return np.interp(wanted, sizes, times)

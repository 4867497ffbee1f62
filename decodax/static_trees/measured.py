"""The best shape for a measured acceptance, and pruning by what was observed.

Axes: `N` tree nodes, `D` depth, `K` children of a node, `R` ranks, `L` depth limits.
"""

from typing import NamedTuple

import numpy as np

from decodax import theory
from decodax.static_trees.search import as_cost_curve
from decodax.static_trees.search import best_first
from decodax.static_trees.search import call_times_ms
from decodax.static_trees.search import deep_table
from decodax.static_trees.tree import MAX_NODES
from decodax.static_trees.tree import StaticTree
from decodax.static_trees.tree import acceptance_table
from decodax.static_trees.tree import as_integer
from decodax.static_trees.tree import sorted_tree


def top_product(acceptance: np.ndarray, num_nodes: int) -> StaticTree:
  """Returns the `num_nodes` nodes of largest value: the best tree for candidates that are given.

  Suits heads that rank candidates per depth, where a candidate may be used without those ranked
  above it. Ties go to the shallower node, then to the smaller path.

  Args:
    acceptance: f[D, R], entry [d, r] the acceptance of the candidate of rank r at depth d + 1.
    num_nodes: N, the root included.

  Raises:
    ValueError: the table is none of probabilities, or holds fewer nodes than asked for.

  Source: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads,
  2401.10774, optimized tree construction.
  """
  num_nodes = as_integer('num_nodes', num_nodes, least=1)
  return sorted_tree(best_first(deep_table(acceptance), num_nodes))[0]


def sequoia(
  acceptance: np.ndarray,
  num_nodes: int,
  *,
  max_depth: int | None = None,
  max_children: int | None = None,
) -> StaticTree:
  """Returns the tree of `num_nodes` nodes with the most expected tokens, for sampled siblings.

  The b-th sibling is drafted only after those before it, so a node's children have the ranks
  0, 1, .., and the acceptance of a rank is that of the b-th trial. Dynamic programming over
  (nodes, depth, children) finds the optimum for any acceptance, rising ones included.

  Args:
    acceptance: f[R], entry b the probability that exactly the sibling b is kept. Measure it with
      the verifier, the temperature and the drafter it is meant for.
    num_nodes: N, the root included.
    max_depth: limit on D; None is no limit.
    max_children: limit on K, at most R; None is R.

  Raises:
    ValueError: the acceptance is none, or no tree of so many nodes fits the limits.

  Source: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, 2402.12374, tree
  construction by dynamic programming.
  """
  num_nodes = as_integer('num_nodes', num_nodes, least=1)
  values, splits = _sequoia_tables(acceptance, num_nodes, max_depth, max_children)
  if not np.isfinite(values[-1, :, num_nodes].max()):
    raise ValueError(
      f'No tree with {num_nodes=} fits {max_depth=} and {max_children=} with '
      f'{np.size(acceptance)} measured siblings; ask for fewer nodes or relax a limit.'
    )
  return sorted_tree(_sequoia_paths(values, splits, num_nodes, values.shape[0] - 1))[0]


class TreeChoice(NamedTuple):
  """A tree that was chosen for a machine."""

  tree: StaticTree
  expected_tokens: float  # per call of the target
  round_ms: float  # drafting and the target's call
  speedup: float  # over plain decoding on this machine


def best_sequoia(
  acceptance: np.ndarray,
  curve: theory.CostCurve,
  *,
  draft_step_ms: float,
  max_nodes: int | None = None,
  max_depth: int | None = None,
  max_children: int | None = None,
  overhead_ms: float = 0.0,
) -> TreeChoice:
  """Returns the Sequoia tree with the most tokens per second, with what it is expected to reach.

  Every size from 1 to `max_nodes` and every depth competes; one dynamic programme values them
  all. A depth costs one draft step. The root alone is plain decoding, so the speed-up is at
  least 1.

  Args:
    acceptance: f[R], as for `sequoia`.
    curve: measured time of a target call against the tokens it reads; it must start at 1.
    draft_step_ms: time of drafting one level of the tree.
    max_nodes: largest N to consider; None is the largest measured size or 256, if that is less.
    max_depth: limit on D; None is no limit.
    max_children: limit on K; None is R.
    overhead_ms: what else a speculative round costs.

  Raises:
    ValueError: the acceptance or the curve is none, the curve does not cover 1 to `max_nodes`, or
      a time is negative.

  Source: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, 2402.12374, the
  hardware-aware choice of size and depth.
  """
  sizes, times = as_cost_curve(curve)
  if max_nodes is None:
    max_nodes = min(int(sizes[-1]), 256)
  max_nodes = as_integer('max_nodes', max_nodes, least=1)
  for name, time in (('draft_step_ms', draft_step_ms), ('overhead_ms', overhead_ms)):
    if not time >= 0:
      raise ValueError(f'{name} must be a time of at least 0 ms, got {time}.')
  values, splits = _sequoia_tables(acceptance, max_nodes, max_depth, max_children)
  best = values.max(axis=1)  # [depth, nodes]
  call_ms = call_times_ms(sizes, times, np.arange(1, max_nodes + 1))
  depths = np.arange(best.shape[0])[:, None]
  round_ms = call_ms + np.where(depths > 0, depths * draft_step_ms + overhead_ms, 0.0)
  rate = best[:, 1:] / round_ms
  depth, index = (int(i) for i in np.unravel_index(np.argmax(rate), rate.shape))
  tree, _ = sorted_tree(_sequoia_paths(values, splits, index + 1, depth))
  return TreeChoice(
    tree=tree,
    expected_tokens=float(best[depth, index + 1]),
    round_ms=float(round_ms[depth, index]),
    speedup=float(rate[depth, index] * call_ms[0]),
  )


def prune(template: StaticTree, hits: np.ndarray, num_nodes: int) -> StaticTree:
  """Returns the `num_nodes` nodes of a large tree that were most often on the accepted path.

  Ranks stay those of the template, so a node keeps its meaning to the drafter. Ties go to the
  node that comes first in the template.

  Args:
    template: the tree that was decoded with.
    hits: i[N] or f[N], how often each of its nodes was accepted. A node is accepted only if its
      parent is, so counts never rise along a path. The root is kept whatever its count.
    num_nodes: nodes to keep, the root included.

  Raises:
    ValueError: the counts do not belong to the template, or `num_nodes` is out of range.

  Source: our own; the idea of pruning a template by its use is in Turning Trash into Treasure:
  Accelerating Inference of Large Language Models with Token Recycling, 2408.08696.
  """
  num_nodes = as_integer('num_nodes', num_nodes, least=1)
  hits = np.asarray(hits)
  if hits.shape != (template.num_nodes,):
    raise ValueError(
      f'There must be one count per node of the template, so shape ({template.num_nodes},), got '
      f'{hits.shape=}.'
    )
  if num_nodes > template.num_nodes:
    raise ValueError(f'The template has {template.num_nodes} nodes, cannot keep {num_nodes=}.')
  above = np.maximum(template.parents, 0)
  wrong = np.flatnonzero(~(hits <= hits[above]) & (template.parents > 0))
  if len(wrong) or not (hits >= 0).all():
    raise ValueError(
      'Counts must be at least 0 and never exceed those of the parent; count a node when the '
      f'accepted path goes through it, not only when it ends there. Nodes in doubt: {wrong[:5]}.'
    )
  order = np.argsort(-hits[1:].astype(np.float64), kind='stable') + 1
  kept = np.concatenate([[0], np.sort(order[: num_nodes - 1])])
  index = np.full(template.num_nodes + 1, -1)  # the last entry is the root's parent
  index[kept] = np.arange(num_nodes)
  return StaticTree(index[template.parents[kept]], template.ranks[kept])


def _sequoia_tables(
  acceptance: np.ndarray, num_nodes: int, max_depth: int | None, max_children: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Optimal values f64[L, K + 1, N + 1] and splits i32[L, K + 1, N + 1] of the same.

  Entry [l, b, m] of the values is the most expected tokens of a tree with exactly m nodes, depth
  at most l and b children of its root, -inf if there is none; of the splits, how many of those m
  nodes remain once the last child and all below it are taken away. Depths beyond which nothing
  improves are left out.
  """
  table = acceptance_table(acceptance)
  if table.ndim != 1:
    raise ValueError(f'acceptance must be [R], one entry per sibling, got {table.shape=}.')
  if num_nodes > MAX_NODES:
    raise ValueError(f'A tree has at most {MAX_NODES} nodes, got {num_nodes=}.')
  max_depth = num_nodes - 1 if max_depth is None else as_integer('max_depth', max_depth, least=0)
  if max_children is None:
    max_children = len(table)
  max_children = as_integer('max_children', max_children, least=1)
  if max_children > len(table):
    raise ValueError(
      f'{max_children=} needs as many measured siblings, got {len(table)}; lower it or measure a '
      'wider star.'
    )
  num_children = min(max_children, max(num_nodes - 1, 1))
  shape = (num_children + 1, num_nodes + 1)
  values, splits = [np.full(shape, -np.inf)], [np.zeros(shape, np.int32)]
  values[0][0, 1] = 1.0
  subtree = values[0].max(axis=0)
  for _ in range(min(max_depth, num_nodes - 1)):
    value, split = np.full(shape, -np.inf), np.zeros(shape, np.int32)
    value[0, 1] = 1.0
    feasible = np.isfinite(subtree)
    for b in range(1, num_children + 1):
      gained = np.where(feasible, table[b - 1] * np.where(feasible, subtree, 0.0), -np.inf)
      value[b], split[b] = _max_plus(value[b - 1], gained)
    best = value.max(axis=0)
    if np.array_equal(best, subtree):
      break
    subtree = best
    values.append(value)
    splits.append(split)
  return np.stack(values), np.stack(splits)


def _max_plus(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """max over y of left[y] + right[m - y], for all m, and the largest y that attains it."""
  last = len(left) - 1
  padded = np.concatenate([np.full(last, -np.inf), right])
  sums = left[::-1] + np.lib.stride_tricks.sliding_window_view(padded, last + 1)
  best = sums.argmax(axis=1)
  return sums[np.arange(last + 1), best], last - best


def _sequoia_paths(
  values: np.ndarray, splits: np.ndarray, num_nodes: int, depth: int
) -> list[tuple[int, ...]]:
  """The paths of the best tree with `num_nodes` nodes and at most `depth`, from the tables."""
  paths = []
  stack: list[tuple[tuple[int, ...], int, int]] = [((), num_nodes, depth)]
  while stack:
    path, size, depth = stack.pop()
    paths.append(path)
    for child in range(int(values[depth, :, size].argmax()), 0, -1):
      rest = int(splits[depth, child, size])
      stack.append(((*path, child - 1), size - rest, depth - 1))
      size = rest
  return paths

"""The shape of a static tree, its checks and its values.

Axes: `N` tree nodes, the root included, `D` depth, `K` children of a node, `R` ranks.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
import operator

import numpy as np

MAX_NODES = 4096  # of a builder; with so many, an ancestor mask takes 16 MiB


@dataclasses.dataclass(frozen=True, eq=False)
class StaticTree:
  """A draft tree's shape. Trees compare and hash by value, so one can be a static jit argument.

  Nodes come breadth-first, siblings in draft order, and the arrays are read-only.

  Raises:
    ValueError: the arrays describe no tree, or one in another order.
  """

  parents: np.ndarray  # i32[N] -1 at the root, which is node 0; else parents[i] < i
  ranks: np.ndarray  # i32[N] which candidate of its parent a node is, from 0; 0 at the root

  def __post_init__(self):
    for name in ('parents', 'ranks'):
      given = np.asarray(getattr(self, name))
      array = given.astype(np.int32)
      if (array != given).any():
        raise ValueError(f'{name} must hold integers, got {given}.')
      object.__setattr__(self, name, frozen(array))
    _check_tree(self.parents, self.ranks)

  def __eq__(self, other) -> bool:
    if not isinstance(other, StaticTree):
      return NotImplemented
    return np.array_equal(self.parents, other.parents) and np.array_equal(self.ranks, other.ranks)

  def __hash__(self) -> int:
    return hash((self.parents.tobytes(), self.ranks.tobytes()))

  def __repr__(self) -> str:
    return f'StaticTree(num_nodes={self.num_nodes}, max_depth={self.max_depth})'

  @property
  def num_nodes(self) -> int:
    """N, the root included."""
    return len(self.parents)

  @functools.cached_property
  def depths(self) -> np.ndarray:
    """i32[N], edges between the root and each node."""
    depths = np.zeros(self.num_nodes, np.int32)
    for node in range(1, self.num_nodes):
      depths[node] = depths[self.parents[node]] + 1
    return frozen(depths)

  @property
  def max_depth(self) -> int:
    """D, the most draft tokens that one call can accept."""
    return int(self.depths[-1])

  @functools.cached_property
  def children(self) -> np.ndarray:
    """i32[N, K], each node's children in draft order, padded with -1."""
    num_children = np.bincount(self.parents[1:], minlength=self.num_nodes)
    children = np.full((self.num_nodes, int(num_children.max())), -1, np.int32)
    # Siblings are consecutive, so the first of them tells the place of the others.
    nodes = np.arange(1, self.num_nodes)
    first = np.searchsorted(self.parents[1:], self.parents[1:]) + 1
    children[self.parents[1:], nodes - first] = nodes
    return frozen(children)

  @functools.cached_property
  def ancestors(self) -> np.ndarray:
    """bool[N, N], whether node j is i or above it: what i may attend to within the block."""
    ancestors = np.eye(self.num_nodes, dtype=bool)
    for node in range(1, self.num_nodes):
      ancestors[node] |= ancestors[self.parents[node]]
    return frozen(ancestors)

  @functools.cached_property
  def paths(self) -> tuple[tuple[int, ...], ...]:
    """Each node's ranks from the root's child down to itself; () for the root."""
    paths: list[tuple[int, ...]] = [()]
    for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
      paths.append((*paths[parent], int(rank)))
    return tuple(paths)

  def candidate_slots(self, num_candidates: int) -> np.ndarray:
    """Returns i32[N], each node's place in [root, candidates of depth 1, candidates of depth 2, ..]

    Args:
      num_candidates: candidates per depth in that flat list, as many as the largest rank needs.

    Raises:
      ValueError: a node's rank is beyond `num_candidates`.

    Source: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads,
    2401.10774, tree attention.
    """
    largest = int(self.ranks.max())
    if largest >= num_candidates:
      raise ValueError(
        f'The tree uses the candidate of rank {largest}, so it needs at least {largest + 1} '
        f'candidates per depth, got {num_candidates=}.'
      )
    slots = 1 + (self.depths - 1) * num_candidates + self.ranks
    return np.where(self.depths == 0, 0, slots).astype(np.int32)


def chain(length: int) -> StaticTree:
  """Returns the tree of a single path of `length` draft tokens; 0 is the root alone.

  Raises:
    ValueError: `length` is no integer of at least 0.
  """
  length = as_integer('length', length, least=0)
  return StaticTree(np.arange(-1, length), np.zeros(length + 1))


def kary(branching: Sequence[int]) -> StaticTree:
  """Returns the tree in which every node at depth d has `branching[d]` children.

  Args:
    branching: children per node, from the root down; () is the root alone.

  Raises:
    ValueError: an entry is no positive integer, or there would be more than `MAX_NODES` nodes.

  Source: Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without
  Replacement, 2402.14160, trees with constant branching per level.
  """
  factors = [as_integer(f'branching[{i}]', b, least=1) for i, b in enumerate(branching)]
  widths = list(itertools.accumulate(factors, operator.mul, initial=1))
  if sum(widths) > MAX_NODES:
    raise ValueError(
      f'branching={tuple(factors)} makes {sum(widths)} nodes, more than {MAX_NODES}; choose '
      'smaller factors or fewer of them.'
    )
  parents, ranks = [-1], [0]
  first = 0
  for width, factor in zip(widths, factors, strict=False):
    parents.extend(np.repeat(np.arange(first, first + width), factor))
    ranks.extend(np.tile(np.arange(factor), width))
    first += width
  return StaticTree(np.array(parents), np.array(ranks))


def from_paths(choices: Iterable[Sequence[int]], *, duplicates: str = 'refuse') -> StaticTree:
  """Returns the tree with one node per path of ranks, such as (0,), (1,), (0, 0); any order.

  The root is implied and may be listed as ().

  Args:
    choices: the paths; every path needs its parent, which is the path without its last rank.
    duplicates: 'refuse' raises if a path comes twice, 'remove' keeps one.

  Raises:
    ValueError: a rank is no integer of at least 0, a parent is missing, or a path comes twice.

  Source: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads,
  2401.10774, sparse trees.
  """
  if duplicates not in ('refuse', 'remove'):
    raise ValueError(f"duplicates must be 'refuse' or 'remove', got {duplicates=}.")
  listed = [tuple(as_integer(f'a rank of {tuple(c)}', r, least=0) for r in c) for c in choices]
  paths = {(), *listed}
  if duplicates == 'refuse' and len(set(listed)) < len(listed):
    twice = next(path for i, path in enumerate(listed) if path in listed[:i])
    raise ValueError(
      f"Path {twice} is listed twice; drop one, or pass duplicates='remove' to keep one of each."
    )
  orphan = next((path for path in sorted(paths) if path and path[:-1] not in paths), None)
  if orphan:
    raise ValueError(f'Path {orphan} needs its parent {orphan[:-1]}; add it to the choices.')
  return sorted_tree(list(paths))[0]


def node_acceptance(tree: StaticTree, acceptance: np.ndarray) -> np.ndarray:
  """Returns f64[N], the acceptance of each node under a table; 1 at the root.

  Args:
    tree: the tree.
    acceptance: f[R] by rank, the same at every depth, or f[D, R], row d for depth d + 1.

  Raises:
    ValueError: the table is none of probabilities, or does not reach the tree's depth or ranks.
  """
  table = acceptance_table(acceptance)
  if table.ndim == 1:
    table = np.broadcast_to(table, (max(tree.max_depth, 1), table.size))
  if tree.max_depth > table.shape[0] or tree.ranks.max() >= table.shape[1]:
    raise ValueError(
      f'The tree has depth {tree.max_depth} and ranks up to {tree.ranks.max()}, but the table '
      f'covers depth {table.shape[0]} and ranks below {table.shape[1]}; measure a larger table.'
    )
  values = table[np.maximum(tree.depths - 1, 0), tree.ranks]
  return np.where(tree.depths == 0, 1.0, values)


def node_values(tree: StaticTree, acceptance: np.ndarray) -> np.ndarray:
  """Returns f64[N], the probability that each node is on the accepted path.

  Args:
    tree: the tree.
    acceptance: f[R] or f[D, R], as for `node_acceptance`.

  Raises:
    ValueError: as `node_acceptance`.
  """
  values = node_acceptance(tree, acceptance)
  for node in range(1, tree.num_nodes):
    values[node] *= values[tree.parents[node]]
  return values


def frozen(array: np.ndarray) -> np.ndarray:
  """Returns the array itself, read-only from now on."""
  array.flags.writeable = False
  return array


def as_integer(name: str, value, *, least: int) -> int:
  """Returns the value as an int, once it is known to be one that is large enough."""
  try:
    number = operator.index(value)
  except TypeError:
    number = None
  if number is None or isinstance(value, bool) or number < least:
    raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')
  return number


def _check_tree(parents: np.ndarray, ranks: np.ndarray) -> None:
  mend = 'from_paths builds and sorts a tree from any list of paths.'
  if parents.ndim != 1 or parents.shape != ranks.shape or not len(parents):
    raise ValueError(
      f'parents and ranks must be i32[N] with N at least 1: got {parents.shape=} and '
      f'{ranks.shape=}. {mend}'
    )
  if parents[0] != -1 or ranks[0] != 0:
    raise ValueError(
      f'Node 0 must be the root, with parent -1 and rank 0: got {parents[0]} and {ranks[0]}. {mend}'
    )
  late = np.flatnonzero((parents[1:] < 0) | (parents[1:] > np.arange(len(parents) - 1))) + 1
  if len(late):
    raise ValueError(
      f'Every node but the root needs a parent before it; nodes {late[:5]} have none. {mend}'
    )
  same_parent = parents[2:] == parents[1:-1]
  unsorted = (parents[2:] < parents[1:-1]) | (same_parent & (ranks[2:] <= ranks[1:-1]))
  if unsorted.any() or (ranks < 0).any():
    raise ValueError(
      'Nodes must come breadth-first and siblings by strictly rising ranks of at least 0; look at '
      f'nodes {(np.flatnonzero(unsorted) + 2)[:5]}. {mend}'
    )


def sorted_tree(paths: Sequence[tuple[int, ...]]) -> tuple[StaticTree, np.ndarray]:
  """Returns the tree of paths that hold their parents once each, and where each node's path was."""
  order = sorted(range(len(paths)), key=lambda i: (len(paths[i]), paths[i]))
  index = {paths[i]: node for node, i in enumerate(order)}
  parents = [index[paths[i][:-1]] if paths[i] else -1 for i in order]
  ranks = [paths[i][-1] if paths[i] else 0 for i in order]
  return StaticTree(np.array(parents), np.array(ranks)), np.array(order)


def acceptance_table(acceptance: np.ndarray) -> np.ndarray:
  """Returns the acceptances as f64[R] or f64[D, R]."""
  table = np.asarray(acceptance, np.float64)
  if table.ndim not in (1, 2) or not table.size:
    raise ValueError(
      f'acceptance must be [R] by rank or [D, R] by depth and rank, got {table.shape=}.'
    )
  if not ((table >= 0) & (table <= 1)).all():
    raise ValueError(
      f'acceptance must hold probabilities, got values from {table.min()} to {table.max()}.'
    )
  largest = table.sum(axis=-1).max()
  if largest > 1 + 1e-5:
    raise ValueError(
      'acceptance must hold the probability that exactly this sibling is kept, so siblings add up '
      f'to at most 1, got {largest}. Probabilities given that the siblings before were refused '
      'must be multiplied by the probability of that.'
    )
  return table

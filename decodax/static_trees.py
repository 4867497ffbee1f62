"""Draft trees whose shape is fixed before decoding, and builders that choose the shape.

Axes: `N` tree nodes, the root included, `D` depth, `K` children of a node, `R` ranks, `W` widths,
`M` prompt tokens of a node, `V` vocabulary.

Everything here runs once, on the host, in NumPy; the result is a constant of the compiled program.
A node of *rank* r is the r-th candidate, counted from 0, that the drafter offers after its parent.
A node's *acceptance* is the probability that this very child is the one that is kept, given that
its parent was reached; siblings exclude one another, so theirs add up to at most 1. A *node value*
is the product of the acceptances along the path to it, and the sum of the node values is the
expected number of emitted tokens per call of the target, the root counting for the token that
every call yields.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import heapq
import itertools
import operator
from typing import NamedTuple

import numpy as np

from decodax import theory

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
      object.__setattr__(self, name, _frozen(array))
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
    return _frozen(depths)

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
    return _frozen(children)

  @functools.cached_property
  def ancestors(self) -> np.ndarray:
    """bool[N, N], whether node j is i or above it: what i may attend to within the block."""
    ancestors = np.eye(self.num_nodes, dtype=bool)
    for node in range(1, self.num_nodes):
      ancestors[node] |= ancestors[self.parents[node]]
    return _frozen(ancestors)

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


# --- Given shapes ------------------------------------------------------------------------------


def chain(length: int) -> StaticTree:
  """Returns the tree of a single path of `length` draft tokens; 0 is the root alone.

  Raises:
    ValueError: `length` is no integer of at least 0.
  """
  length = _integer('length', length, least=0)
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
  factors = [_integer(f'branching[{i}]', b, least=1) for i, b in enumerate(branching)]
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
  listed = [tuple(_integer(f'a rank of {tuple(c)}', r, least=0) for r in c) for c in choices]
  paths = {(), *listed}
  if duplicates == 'refuse' and len(set(listed)) < len(listed):
    twice = next(path for i, path in enumerate(listed) if path in listed[:i])
    raise ValueError(
      f"Path {twice} is listed twice; drop one, or pass duplicates='remove' to keep one of each."
    )
  orphan = next((path for path in sorted(paths) if path and path[:-1] not in paths), None)
  if orphan:
    raise ValueError(f'Path {orphan} needs its parent {orphan[:-1]}; add it to the choices.')
  return _from_paths(list(paths))[0]


# --- Values ------------------------------------------------------------------------------------


def node_acceptance(tree: StaticTree, acceptance: np.ndarray) -> np.ndarray:
  """Returns f64[N], the acceptance of each node under a table; 1 at the root.

  Args:
    tree: the tree.
    acceptance: f[R] by rank, the same at every depth, or f[D, R], row d for depth d + 1.

  Raises:
    ValueError: the table is none of probabilities, or does not reach the tree's depth or ranks.
  """
  table = _acceptance_table(acceptance)
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


# --- The best shape for a measured acceptance --------------------------------------------------


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
  num_nodes = _integer('num_nodes', num_nodes, least=1)
  return _from_paths(_best_first(_deep_table(acceptance), num_nodes))[0]


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
  num_nodes = _integer('num_nodes', num_nodes, least=1)
  values, splits = _sequoia_tables(acceptance, num_nodes, max_depth, max_children)
  if not np.isfinite(values[-1, :, num_nodes].max()):
    raise ValueError(
      f'No tree with {num_nodes=} fits {max_depth=} and {max_children=} with '
      f'{np.size(acceptance)} measured siblings; ask for fewer nodes or relax a limit.'
    )
  return _from_paths(_sequoia_paths(values, splits, num_nodes, values.shape[0] - 1))[0]


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
  sizes, times = _cost_curve(curve)
  if max_nodes is None:
    max_nodes = min(int(sizes[-1]), 256)
  max_nodes = _integer('max_nodes', max_nodes, least=1)
  for name, time in (('draft_step_ms', draft_step_ms), ('overhead_ms', overhead_ms)):
    if not time >= 0:
      raise ValueError(f'{name} must be a time of at least 0 ms, got {time}.')
  values, splits = _sequoia_tables(acceptance, max_nodes, max_depth, max_children)
  best = values.max(axis=1)  # [depth, nodes]
  call_ms = _call_ms(sizes, times, np.arange(1, max_nodes + 1))
  depths = np.arange(best.shape[0])[:, None]
  round_ms = call_ms + np.where(depths > 0, depths * draft_step_ms + overhead_ms, 0.0)
  rate = best[:, 1:] / round_ms
  depth, index = (int(i) for i in np.unravel_index(np.argmax(rate), rate.shape))
  tree, _ = _from_paths(_sequoia_paths(values, splits, index + 1, depth))
  return TreeChoice(
    tree=tree,
    expected_tokens=float(best[depth, index + 1]),
    round_ms=float(round_ms[depth, index]),
    speedup=float(rate[depth, index] * call_ms[0]),
  )


# --- Trees that carry their own drafter --------------------------------------------------------


class PromptTrees(NamedTuple):
  """One tree per number of prompt tokens that the last round left behind, for one input budget.

  In state m the drafter offers candidates for the next m depths. Where a round ends, the node's
  prompt tokens decide the next state.
  """

  trees: tuple[StaticTree, ...]  # M + 1 of them; tree m has depth at most m
  num_prompts: tuple[np.ndarray, ...]  # each i32[N], prompt tokens behind each node, 0 .. M
  transitions: np.ndarray  # f64[M + 1, M + 1] entry [d, m]: probability of state m after d
  expected_tokens: np.ndarray  # f64[M + 1] per call, in each state
  value: float  # long-run tokens per call, starting in state 0
  num_inputs: int  # the budget: no state has more nodes and prompt tokens together


def ppd(acceptance: np.ndarray, num_inputs: int, *, max_prompts: int = 3) -> PromptTrees:
  """Returns the trees and prompt tokens with the most tokens per call, long-run, for a budget.

  As in the paper, the tree of a state is the best by product of acceptances, a node may be
  followed by prompt tokens that draft for the next round, and both share the budget. Where the
  paper removes prompt tokens one by one by their immediate loss and searches tree sizes on a
  grid, here the sizes and the prompts of all states are solved together as an average-reward
  decision process (policy iteration, with an exact knapsack inside), so the value is the highest
  that such trees can have and never falls with the budget.

  Args:
    acceptance: f[D, R], entry [d, r] the acceptance of the candidate of rank r that the prompt
      token at distance d + 1 gives, D at least `max_prompts`.
    num_inputs: nodes and prompt tokens of a round, the root included.
    max_prompts: M, prompt tokens that a node may carry, at least 1.

  Raises:
    ValueError: the table is none of probabilities or too shallow, or a number is too small.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the dynamic sparse tree.
  """
  max_prompts = _integer('max_prompts', max_prompts, least=1)
  num_inputs = _integer('num_inputs', num_inputs, least=1)
  table = _deep_table(acceptance)
  if table.shape[0] < max_prompts:
    raise ValueError(
      f'{max_prompts=} needs acceptances for as many depths, got {table.shape=}; lower '
      'max_prompts or measure more depths.'
    )
  states = [_prompt_state(table[:depth], num_inputs) for depth in range(max_prompts + 1)]
  worth = np.arange(max_prompts + 1.0)  # of leaving so many prompt tokens behind
  policy = [_best_action(state, worth, num_inputs) for state in states]
  for _ in range(64):
    transitions, tokens, gain, bias = _evaluate(states, policy)
    # The gain counts before the bias; it differs between states only if they never meet.
    worth = bias + 1e6 * (gain - gain.max())
    improved = [_best_action(state, worth, num_inputs) for state in states]
    if all(map(np.array_equal, improved, policy)):
      break
    policy = improved
  transitions, tokens, gain, _ = _evaluate(states, policy)
  trees, num_prompts = [], []
  for state, prompts in zip(states, policy, strict=True):
    tree, order = _from_paths(state.paths[: len(prompts)])
    trees.append(tree)
    num_prompts.append(_frozen(prompts[order]))
  return PromptTrees(
    trees=tuple(trees),
    num_prompts=tuple(num_prompts),
    transitions=_frozen(transitions),
    expected_tokens=_frozen(tokens),
    value=float(gain[0]),
    num_inputs=num_inputs,
  )


class PromptChoice(NamedTuple):
  """Prompt trees that were chosen for a machine."""

  trees: PromptTrees
  round_ms: float  # a call at the full input budget, whatever the state
  speedup: float  # over plain decoding on this machine


def best_ppd(
  acceptance: np.ndarray,
  curve: theory.CostCurve,
  *,
  max_prompts: int = 3,
  budgets: Sequence[int] | None = None,
) -> PromptChoice:
  """Returns the prompt trees of the input budget with the most tokens per second.

  Args:
    acceptance: f[D, R], as for `ppd`.
    curve: measured time of a target call against the tokens it reads; it must start at 1.
    max_prompts: M, prompt tokens that a node may carry.
    budgets: input budgets to consider; None is every measured width.

  Raises:
    ValueError: as `ppd`, or the curve is none, or it does not cover the budgets.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the hardware-aware choice of the tree size.
  """
  sizes, times = _cost_curve(curve)
  if budgets is None:
    budgets = [int(size) for size in sizes if size == int(size)]
  if not len(budgets):
    raise ValueError('budgets must name at least one input budget, got none.')
  call_ms = _call_ms(sizes, times, np.asarray(budgets, float))
  plain_ms = float(_call_ms(sizes, times, np.ones(1))[0])
  choices = []
  for budget, round_ms in zip(budgets, call_ms, strict=True):
    trees = ppd(acceptance, budget, max_prompts=max_prompts)
    choices.append(PromptChoice(trees, float(round_ms), trees.value * plain_ms / float(round_ms)))
  return max(choices, key=lambda choice: choice.speedup)


# --- Drafters that fill several levels at once -------------------------------------------------


class BlockTree(NamedTuple):
  """A tree for a drafter whose every forward pass fills the next `block_size` depths."""

  tree: StaticTree
  block_size: int
  forwards: np.ndarray  # i32[N] the forward pass that fills a node; -1 at the root
  rows: np.ndarray  # i32[N] which of its `block_size` positions does; -1 at the root
  sources: np.ndarray  # i32[N] the node that pass continues from; -1 at the root

  def expanded(self, forward: int) -> np.ndarray:
    """Returns i32[*], the nodes that forward pass `forward` must continue from, ascending."""
    return np.unique(self.sources[self.forwards == forward])


def in_blocks(tree: StaticTree, block_size: int) -> BlockTree:
  """Returns the tree with, for each node, where in the drafter's output its token is found.

  All nodes that one pass fills from the same source, at the same row, share one list of
  candidates: within a block the rows do not see one another.

  Args:
    tree: any tree; a depth that is no multiple of `block_size` leaves rows unused.
    block_size: depths that one pass fills, at least 1.

  Raises:
    ValueError: `block_size` is no positive integer.

  Source: Falcon: Faster and Parallel Inference of Large Language Models through Enhanced
  Semi-Autoregressive Drafting and Custom-Designed Decoding Tree, 2412.12639, the decoding tree.
  """
  block_size = _integer('block_size', block_size, least=1)
  forwards = (tree.depths - 1) // block_size
  rows = (tree.depths - 1) % block_size
  rows[0] = -1
  sources = np.full(tree.num_nodes, -1, np.int32)
  for node in range(1, tree.num_nodes):
    parent = tree.parents[node]
    sources[node] = parent if rows[node] == 0 else sources[parent]
  return BlockTree(tree, block_size, _frozen(forwards), _frozen(rows), _frozen(sources))


def falcon(
  acceptance: np.ndarray, num_nodes: int, block_size: int, *, max_expanded: int | None = None
) -> BlockTree:
  """Returns the best tree for a drafter that fills `block_size` depths per forward pass.

  The nodes of largest value, as in `top_product`, but only the `max_expanded` best nodes at the
  end of each block are continued, which bounds the width of the next draft pass.

  Args:
    acceptance: f[D, R], entry [d, r] the acceptance of the candidate of rank r at depth d + 1.
    num_nodes: N, the root included.
    block_size: depths that one pass fills, at least 1.
    max_expanded: nodes that one draft pass may continue from; None is no limit.

  Raises:
    ValueError: the table is none of probabilities, a number is too small, or the limits leave
      fewer nodes than asked for.

  Source: Falcon: Faster and Parallel Inference of Large Language Models through Enhanced
  Semi-Autoregressive Drafting and Custom-Designed Decoding Tree, 2412.12639, the decoding tree.
  """
  num_nodes = _integer('num_nodes', num_nodes, least=1)
  block_size = _integer('block_size', block_size, least=1)
  if max_expanded is not None:
    max_expanded = _integer('max_expanded', max_expanded, least=1)
  paths = _best_first(_deep_table(acceptance), num_nodes, block_size, max_expanded)
  return in_blocks(_from_paths(paths)[0], block_size)


# --- From what was observed --------------------------------------------------------------------


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
  num_nodes = _integer('num_nodes', num_nodes, least=1)
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


# --- Shared pieces -----------------------------------------------------------------------------


def _frozen(array: np.ndarray) -> np.ndarray:
  array.flags.writeable = False
  return array


def _integer(name: str, value, *, least: int) -> int:
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


def _from_paths(paths: Sequence[tuple[int, ...]]) -> tuple[StaticTree, np.ndarray]:
  """The tree of paths that hold their parents once each, and where each node's path was."""
  order = sorted(range(len(paths)), key=lambda i: (len(paths[i]), paths[i]))
  index = {paths[i]: node for node, i in enumerate(order)}
  parents = [index[paths[i][:-1]] if paths[i] else -1 for i in order]
  ranks = [paths[i][-1] if paths[i] else 0 for i in order]
  return StaticTree(np.array(parents), np.array(ranks)), np.array(order)


def _acceptance_table(acceptance: np.ndarray) -> np.ndarray:
  """The acceptances as f64[R] or f64[D, R]."""
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


def _deep_table(acceptance: np.ndarray) -> np.ndarray:
  table = _acceptance_table(acceptance)
  if table.ndim != 2:
    raise ValueError(
      f'acceptance must be [D, R] by depth and rank, got {table.shape=}; np.tile(a, (depth, 1)) '
      'repeats one row for every depth.'
    )
  return table


def _best_first(
  table: np.ndarray, num_nodes: int, block_size: int = 1, max_expanded: int | None = None
) -> list[tuple[int, ...]]:
  """The `num_nodes` paths of largest value, largest first, parents before children."""
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


def _sequoia_tables(
  acceptance: np.ndarray, num_nodes: int, max_depth: int | None, max_children: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Optimal values f64[L, K + 1, N + 1] and splits i32[L, K + 1, N + 1] of the same.

  Entry [l, b, m] of the values is the most expected tokens of a tree with exactly m nodes, depth
  at most l and b children of its root, -inf if there is none; of the splits, how many of those m
  nodes remain once the last child and all below it are taken away. Depths beyond which nothing
  improves are left out.
  """
  table = _acceptance_table(acceptance)
  if table.ndim != 1:
    raise ValueError(f'acceptance must be [R], one entry per sibling, got {table.shape=}.')
  if num_nodes > MAX_NODES:
    raise ValueError(f'A tree has at most {MAX_NODES} nodes, got {num_nodes=}.')
  max_depth = num_nodes - 1 if max_depth is None else _integer('max_depth', max_depth, least=0)
  if max_children is None:
    max_children = len(table)
  max_children = _integer('max_children', max_children, least=1)
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


def _cost_curve(curve: theory.CostCurve) -> tuple[np.ndarray, np.ndarray]:
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


def _call_ms(sizes: np.ndarray, times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  if wanted.max() > sizes[-1] or wanted.min() < sizes[0]:
    raise ValueError(
      f'The cost curve was measured from {sizes[0]:.0f} to {sizes[-1]:.0f} tokens, but a call on '
      f'{wanted.min():.0f} to {wanted.max():.0f} is to be judged; measure there or ask for less.'
    )
  return np.interp(wanted, sizes, times)


class _PromptState(NamedTuple):
  """The trees that a state may choose: the first n of `paths`, for every n."""

  paths: list[tuple[int, ...]]  # best first
  tokens: np.ndarray  # f64[C] expected tokens per call of the tree of n = 1 .. C nodes
  endings: np.ndarray  # f64[C, C] row n - 1: the probability that its round ends at each node


def _prompt_state(table: np.ndarray, num_inputs: int) -> _PromptState:
  capacity = sum(table.shape[1] ** depth for depth in range(table.shape[0] + 1))
  paths = _best_first(table, min(num_inputs, capacity))
  index = {path: node for node, path in enumerate(paths)}
  values = np.ones(len(paths))
  endings = np.zeros((len(paths), len(paths)))
  endings[:, 0] = 1.0
  for node, path in enumerate(paths[1:], start=1):
    parent = index[path[:-1]]
    values[node] = values[parent] * table[len(path) - 1, path[-1]]
    # In every tree that holds the node, the rounds that reach it no longer end at its parent.
    endings[node:, node] += values[node]
    endings[node:, parent] -= values[node]
  return _PromptState(paths, np.cumsum(values), np.maximum(endings, 0.0))


def _best_action(state: _PromptState, worth: np.ndarray, num_inputs: int) -> np.ndarray:
  """i32[n], the prompt tokens of each node of the best tree; ending with m is worth `worth[m]`.

  One exact knapsack over the nodes, for all tree sizes at once: entry [n - 1, c] is the most that
  the nodes so far can be worth with c prompt tokens among them.
  """
  num_options = len(state.tokens)
  total = np.zeros((num_options, num_inputs))
  choices = []
  for node in range(num_options):
    ending = state.endings[:, node, None]
    best, choice = total + ending * worth[0], np.zeros(total.shape, np.int32)
    for prompts in range(1, min(len(worth), num_inputs)):
      more = np.full(total.shape, -np.inf)
      more[:, prompts:] = total[:, :-prompts] + ending * worth[prompts]
      choice[more > best] = prompts
      best = np.maximum(best, more)
    total = best
    choices.append(choice)
  left = num_inputs - 1 - np.arange(num_options)  # for prompt tokens, after the nodes
  size = int(np.argmax(state.tokens + total[np.arange(num_options), left])) + 1
  remaining = num_inputs - size
  prompts = np.zeros(size, np.int32)
  for node in reversed(range(num_options)):
    taken = int(choices[node][size - 1, remaining])
    remaining -= taken
    if node < size:
      prompts[node] = taken
  return prompts


def _evaluate(
  states: list[_PromptState], policy: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Transitions, expected tokens, long-run gain per call and bias of a policy, by state."""
  count = len(states)
  transitions = np.zeros((count, count))
  for state, prompts, row in zip(states, policy, transitions, strict=True):
    size = len(prompts)
    np.add.at(row, prompts, state.endings[size - 1, :size])
  transitions /= transitions.sum(axis=1, keepdims=True)
  tokens = np.array([s.tokens[len(a) - 1] for s, a in zip(states, policy, strict=True)])
  # Where the chain is in the long run, from each state: a power of the chain that rests half of
  # the time, which converges even if the chain itself is periodic.
  limit = (transitions + np.eye(count)) / 2
  for _ in range(64):
    limit = limit @ limit
    limit /= limit.sum(axis=1, keepdims=True)
  gain = limit @ tokens
  bias = np.linalg.solve(np.eye(count) - transitions + limit, tokens - gain)
  return transitions, tokens, gain, bias

"""Trees for drafters that fill several levels at once.

Axes: `N` tree nodes, `D` depth, `R` ranks.
"""

from typing import NamedTuple

import numpy as np

from decodax.static_trees.search import best_first
from decodax.static_trees.search import deep_table
from decodax.static_trees.tree import StaticTree
from decodax.static_trees.tree import as_integer
from decodax.static_trees.tree import frozen
from decodax.static_trees.tree import sorted_tree


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
  block_size = as_integer('block_size', block_size, least=1)
  forwards = (tree.depths - 1) // block_size
  rows = (tree.depths - 1) % block_size
  rows[0] = -1
  sources = np.full(tree.num_nodes, -1, np.int32)
  for node in range(1, tree.num_nodes):
    parent = tree.parents[node]
    sources[node] = parent if rows[node] == 0 else sources[parent]
  return BlockTree(tree, block_size, frozen(forwards), frozen(rows), frozen(sources))


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
  num_nodes = as_integer('num_nodes', num_nodes, least=1)
  block_size = as_integer('block_size', block_size, least=1)
  if max_expanded is not None:
    max_expanded = as_integer('max_expanded', max_expanded, least=1)
  paths = best_first(deep_table(acceptance), num_nodes, block_size, max_expanded)
  return in_blocks(sorted_tree(paths)[0], block_size)

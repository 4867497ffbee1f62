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

from decodax.static_trees.blocks import BlockTree
from decodax.static_trees.blocks import falcon
from decodax.static_trees.blocks import in_blocks
from decodax.static_trees.measured import TreeChoice
from decodax.static_trees.measured import best_sequoia
from decodax.static_trees.measured import prune
from decodax.static_trees.measured import sequoia
from decodax.static_trees.measured import top_product
from decodax.static_trees.prompts import PromptChoice
from decodax.static_trees.prompts import PromptTrees
from decodax.static_trees.prompts import best_ppd
from decodax.static_trees.prompts import ppd
from decodax.static_trees.tree import MAX_NODES
from decodax.static_trees.tree import StaticTree
from decodax.static_trees.tree import chain
from decodax.static_trees.tree import from_paths
from decodax.static_trees.tree import kary
from decodax.static_trees.tree import node_acceptance
from decodax.static_trees.tree import node_values

__all__ = [
  'BlockTree',
  'MAX_NODES',
  'PromptChoice',
  'PromptTrees',
  'StaticTree',
  'TreeChoice',
  'best_ppd',
  'best_sequoia',
  'chain',
  'falcon',
  'from_paths',
  'in_blocks',
  'kary',
  'node_acceptance',
  'node_values',
  'ppd',
  'prune',
  'sequoia',
  'top_product',
]

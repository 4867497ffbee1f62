"""Drafting a tree whose shape is fixed: level by level, one forward pass of the drafter each.

Axes: `B` batch, `W` nodes of a level that have children, `K` children of a node, `N` nodes, `D`
depth, `M` slots, `V` vocabulary.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from decodax import controllers
from decodax import trees
from decodax.controllers import Controller
from decodax.decode import root_tokens
from decodax.drafters import children as children_lib
from decodax.drafters.expander import Expander
from decodax.drafters.expander import GrowthState
from decodax.drafters.expander import Nodes
from decodax.drafters.expander import growing_drafter
from decodax.drafters.expander import num_choices
from decodax.drafters.expander import start_round
from decodax.static_trees import StaticTree
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Proposal
from decodax.types import Result

KINDS = frozenset({
  Candidates.DETERMINISTIC, Candidates.IID, Candidates.WITHOUT_REPLACEMENT, Candidates.TOP_AND_ONE,
})  # fmt: skip


class _Level(NamedTuple):
  """The children at one depth, and the nodes above them that have any."""

  parents: np.ndarray  # i32[W] nodes one depth above that have children
  counts: np.ndarray  # i32[W] how many each has
  owner: np.ndarray  # i32[n] for each child, the index in `parents`
  rank: np.ndarray  # i32[n] for each child, which candidate of its parent it is
  order: np.ndarray  # i32[n] for each child, its place among its siblings


def static_tree(
  expander: Expander,
  tree: StaticTree,
  *,
  candidates: Candidates = Candidates.DETERMINISTIC,
  controller: Controller | None = None,
) -> Drafter:
  """Returns a drafter that fills a tree of fixed shape.

  * `DETERMINISTIC`: a child of rank r is the drafter's token of rank r.
  * `WITHOUT_REPLACEMENT`: children are drawn one after another from the node's law. Only how many a
    node has counts, not their ranks, for leaving out a draw would bias the rest. Draws beyond the
    law's support are left out.
  * `IID`: independent draws, likewise. Under coupled verification they all are the same token.
  * `TOP_AND_ONE`: all children but the last are the most probable tokens, the last one is drawn
    from what they leave.

  If no node has two children, drawn candidates are `Candidates.SAMPLED`, which rules for chains
  take.

  Args:
    expander: the model that drafts.
    tree: the shape.
    candidates: how children are chosen.
    controller: of the number of nodes, which are taken breadth-first; None takes all.

  Raises:
    ValueError: if the tree is the root alone, or has ranks beyond the vocabulary, or the candidates
      are of another kind.

  Source: Recursive Speculative Decoding, arXiv:2402.14160 (without replacement: RSD-C); Sequoia,
  arXiv:2402.12374; SpecInfer, arXiv:2305.09781 (independent); Towards Optimal Multi-draft
  Speculative Decoding, arXiv:2502.18779 (top and one).
  """
  _check(expander, tree, candidates)
  levels = _levels(tree)
  slots = _slots(levels, tree.num_nodes)
  num_slots = max(int(slots.max()) + 1, 1)
  max_drafts = tree.num_nodes - 1
  single = tree.children.shape[1] == 1 and candidates is not Candidates.DETERMINISTIC
  # Draws may run out of support; then nodes are missing and the shape is not the tree's.
  may_miss = not single and candidates in (Candidates.WITHOUT_REPLACEMENT, Candidates.TOP_AND_ONE)
  shape = DraftShape(
    num_nodes=tree.num_nodes,
    max_depth=tree.max_depth,
    candidates=Candidates.SAMPLED if single else candidates,
    parents=None if may_miss else tree.parents,
    widths=() if controller is None else controllers.widths_of(controller, max_drafts),
  )

  def choose(state, level, logits, depth, noise_fn, with_laws):
    if candidates is Candidates.DETERMINISTIC:
      return children_lib.most_probable(logits, int(level.rank.max()) + 1)
    nodes = jnp.asarray(level.parents)
    options = dict(noise_fn=noise_fn, with_laws=with_laws)
    if candidates is Candidates.TOP_AND_ONE:
      return children_lib.top_and_one(state, logits, depth, nodes, level.counts, **options)
    several = candidates is Candidates.IID
    draw = children_lib.independent if several else children_lib.without_replacement
    return draw(state, logits, depth, nodes, int(level.counts.max()), **options)

  def grow(params, state, *, noise_fn, with_laws):
    limit, wanted, ctl = start_round(params, state, controller, max_drafts)
    root, own, block = expander.begin(
      params, state, state.drafter.own, state.drafter.block, num_slots=num_slots, wanted=wanted
    )

    def fill(level, depth, tokens, block):
      """Returns (the level's `Children`, the block with the nodes above them)."""
      nodes, logits = _nodes(state, tree, slots, num_slots, level.parents, tokens), root.logits
      if depth > 1:
        grown, block = expander.expand(
          params, state, own, block, nodes, jnp.int32(slots[level.parents[0]])
        )
        logits = grown.logits
      on_path = _slot_tokens(slots, num_slots, tokens)
      logits = children_lib.penalize_paths(logits, state, on_path, nodes.mask)
      return choose(state, level, logits, depth, noise_fn, with_laws), block

    batch_size = state.length.shape[0]
    tokens, valid, laws = root_tokens(state)[:, None], jnp.ones((batch_size, 1), bool), []
    for depth, level in enumerate(levels, 1):
      needed = jnp.any((limit >= tokens.shape[1]) & (state.result == Result.RUNNING))
      work = functools.partial(fill, level, depth, tokens)
      drawn, block = work(block) if controller is None else _when(needed, work, block)
      laws.append(drawn.law)
      which = level.rank if candidates is Candidates.DETERMINISTIC else level.order
      exists = drawn.scores[:, level.owner, which] > -jnp.inf
      valid = jnp.concatenate([valid, exists & valid[:, level.parents[level.owner]]], axis=1)
      tokens = jnp.concatenate([tokens, drawn.tokens[:, level.owner, which]], axis=1)
    proposal = Proposal(
      tokens=tokens,
      parents=jnp.broadcast_to(jnp.asarray(tree.parents)[None], tokens.shape),
      valid=valid,
      laws=None if laws[0] is None else _spread_laws(laws, levels, tree),
    )
    proposal, place = _within(proposal, limit, controller, may_miss)
    own_slots = jnp.broadcast_to(jnp.asarray(slots)[None], place.shape)
    own_slots = jnp.take_along_axis(own_slots, place, axis=1)
    own_slots = jnp.where(proposal.valid, own_slots, -1)
    return proposal, GrowthState(own, block, own_slots, ctl)

  return growing_drafter(expander, shape, num_slots=num_slots, grow_fn=grow, controller=controller)


def _check(expander, tree, candidates):
  if tree.num_nodes < 2:
    raise ValueError('the tree is its root alone: nothing to draft; use plain()')
  if candidates not in KINDS:
    known = ', '.join(sorted(kind.name for kind in KINDS))
    raise ValueError(f'a static tree cannot be filled with {candidates}; it takes {known}')
  largest = int(max(tree.ranks.max(), tree.children.shape[1] - 1))
  if largest >= num_choices(expander):
    raise ValueError(
      f'the tree wants {largest + 1} candidates of a vocabulary of {num_choices(expander)}'
    )


def _levels(tree: StaticTree) -> list[_Level]:
  levels = []
  for depth in range(1, tree.max_depth + 1):
    nodes = np.flatnonzero(tree.depths == depth)
    parents, owner, counts = np.unique(tree.parents[nodes], return_inverse=True, return_counts=True)
    order = nodes - nodes[np.searchsorted(tree.parents[nodes], tree.parents[nodes])]
    levels.append(_Level(parents, counts, owner.reshape(-1), tree.ranks[nodes], order))
  return levels


def _slots(levels, num_nodes) -> np.ndarray:
  """Returns i32[N]: nodes with children, but the root, get slots in order; the others have -1."""
  slots = np.full(num_nodes, -1, np.int32)
  inner = np.concatenate([level.parents for level in levels])[1:]
  slots[inner] = np.arange(len(inner))
  return slots


def _nodes(state, tree, slots, num_slots, nodes, tokens) -> Nodes:
  """Returns nodes i32[W] of one depth, ready to be read; the root sees no slot and has none."""
  inner = np.flatnonzero(slots >= 0)
  mask = np.zeros((len(nodes), num_slots), bool)
  mask[:, slots[inner]] = tree.ancestors[nodes][:, inner]
  above = tree.parents[nodes]
  parents = np.where(above > 0, slots[above], -1)
  shape = (state.length.shape[0], len(nodes))
  depth = int(tree.depths[nodes[0]])
  return Nodes(
    tokens=tokens[:, nodes],
    positions=jnp.broadcast_to(state.length[:, None] - 1 + depth, shape),
    parents=jnp.broadcast_to(jnp.asarray(parents, jnp.int32)[None], shape),
    mask=jnp.broadcast_to(jnp.asarray(mask)[None], (*shape, num_slots)),
  )


def _slot_tokens(slots, num_slots, tokens) -> jax.Array:
  """Returns i32[B, M], the tokens of the slots; those below the nodes so far are not known yet."""
  inner = np.flatnonzero(slots >= 0)
  node = np.zeros(num_slots, np.int32)
  node[slots[inner]] = np.where(inner < tokens.shape[1], inner, 0)
  return tokens[:, node]


def _when(needed, work, block):
  """Returns `work(block)`, or zeros and the block as it was unless needed bool[]."""
  like = jax.eval_shape(work, block)[0]
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
  return lax.cond(needed, work, lambda block: (zeros, block), block)


def _spread_laws(laws, levels, tree) -> jax.Array:
  """Returns f32[B, N, V], the law of each node's children; leaves, which have none, get any."""
  parents = np.concatenate([level.parents for level in levels])
  row = np.zeros(tree.num_nodes, np.int32)
  row[parents] = np.arange(len(parents))
  return jnp.concatenate(laws, axis=1)[:, row]


def _within(proposal, limit, controller, may_miss) -> tuple[Proposal, jax.Array]:
  """Returns the proposal of at most limit i32[B] drafts, valid ones first, and i32[B, N] whence."""
  num_nodes = proposal.tokens.shape[1]
  index = jnp.broadcast_to(jnp.arange(num_nodes, dtype=jnp.int32)[None], proposal.tokens.shape)
  if not may_miss:
    if controller is not None:
      proposal = proposal._replace(valid=proposal.valid & (index <= limit[:, None]))
    return proposal, index
  keep = proposal.valid
  if controller is not None:
    keep = keep & (jnp.cumsum(keep, axis=-1) <= limit[:, None] + 1)
  place, parents, valid = trees.compact_nodes(keep, proposal.parents, num_nodes)
  laws = proposal.laws
  if laws is not None:
    laws = jnp.take_along_axis(laws, place[:, :, None], axis=1)
  tokens = jnp.take_along_axis(proposal.tokens, place, axis=1)
  return Proposal(tokens, parents, valid, laws), place

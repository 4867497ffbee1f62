"""Topology of proposals: depths, ancestor masks and the walk from root to verdict.

Axes: `B` batch, `N` nodes (the root is node 0), `D` maximal depth, `V` vocabulary.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from decodax.types import DraftShape
from decodax.types import Proposal
from decodax.types import Verdict
from pallas_kernels.masks import pack_mask
from pallas_kernels.masks import unpack_mask


def chain_parents(batch_size: int, num_nodes: int) -> jax.Array:
  """Returns i32[B, N], the parents of a chain."""
  return jnp.broadcast_to(jnp.arange(-1, num_nodes - 1, dtype=jnp.int32), (batch_size, num_nodes))


def chain_proposal(
  root: jax.Array, drafts: jax.Array, num_drafts: jax.Array, laws: jax.Array | None = None
) -> Proposal:
  """Returns a chain: the root i32[B], then the first num_drafts i32[B] of drafts i32[B, D].

  Args:
    root: i32[B], the last emitted token.
    drafts: i32[B, D].
    num_drafts: i32[B].
    laws: f32[B, D, V], logits of the law of each draft. The last node has no child; its law is
      filled with zeros.
  """
  batch_size, depth = drafts.shape
  if laws is not None:
    laws = jnp.pad(laws, ((0, 0), (0, 1), (0, 0)))
  return Proposal(
    tokens=jnp.concatenate([root[:, None], drafts], axis=1),
    parents=chain_parents(batch_size, depth + 1),
    valid=jnp.arange(depth + 1)[None] <= num_drafts[:, None],
    laws=laws,
  )


def root_proposal(root: jax.Array) -> Proposal:
  """Returns the proposal that drafts nothing: plain decoding."""
  nothing = jnp.zeros((root.shape[0], 0), jnp.int32)
  return chain_proposal(root, nothing, jnp.zeros_like(root))


def ancestor_mask(parents: jax.Array) -> jax.Array:
  """Returns bool[B, N, N]: is node j node i itself or an ancestor of it?

  By doubling: after k squarings paths of length 2^k are known.
  """
  num_nodes = parents.shape[1]
  eye = jnp.eye(num_nodes, dtype=jnp.float32)[None]
  reach = eye + jax.nn.one_hot(parents, num_nodes)
  for _ in range(max(num_nodes - 1, 1).bit_length()):
    reach = jnp.minimum(reach @ reach, 1)
  return reach > 0


def pack_ancestors(mask: jax.Array) -> jax.Array:
  """Returns i32[B, N, ceil(N / 32)], an ancestor mask bool[B, N, N] as bits.

  Bit j % 32 of word j // 32 of node i tells whether node j is i itself or an ancestor of it: an
  eighth of the memory of booleans, which is what a kernel wants to read.
  """
  return pack_mask(mask)


def unpack_ancestors(words: jax.Array, num_nodes: int) -> jax.Array:
  """Returns bool[B, N, N], the ancestor mask that `pack_ancestors` made i32[B, N, W] of."""
  return unpack_mask(words, num_nodes)


def path_table(parents: jax.Array, max_depth: int) -> jax.Array:
  """Returns i32[B, N, D + 1], for each node of parents i32[B, N] the nodes from the root to it.

  Entries past the node itself are -1. The rows of leaves are the tree's paths.
  """
  mask = ancestor_mask(parents)
  depths = mask.sum(-1, dtype=jnp.int32) - 1
  at_depth = depths[:, None, :, None] == jnp.arange(max_depth + 1)[None, None, None]
  nodes = jnp.arange(parents.shape[1], dtype=jnp.int32)[None, None, :, None]
  return jnp.max(jnp.where(mask[..., None] & at_depth, nodes, -1), axis=2)


def tree_positions(length: jax.Array, depths: jax.Array) -> jax.Array:
  """Returns i32[B, N], the position of each node: siblings share one.

  Args:
    length: i32[B], tokens of the row, the root included.
    depths: i32[B, N], 0 at the root.
  """
  return length[:, None] - 1 + depths


def compact_nodes(
  keep: jax.Array, parents: jax.Array, num_nodes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (node at each place i32[B, N], its parent's place i32[B, N], valid bool[B, N]).

  Kept nodes keep their order, so topological order and the order of siblings stay.

  Args:
    keep: bool[B, C], closed under parents; node 0, the root, is kept. Those beyond the first N kept
      are dropped.
    parents: i32[B, C], -1 at the root, parents[:, i] < i elsewhere.
    num_nodes: N.
  """
  batch_size, num_candidates = keep.shape
  rows = jnp.arange(batch_size)[:, None]
  place = jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1
  index = jnp.zeros((batch_size, num_nodes), jnp.int32)
  index = index.at[rows, jnp.where(keep, place, num_nodes)].set(
    jnp.arange(num_candidates, dtype=jnp.int32)[None], mode='drop'
  )
  above = jnp.take_along_axis(parents, index, axis=1)
  new_parents = jnp.take_along_axis(place, jnp.maximum(above, 0), axis=1)
  valid = jnp.arange(num_nodes)[None] < keep.sum(-1, keepdims=True)
  first = jnp.arange(num_nodes)[None] == 0
  new_parents = jnp.where(first, -1, jnp.where(valid, new_parents, 0))
  return jnp.where(valid, index, 0), new_parents, valid


def topology(proposal: Proposal, shape: DraftShape) -> tuple[jax.Array, jax.Array]:
  """Returns (bool[B, N, N] ancestor mask, i32[B, N] depth of each node, 0 at the root)."""
  batch_size, num_nodes = proposal.tokens.shape
  if shape.is_chain:
    mask = jnp.tril(jnp.ones((num_nodes, num_nodes), bool))
    depths = jnp.arange(num_nodes, dtype=jnp.int32)
    return (
      jnp.broadcast_to(mask, (batch_size, num_nodes, num_nodes)),
      jnp.broadcast_to(depths, (batch_size, num_nodes)),
    )
  if shape.parents is not None:
    mask = jnp.asarray(_constant_ancestors(shape.parents[:num_nodes]))
    mask = jnp.broadcast_to(mask, (batch_size, num_nodes, num_nodes))
  else:
    mask = ancestor_mask(proposal.parents)
  return mask, mask.sum(-1, dtype=jnp.int32) - 1


def _constant_ancestors(parents):
  """Returns bool[N, N] for parents i32[N] that are known at compile time."""
  mask = np.eye(len(parents), dtype=bool)
  for node in range(1, len(parents)):
    mask[node] |= mask[parents[node]]
  return mask


def children_of(proposal: Proposal, node: jax.Array) -> jax.Array:
  """Returns bool[B, N], the valid children of each row's node i32[B]."""
  return proposal.valid & (proposal.parents == node[:, None])


def walk(
  choose_fn: Callable[[jax.Array, jax.Array], jax.Array], proposal: Proposal, max_depth: int
) -> Verdict:
  """Returns the verdict of choosing a token at the root, at the child that has it, and so on.

  The path ends at the first node with no child of the chosen token; that token is the next one.

  Args:
    choose_fn: (node i32[B], depth i32[]) -> i32[B], the token that follows `node`.
    proposal: the tree; of siblings with the same token the first counts.
    max_depth: D.
  """
  batch_size = proposal.tokens.shape[0]
  root = jnp.zeros((batch_size,), jnp.int32)

  def descend(carry):
    depth, node, path, num_accepted, next_token, active = carry
    token = jnp.where(active, choose_fn(node, depth), next_token)
    match = children_of(proposal, node) & (proposal.tokens == token[:, None])
    active = active & match.any(-1)
    node = jnp.where(active, jnp.argmax(match, -1).astype(jnp.int32), node)
    path = lax.dynamic_update_slice_in_dim(path, node[:, None], depth + 1, axis=1)
    return depth + 1, node, path, num_accepted + active, token, active

  def unfinished(carry):
    return (carry[0] <= max_depth) & carry[-1].any()

  start = (
    jnp.int32(0), root, jnp.zeros((batch_size, max_depth + 2), jnp.int32), root, root,
    jnp.ones((batch_size,), bool),
  )  # fmt: skip
  _, _, path, num_accepted, next_token, _ = lax.while_loop(unfinished, descend, start)
  return Verdict(path[:, : max_depth + 1], num_accepted, next_token)


def path_tokens(proposal: Proposal, verdict: Verdict) -> jax.Array:
  """Returns i32[B, D + 1]: accepted draft tokens, then the next token; the rest is dead."""
  drafts = jnp.take_along_axis(proposal.tokens, verdict.path[:, 1:], axis=1)
  drafts = jnp.pad(drafts, ((0, 0), (0, 1)))
  index = jnp.arange(drafts.shape[1])[None]
  return jnp.where(index == verdict.num_accepted[:, None], verdict.next_token[:, None], drafts)

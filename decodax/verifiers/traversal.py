"""Traversal verification: decide a tree from its leaves up, so that a parent outlives its children.

Axes: `B` batch, `N` nodes, `D` maximal depth, `V` vocabulary. p is the target's law, q the draft's.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import children_of
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import law_at
from decodax.verifiers.siblings import IN_TURN
from decodax.verifiers.siblings import divide
from decodax.verifiers.siblings import draft_law_at
from decodax.verifiers.siblings import next_child
from decodax.verifiers.siblings import of_tokens
from decodax.verifiers.siblings import select_rows
from decodax.verifiers.siblings import without_tokens


class _Frame(NamedTuple):
  """A node that is being visited; in the stack, arrays have a trailing axis of D + 1 depths.

  With the children refused so far its laws p and q have become P = max(p - slope q, 0) / p_mass
  and Q = q / q_mass on the tokens not refused.
  """

  node: jax.Array  # i32[B]
  tried: jax.Array  # i32[B] its last child that was tried; the node itself if none was
  weight: jax.Array  # float[B] the probability to accept it once its children are refused
  slope: jax.Array  # float[B]
  p_mass: jax.Array  # float[B]
  q_mass: jax.Array  # float[B]


class _Visit(NamedTuple):
  step: jax.Array  # i32[]
  depth: jax.Array  # i32[B] where the top of the stack is
  stack: _Frame
  p: jax.Array  # float[B, V] the target's law at the top, as at first
  q: jax.Array  # float[B, V] the draft's
  active: jax.Array  # bool[B]


def verify_traversal(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path to the first node that is accepted, leaves first, and the token that ends it.

  A node carries a weight: 1 at the root; min(1, w P(x) / Q(x)) for a child x of a node of weight w,
  where P and Q are what the children refused before it left of p and q. A leaf is accepted with
  its weight. When a child is refused, its parent's w becomes s / (s + 1 - w) with
  s = sum of max(w P - Q, 0), its P becomes max(w P - Q, 0) / s, and x is taken out of Q; when all
  are, the parent itself is accepted with what is left of its weight. The root is accepted at the
  latest, and the next token is drawn from the P of the accepted node.

  P stays proportional to max(p - slope q, 0), so a frame of the stack is a handful of numbers.

  Lossless (law-identical): the output has the target's law if the children of a node were drawn
  one after another, without replacement, from its law in `proposal.laws`, f[B, N, V] logits, and
  stand in that order. Independent draws will do, as those that repeat a sibling are passed over.
  Whether a node exists may depend on all that was drawn before it, in other branches too, but not
  on its own token: the output's law given the tree so far is the same with another last child.

  A chain is decided as by block verification. On average the path was at least as long as that of
  recursive rejection on every tree tried; there is no proof that it always is.

  Source: Traversal Verification for Speculative Tree Decoding, arXiv:2505.12398, the traversal
  algorithm; the scalar form of P is our own.
  """
  laws = proposal.laws
  assert laws is not None
  batch_size, num_nodes = proposal.tokens.shape
  rows = jnp.arange(batch_size)
  has_child = _has_child(proposal)

  def laws_of(node):
    return law_at(target_logits, node), draft_law_at(laws, node)

  def step(visit: _Visit) -> _Visit:
    depth, active = visit.depth, visit.active
    top = _read(visit.stack, depth)
    # A node of weight 0 has only children of weight 0.
    found, child = next_child(proposal, top.node, top.tried)
    found = found & (top.weight > 0)
    token = proposal.tokens[rows, child]
    drawn = found & (of_tokens(visit.q, token) > 0) & ~_repeats(proposal, top.node, child)
    weight = jnp.where(drawn, _child_weight(top, visit.p, visit.q, token), 0)

    # Decide a leaf, or a node whose children have all been refused.
    inner = found & has_child[rows, child] & (weight > 0)
    at_root = ~found & (depth == 0)
    chance = jnp.where(found, weight, top.weight)
    chance = jnp.where(active & ~inner & ~at_root, chance, 0)
    decided = jnp.where(found, child, top.node)
    accepted = active & keys.accepts(chance, depth + found, decided)
    push = active & found & (accepted | inner)
    refused = active & ~accepted & ~inner & ~at_root
    pop = refused & ~found
    drawn = jnp.where(found, drawn, True)

    # Where to go on.
    depth = depth + push - pop
    one = jnp.ones_like(weight)
    pushed = _Frame(child, child, weight, 0 * one, one, one)
    frame = select_rows(push, pushed, _read(visit.stack, depth))
    frame = frame._replace(tried=jnp.where(refused, decided, frame.tried))
    moved = push | pop
    p, q = lax.cond(
      moved.any(),
      lambda: select_rows(moved, laws_of(frame.node), (visit.p, visit.q)),
      lambda: (visit.p, visit.q),
    )
    refused = refused & drawn
    frame = lax.cond(
      refused.any(),
      lambda: select_rows(refused, _refuse(proposal, frame, depth == 0, p, q), frame),
      lambda: frame,
    )
    return _Visit(
      step=visit.step + 1,
      depth=depth,
      stack=jax.tree.map(lambda a, b: a.at[rows, depth].set(b), visit.stack, frame),
      p=p,
      q=q,
      active=active & ~accepted & ~at_root,
    )

  def unfinished(visit: _Visit):
    return visit.active.any() & (visit.step < 2 * num_nodes)

  root = jnp.zeros((batch_size,), jnp.int32)
  p, q = laws_of(root)
  one = jnp.ones((batch_size,), p.dtype)
  start = _Visit(
    step=jnp.int32(0),
    depth=root,
    stack=jax.tree.map(
      lambda a: jnp.broadcast_to(a[:, None], (batch_size, max_depth + 1)),
      _Frame(root, root, one, 0 * one, one, one),
    ),
    p=p,
    q=q,
    active=jnp.ones((batch_size,), bool),
  )
  end = lax.while_loop(unfinished, step, start)
  slope = _read(end.stack, end.depth).slope
  next_token = keys.pick(jnp.maximum(end.p - slope[:, None] * end.q, 0), end.depth + 1)
  return Verdict(end.stack.node, end.depth, next_token)


def _read(stack: _Frame, depth: jax.Array) -> _Frame:
  """Returns the frame at each row's depth i32[B]."""
  return jax.tree.map(lambda a: a[jnp.arange(depth.shape[0]), depth], stack)


def _has_child(proposal: Proposal) -> jax.Array:
  """Returns bool[B, N]: has the node a valid child?"""
  rows, num_nodes = jnp.arange(proposal.tokens.shape[0])[:, None], proposal.tokens.shape[1]
  is_child = proposal.valid & (proposal.parents >= 0)
  parents = jnp.where(is_child, proposal.parents, num_nodes)
  return jnp.zeros(proposal.tokens.shape, bool).at[rows, parents].set(True, mode='drop')


def _repeats(proposal: Proposal, node: jax.Array, child: jax.Array) -> jax.Array:
  """Returns bool[B]: has an earlier child of node i32[B] the token of its child i32[B]?"""
  token = jnp.take_along_axis(proposal.tokens, child[:, None], axis=1)
  earlier = jnp.arange(proposal.tokens.shape[1])[None] < child[:, None]
  return jnp.any(children_of(proposal, node) & earlier & (proposal.tokens == token), axis=-1)


def _child_weight(frame: _Frame, p: jax.Array, q: jax.Array, token: jax.Array) -> jax.Array:
  """Returns float[B], min(1, w P(x) / Q(x)) for tokens i32[B]."""
  left = jnp.maximum(of_tokens(p, token) - frame.slope * of_tokens(q, token), 0)
  left = frame.weight * divide(left, frame.p_mass)
  drawn = divide(of_tokens(q, token), frame.q_mass)
  return jnp.where(left < drawn, divide(left, drawn), 1)


def _refuse(
  proposal: Proposal, frame: _Frame, at_root: jax.Array, p: jax.Array, q: jax.Array
) -> _Frame:
  """Returns the frame after its child `frame.tried` was refused; p and q are as at first."""
  slope = frame.slope + divide(frame.p_mass, frame.weight * frame.q_mass)
  p_mass = jnp.maximum(p - slope[:, None] * q, 0).sum(-1)
  index = jnp.arange(proposal.tokens.shape[1])[None]
  tried = children_of(proposal, frame.node) & (index <= frame.tried[:, None])
  q_mass = without_tokens(q, proposal.tokens, tried).sum(-1)
  excess = frame.weight * divide(p_mass, frame.p_mass)
  weight = divide(excess, excess + (1 - frame.weight))
  # Nothing is left where w P <= Q. Only rounding can make that so at the root: there P stays.
  some = p_mass > 0
  return frame._replace(
    weight=jnp.where(at_root, 1, weight),
    slope=jnp.where(some, slope, frame.slope),
    p_mass=jnp.where(some, p_mass, frame.p_mass),
    q_mass=q_mass,
  )


traversal = Verifier(
  name='traversal',
  exactness='law-identical',
  verify=verify_traversal,
  draft_noise=RoundKeys.draft_gumbel,
  supports=IN_TURN,
  needs_laws=True,
)

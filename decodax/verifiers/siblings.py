"""What the tree rules share: a walk that tries the children of a node one after another.

Axes: `B` batch, `N` nodes, `V` vocabulary. p is the target's law, q the draft's.

A rule looks at one node of each row at a time, so it works on rows [B, V] and never on all nodes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import children_of
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import PyTree
from decodax.types import Verdict
from decodax.verifiers.laws import law_at

IN_TURN = frozenset({
  Candidates.SAMPLED, Candidates.IID, Candidates.WITHOUT_REPLACEMENT, Candidates.COMPETING,
})  # fmt: skip
"""Children drawn from one law in turn, which rules for draws without replacement can use.

Independent draws are that, once those that repeat a sibling are passed over."""


class SiblingRule(NamedTuple):
  """How the children of one node are tried. The state is a pytree of arrays [B, ...]."""

  enter: Callable[..., PyTree]
  """(node i32[B]) -> the state before any child of `node` has been tried."""
  weigh: Callable[..., tuple[jax.Array, PyTree]]
  """(state, child i32[B], token i32[B]) -> float[B], the probability in [0, 1] with which `child`
  is accepted, and the state."""
  reject: Callable[..., PyTree]
  """(state, token i32[B], rejected bool[B]) -> the state, with the token refused in some rows."""
  law: Callable[..., jax.Array]
  """(state) -> float[B, V], the law of the next token, not normalised, if no child is left."""


class _Walk(NamedTuple):
  step: jax.Array  # i32[]
  node: jax.Array  # i32[B] the end of the path
  tried: jax.Array  # i32[B] its last child that was tried; the node itself if none was
  depth: jax.Array  # i32[B]
  path: jax.Array  # i32[B, D + 1]
  trying: jax.Array  # bool[B] children of the node are being tried
  waiting: jax.Array  # bool[B] the node was accepted but is not entered yet
  state: PyTree


def walk_siblings(
  rule: SiblingRule, keys: RoundKeys, proposal: Proposal, *, max_depth: int
) -> Verdict:
  """Returns the path of accepted children, and a token from the law that the rule leaves.

  At each node the valid children are tried in node order. The first that is accepted extends the
  path; where none is, the path ends. Rows enter their next nodes together, once no row has a child
  left to try, for entering is what costs.

  Args:
    rule: what decides.
    keys: where decisions come from; a child is decided under its own depth and node id.
    proposal: the tree.
    max_depth: D.
  """
  batch_size, num_nodes = proposal.tokens.shape
  rows = jnp.arange(batch_size)
  zeros = jnp.zeros((batch_size,), jnp.int32)
  nothing = jnp.zeros((batch_size,), bool)

  def step(walk: _Walk) -> _Walk:
    found, child = next_child(proposal, walk.node, walk.tried)
    found = found & walk.trying
    token = proposal.tokens[rows, child]
    chance, state = rule.weigh(walk.state, child, token)
    accepted = keys.accepts(jnp.where(found, chance, 0), walk.depth + 1, child)
    accepted = found & accepted
    rejected = found & ~accepted
    state = lax.cond(
      rejected.any(), lambda state: rule.reject(state, token, rejected), lambda state: state, state
    )
    node = jnp.where(accepted, child, walk.node)
    waiting = walk.waiting | accepted
    enter = waiting & ~rejected.any()
    state = lax.cond(
      enter.any(), lambda state: select_rows(enter, rule.enter(node), state), lambda s: s, state
    )
    depth = walk.depth + accepted
    return _Walk(
      step=walk.step + 1,
      node=node,
      tried=jnp.where(found, child, walk.tried),
      depth=depth,
      path=walk.path.at[rows, jnp.where(accepted, depth, max_depth + 1)].set(child, mode='drop'),
      trying=rejected | enter,
      waiting=waiting & ~enter,
      state=state,
    )

  def unfinished(walk: _Walk):
    return walk.trying.any() & (walk.step < num_nodes * (max_depth + 1))

  start = _Walk(
    step=jnp.int32(0),
    node=zeros,
    tried=zeros,
    depth=zeros,
    path=jnp.zeros((batch_size, max_depth + 1), jnp.int32),
    trying=~nothing,
    waiting=nothing,
    state=rule.enter(zeros),
  )
  end = lax.while_loop(unfinished, step, start)
  next_token = keys.pick(rule.law(end.state), end.depth + 1)
  return Verdict(end.path, end.depth, next_token)


def next_child(
  proposal: Proposal, node: jax.Array, tried: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns bool[B] and i32[B]: the first valid child of node[b] after node tried[b], if any."""
  index = jnp.arange(proposal.tokens.shape[1])[None]
  untried = children_of(proposal, node) & (index > tried[:, None])
  return untried.any(-1), jnp.argmax(untried, axis=-1).astype(jnp.int32)


def draft_law_at(laws: jax.Array, node: jax.Array) -> jax.Array:
  """Returns float[B, V], the law at node i32[B] of logits [B, N, V]; zeros if there is none."""
  return jnp.nan_to_num(law_at(laws, node), nan=0)


def of_tokens(law: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns float[B], the probability of tokens i32[B] under law float[B, V]."""
  return law[jnp.arange(tokens.shape[0]), tokens]


def without_tokens(law: jax.Array, tokens: jax.Array, removed: jax.Array) -> jax.Array:
  """Returns law float[B, V] with zeros at those of tokens i32[B, K] with removed bool[B, K]."""
  rows = jnp.arange(tokens.shape[0])[:, None]
  return law.at[rows, jnp.where(removed, tokens, law.shape[1])].set(0, mode='drop')


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Returns numerator / denominator, 0 where the denominator is not positive."""
  return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def select_rows(rows: jax.Array, new: PyTree, old: PyTree) -> PyTree:
  """Returns a pytree of arrays [B, ...] with rows bool[B] from `new` and the rest from `old`."""

  def select(a, b):
    return jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(select, new, old)


# --- Two rules that several verifiers are made of ------------------------------------------------


class _Shares(NamedTuple):
  law: jax.Array  # float[B, V] the law of the next token, refused tokens at 0; not normalised
  mass: jax.Array  # float[B] its sum


def share_rule(
  law_fn: Callable[[jax.Array], jax.Array],
  *,
  threshold_single: jax.Array | float | None = None,
  threshold_total: jax.Array | float = 1.0,
) -> SiblingRule:
  """Returns the rule that accepts a child as often as one draw from a law gives its token.

  One after another, each with its share of what the law leaves to the tokens not yet refused.

  Args:
    law_fn: (node i32[B]) -> float[B, V], the law of the token after the node.
    threshold_single: f[], a child with this probability or more is always accepted.
    threshold_total: f[] in (0, 1], children whose probabilities add up to this are never all
      refused. At 1 and without `threshold_single` the emitted token has the law.
  """

  def enter(node):
    law = law_fn(node)
    return _Shares(law, law.sum(-1))

  def weigh(state, child, token):
    del child
    share = of_tokens(state.law, token)
    coin = state.mass - (1 - threshold_total)  # what the coin may still fall on
    chance = divide(share, jnp.maximum(coin, share))
    if threshold_single is not None:
      chance = jnp.where(share >= threshold_single, 1, chance)
    return chance, state

  def reject(state, token, rejected):
    law = without_tokens(state.law, token[:, None], rejected[:, None])
    return _Shares(law, law.sum(-1))

  return SiblingRule(enter, weigh, reject, law=lambda state: state.law)


class _Excess(NamedTuple):
  excess: jax.Array  # float[B, V] its positive part, divided by `mass`, is what is left of p
  mass: jax.Array  # float[B]
  law: jax.Array  # float[B, V] the law that the next child was drawn from, not normalised
  law_mass: jax.Array  # float[B] its sum


def residual_rule(
  proposal: Proposal, target_logits: jax.Array, *, own_laws: bool, replacement: bool
) -> SiblingRule:
  """Returns the rule that tries each child by the ratio to what the children before it left of p.

  A child x drawn from q is accepted with probability min(1, P(x) / q(x)); if it is refused, P
  becomes norm(max(P - q, 0)). Starting from P = p, all P's are norm(max(p - e, 0)) for a sum e of
  multiples of the q's, so one array is carried, in the scale of p.

  Args:
    proposal: the tree.
    target_logits: float[B, N, V].
    own_laws: `proposal.laws[b, i]` is the law of node i itself, not of its children.
    replacement: a token may be drawn again; otherwise it is taken out of q once refused.
  """
  laws = proposal.laws
  assert laws is not None

  def enter(node):
    p = law_at(target_logits, node)
    ones = jnp.ones(node.shape, p.dtype)
    return _Excess(p, ones, jnp.zeros_like(p) if own_laws else draft_law_at(laws, node), ones)

  def weigh(state, child, token):
    if own_laws:
      state = state._replace(law=draft_law_at(laws, child))
    left = divide(jnp.maximum(of_tokens(state.excess, token), 0), state.mass)
    drawn = divide(of_tokens(state.law, token), state.law_mass)
    return jnp.where(left < drawn, divide(left, drawn), drawn > 0).astype(left.dtype), state

  def reject(state, token, rejected):
    # A token that the law cannot have given tells nothing; nothing is subtracted for it.
    rejected = rejected & (of_tokens(state.law, token) > 0)
    factor = jnp.where(rejected, divide(state.mass, state.law_mass), 0)
    excess = state.excess - factor[:, None] * state.law
    mass = jnp.maximum(excess, 0).sum(-1)
    # Only rounding can refuse a draft where p and q are equal; then P stays.
    excess, mass = select_rows(mass > 0, (excess, mass), (state.excess, state.mass))
    if replacement:
      return state._replace(excess=excess, mass=mass)
    law = without_tokens(state.law, token[:, None], rejected[:, None])
    return _Excess(excess, mass, law, law.sum(-1))

  return SiblingRule(enter, weigh, reject, law=lambda state: jnp.maximum(state.excess, 0))

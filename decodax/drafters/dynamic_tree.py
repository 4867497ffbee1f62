"""Drafting a tree whose shape depends on the context: the likeliest branches grow.

All of them grow alike. A *beam* of the best nodes is read in one forward pass of the drafter, their
children become candidates, the best of those are the next beam. At the end the best candidates are
the proposal. The rules differ in what *best* means, and in whether children are drawn or taken.

Growth stops early, without a change to the result, once no branch can enter the proposal any more.

A drawn candidate must not be kept or dropped by its own probability, nor by anything that follows
from its identity: then what is submitted would not follow the drafter's law. So drawn candidates
compete by numbers that are settled before the token is: the value of the *place* (DySpec), or the
Gumbel perturbation, whose size is independent of the token (stochastic beams).

Axes: `B` batch, `W` beam, `K` children of a node, `C` candidates, `M` slots, `N` nodes, `D` depth,
`V` vocabulary.
"""

from collections.abc import Callable
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
from decodax.drafters import draws
from decodax.drafters.expander import Expander
from decodax.drafters.expander import GrowthState
from decodax.drafters.expander import Nodes
from decodax.drafters.expander import growing_drafter
from decodax.drafters.expander import num_choices
from decodax.drafters.expander import start_round
from decodax.types import Candidates
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Proposal
from decodax.types import PyTree
from decodax.types import Result


class Beam(NamedTuple):
  """Nodes of one depth that are about to be read."""

  tokens: jax.Array  # i32[B, W]
  candidate: jax.Array  # i32[B, W] which candidate each one is, the root being 0
  parents: jax.Array  # i32[B, W] slots of their parents; -1 for children of the root
  value: jax.Array  # f32[B, W] log-probability of the path in the drafter's law
  priority: jax.Array  # f32[B, W] what the beam is chosen by; -inf where there is no node
  rank: jax.Array  # f32[B, W] what the proposal is chosen by


class Scored(NamedTuple):
  """The children of a beam."""

  tokens: jax.Array  # i32[B, W, K]
  value: jax.Array  # f32[B, W, K] as in `Beam`
  priority: jax.Array  # f32[B, W, K] never above the parent's
  rank: jax.Array  # f32[B, W, K] never above the parent's priority
  law: jax.Array | None  # f32[B, W, V] if wanted and drawn


Rule = Callable[..., Scored]
"""(state, beam: Beam, logits f32[B, W, V], depth, nodes i32[W], *, noise_fn, with_laws) -> the
children, at `depth`, of a beam. Where the beam has no node it says nothing of use."""


def eagle2_tree(
  expander: Expander,
  *,
  num_nodes: int = 60,
  max_depth: int = 6,
  beam_width: int = 10,
  threshold: float = 0.0,
  controller: Controller | None = None,
) -> Drafter:
  """Returns a drafter of the most probable nodes: grow a beam, then rank all candidates anew.

  The candidates are the `beam_width` most probable tokens after each node of the beam, and the
  proposal is those of highest path probability under the drafter at temperature 1. All is a
  function of the context, so rules for deterministic candidates are exact.

  Args:
    expander: the model that drafts.
    num_nodes: N, the root included, at most.
    max_depth: D; a row whose token budget ends sooner drafts no deeper than it can emit. For a beam
      of more than one node at most N - 2: a tree that deep would be a chain.
    beam_width: W, and K.
    threshold: path probability below which a node is not proposed; the target's call is narrower
      where few are left.
    controller: of the number of nodes; None takes the best `num_nodes - 1` drafts always.

  Raises:
    ValueError: if a number is too small, or the beam is wider than the vocabulary.

  Source: EAGLE-2, arXiv:2406.16858, expansion and reranking.
  """
  width = _check_width(expander, beam_width)
  rule = functools.partial(_by_probability, num_children=width)
  plan = _Plan(Candidates.DETERMINISTIC, rule, width, width, threshold)
  return _dynamic_tree(expander, plan, num_nodes, max_depth, controller)


def dyspec_tree(
  expander: Expander,
  *,
  num_nodes: int = 64,
  max_depth: int = 6,
  beam_width: int = 8,
  max_children: int = 8,
  threshold: float = 0.0,
  controller: Controller | None = None,
) -> Drafter:
  """Returns a drafter that draws without replacement where acceptance is most likely.

  A place in the tree, the j-th child of a node, is worth the probability of the path to the node
  times what the law leaves after the j - 1 children before. The places of highest worth are taken.
  The worth of a place is settled before its token is drawn, so the drawn tokens keep their law;
  rules for competing draws are exact. With a beam and a depth that do not bind this is the greedy
  growth of the paper, one forward pass a level.

  Args:
    expander: the model that drafts.
    num_nodes: N, the root included, at most.
    max_depth: as for `eagle2_tree`.
    beam_width: W, nodes read a level.
    max_children: K, children of a node at most.
    threshold: worth below which a place is not taken; the target's call is narrower where few are
      left.
    controller: of the number of nodes; None takes the best `num_nodes - 1` places always.

  Raises:
    ValueError: if a number is too small, or there are more children than tokens.

  Source: DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, arXiv:2410.11744,
  greedy construction.
  """
  width = _check_width(expander, beam_width)
  most = _check_width(expander, max_children)
  rule = functools.partial(_by_place, num_children=most)
  plan = _Plan(_drawn(max(width, most)), rule, width, most, threshold)
  return _dynamic_tree(expander, plan, num_nodes, max_depth, controller)


def stochastic_beam_tree(
  expander: Expander,
  *,
  beam_width: int = 8,
  max_depth: int = 4,
  num_nodes: int | None = None,
  controller: Controller | None = None,
) -> Drafter:
  """Returns a drafter of a stochastic beam: W whole continuations drawn without replacement.

  A node's children, in falling order of their perturbed log-probabilities, are draws without
  replacement from its law; how many it has depends on the sizes of the perturbations and not on
  the tokens. Rules for competing draws are exact.

  Args:
    expander: the model that drafts.
    beam_width: W, nodes of each depth.
    max_depth: as for `eagle2_tree`.
    num_nodes: N, the root included; None is 1 + W D. Fewer keep those of largest perturbation.
    controller: of the number of nodes; None takes all.

  Raises:
    ValueError: if a number is too small, or the beam is wider than the vocabulary.

  Source: Recursive Speculative Decoding, arXiv:2402.14160, RSD-S; Stochastic Beams and Where to
  Find Them, arXiv:1903.06059, algorithm 1.
  """
  width = _check_width(expander, beam_width)
  num_nodes = 1 + width * max_depth if num_nodes is None else num_nodes
  rule = functools.partial(_by_perturbation, num_children=width)
  plan = _Plan(_drawn(width), rule, width, width, 0.0, beam_only=True)
  return _dynamic_tree(expander, plan, num_nodes, max_depth, controller)


# --- What is best --------------------------------------------------------------------------------


def _by_probability(
  state, beam, logits, depth, nodes, *, num_children, noise_fn, with_laws
) -> Scored:
  """Ranks nodes by the probability of their path (EAGLE-2)."""
  del state, depth, nodes, noise_fn, with_laws
  children = children_lib.most_probable(logits, num_children)
  value = beam.value[..., None] + children.log_q
  return Scored(children.tokens, value, value, value, None)


def _by_place(state, beam, logits, depth, nodes, *, num_children, noise_fn, with_laws) -> Scored:
  """Ranks drawn nodes by the worth of their place, and reads on at the likeliest (DySpec)."""
  children = children_lib.without_replacement(
    state, logits, depth, nodes, num_children, noise_fn=noise_fn, with_laws=with_laws
  )
  q = jnp.exp(children.log_q)
  left = jnp.maximum(1 - (jnp.cumsum(q, axis=-1) - q), jnp.finfo(q.dtype).tiny)
  value = beam.value[..., None] + children.log_q
  # At temperature 0 nothing is drawn, and the likeliest nodes are the best.
  rank = jnp.where(_greedy(state), value, beam.value[..., None] + jnp.log(left))
  exists = children.scores > -jnp.inf
  value, rank = (jnp.where(exists, a, -jnp.inf) for a in (value, rank))
  return Scored(children.tokens, value, value, rank, children.law)


def _by_perturbation(
  state, beam, logits, depth, nodes, *, num_children, noise_fn, with_laws
) -> Scored:
  """Ranks drawn nodes by perturbed log-probability; the largest child has its parent's (RSD-S)."""
  children = children_lib.without_replacement(
    state, logits, depth, nodes, num_children, noise_fn=noise_fn, with_laws=with_laws
  )
  value = beam.value[..., None] + children.log_q
  perturbed = beam.value[..., None] + children.scores
  priority = draws.condition_on_maximum(perturbed, beam.priority)
  priority = jnp.where(_greedy(state), value, priority)
  priority = jnp.where(children.scores > -jnp.inf, priority, -jnp.inf)
  priority = lax.cummin(priority, axis=2)  # against rounding
  return Scored(children.tokens, value, priority, priority, children.law)


# --- Growing -------------------------------------------------------------------------------------


class _Plan(NamedTuple):
  """What tells one kind of tree from another."""

  candidates: Candidates
  rule: Rule
  beam_width: int  # W
  num_children: int  # K
  threshold: float  # on the exponential of the rank
  beam_only: bool = False  # are only nodes of the beam proposed?


class _Sizes(NamedTuple):
  """Numbers that follow from a plan and its limits."""

  num_nodes: int  # N
  max_depth: int  # D
  num_slots: int  # M
  num_candidates: int  # C, the root included


class _Growth(NamedTuple):
  """A tree that grows."""

  depth: jax.Array  # i32[] of the beam
  beam: Beam
  block: PyTree
  tokens: jax.Array  # i32[B, C]
  parents: jax.Array  # i32[B, C] candidates; -1 at the root
  rank: jax.Array  # f32[B, C] -inf for what is no candidate; inf at the root
  best: jax.Array  # f32[B, N - 1] the highest ranks so far, falling
  read: jax.Array  # i32[B, M] the candidate in each slot; C where there is none
  slot_tokens: jax.Array  # i32[B, M]
  ancestors: jax.Array  # bool[B, M, M]
  laws: jax.Array | None  # f32[B, 1 + M, V] of the children of the root, then of each slot's


def _dynamic_tree(expander, plan, num_nodes, max_depth, controller) -> Drafter:
  sizes = _sizes(plan, num_nodes, max_depth)
  max_drafts = sizes.num_nodes - 1
  shape = DraftShape(
    num_nodes=sizes.num_nodes,
    max_depth=sizes.max_depth,
    candidates=plan.candidates,
    widths=_widths(plan, controller, max_drafts),
  )

  def grow(params, state, *, noise_fn, with_laws):
    limit, wanted, ctl = start_round(params, state, controller, max_drafts)
    root, own, block = expander.begin(
      params, state, state.drafter.own, state.drafter.block,
      num_slots=sizes.num_slots, wanted=wanted,
    )  # fmt: skip
    left = state.prompt_length + state.max_new_tokens - state.length
    depth_limit = jnp.clip(left - 1, 0, sizes.max_depth)  # deeper drafts could not be emitted
    score = functools.partial(
      _score, state, plan, depth_limit, noise_fn=noise_fn,
      with_laws=with_laws and plan.candidates is not Candidates.DETERMINISTIC,
    )  # fmt: skip
    growth = _plant(state, root, block, score, plan, sizes, limit)

    def read_beam(growth):
      growth, nodes, offset = _take_slots(state, growth, plan)
      grown, block = expander.expand(params, state, own, growth.block, nodes, offset)
      logits = children_lib.penalize_paths(grown.logits, state, growth.slot_tokens, nodes.mask)
      scored = score(growth.beam, logits, growth.depth + 1, 1 + offset)
      growth = growth._replace(block=block, laws=_put_laws(growth.laws, scored.law, 1 + offset))
      return _add(growth, scored, plan, limit, _first_candidate(growth.depth, plan))

    def unfinished(growth):
      open_beam = growth.beam.priority.max(-1) > -jnp.inf
      live = state.result == Result.RUNNING
      return (growth.depth < sizes.max_depth) & jnp.any(open_beam & live)

    if sizes.max_depth > 1:
      growth = lax.while_loop(unfinished, read_beam, growth)
    proposal, slots = _harvest(growth, limit, sizes)
    return proposal, GrowthState(own, growth.block, slots, ctl)

  return growing_drafter(
    expander, shape, num_slots=sizes.num_slots, grow_fn=grow, controller=controller
  )


def _sizes(plan, num_nodes, max_depth) -> _Sizes:
  if num_nodes < 2 or max_depth < 1:
    raise ValueError(f'need num_nodes >= 2 and max_depth >= 1: {num_nodes=}, {max_depth=}')
  width, most = plan.beam_width, plan.num_children
  # A tree that branches is no deeper than N - 2. `DraftShape` takes a deeper one for a chain.
  deepest = num_nodes - 1 if max(width, most) == 1 else max(num_nodes - 2, 1)
  max_depth = min(max_depth, deepest)
  num_candidates = 1 + most + (max_depth - 1) * width * most
  reachable = 1 + width * max_depth if plan.beam_only else num_candidates
  num_nodes = min(num_nodes, reachable)
  return _Sizes(num_nodes, max_depth, max(max_depth - 1, 1) * width, num_candidates)


def _widths(plan, controller, max_drafts) -> tuple[int, ...]:
  """Returns the widths worth compiling for the target's call."""
  if controller is not None:
    return controllers.widths_of(controller, max_drafts)
  full = max_drafts + 1
  # A threshold leaves small trees where nothing is likely.
  return tuple(sorted({-(-full // 4), -(-full // 2), full})) if plan.threshold > 0 else ()


def _plant(state, root, block, score, plan, sizes, limit):
  """Returns the growth after the children of the root."""
  batch_size = state.length.shape[0]
  zeros = jnp.zeros((batch_size, 1), jnp.float32)
  beam = Beam(
    tokens=root_tokens(state)[:, None],
    candidate=jnp.zeros((batch_size, 1), jnp.int32),
    parents=jnp.full((batch_size, 1), -1, jnp.int32),
    value=zeros, priority=zeros, rank=zeros,
  )  # fmt: skip
  seen_by_root = jnp.zeros((batch_size, 1, sizes.num_slots), bool)
  nothing = jnp.zeros((batch_size, sizes.num_slots), jnp.int32)
  logits = children_lib.penalize_paths(root.logits, state, nothing, seen_by_root)
  scored = score(beam, logits, jnp.int32(1), 0)
  laws = None
  if scored.law is not None:
    laws = jnp.pad(scored.law, ((0, 0), (0, sizes.num_slots), (0, 0)))
  shape = (batch_size, sizes.num_candidates)
  growth = _Growth(
    depth=jnp.int32(0),
    beam=beam,
    block=block,
    tokens=jnp.zeros(shape, jnp.int32).at[:, :1].set(beam.tokens),
    parents=jnp.zeros(shape, jnp.int32).at[:, 0].set(-1),
    rank=jnp.full(shape, -jnp.inf).at[:, 0].set(jnp.inf),
    best=jnp.full((batch_size, sizes.num_nodes - 1), -jnp.inf),
    read=jnp.full((batch_size, sizes.num_slots), sizes.num_candidates, jnp.int32),
    slot_tokens=nothing,
    ancestors=jnp.zeros((batch_size, sizes.num_slots, sizes.num_slots), bool),
    laws=laws,
  )
  return _add(growth, scored, plan, limit, 1)


def _score(state, plan, depth_limit, beam, logits, depth, first_node, *, noise_fn, with_laws):
  """Returns the children of a beam, with what cannot be a node at rank and priority -inf."""
  nodes = first_node + jnp.arange(beam.tokens.shape[1])
  scored = plan.rule(state, beam, logits, depth, nodes, noise_fn=noise_fn, with_laws=with_laws)
  allowed = (depth <= depth_limit)[:, None, None] & (beam.priority > -jnp.inf)[..., None]
  # Rounding must not lift a child above its parent, or a later sibling above an earlier one.
  rank = jnp.minimum(lax.cummin(scored.rank, axis=2), beam.rank[..., None])
  if plan.threshold > 0:
    allowed = allowed & (rank >= np.log(plan.threshold))
  priority = jnp.minimum(scored.priority, beam.priority[..., None])
  return scored._replace(
    rank=jnp.where(allowed, rank, -jnp.inf),
    priority=jnp.where(allowed & (rank > -jnp.inf), priority, -jnp.inf),
  )


def _add(growth, scored, plan, limit, first):
  """Returns the growth with the children as candidates from `first` on, and the next beam."""
  batch_size = scored.tokens.shape[0]
  width = plan.beam_width
  tokens, value, priority, rank = (
    a.reshape(batch_size, -1) for a in (scored.tokens, scored.value, scored.priority, scored.rank)
  )
  candidate = first + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  taken = min(width, tokens.shape[1])
  best_priority, chosen = lax.top_k(priority, taken)
  if plan.beam_only:
    rows = jnp.arange(batch_size)[:, None]
    in_beam = jnp.zeros(rank.shape, bool).at[rows, chosen].set(True)
    rank = jnp.where(in_beam, rank, -jnp.inf)
  best = lax.top_k(jnp.concatenate([growth.best, rank], axis=1), growth.best.shape[1])[0]
  needed = jnp.take_along_axis(best, jnp.maximum(limit - 1, 0)[:, None], axis=1)
  needed = jnp.where(limit[:, None] > 0, needed, jnp.inf)
  # What no child can top is not worth reading.
  best_priority = jnp.where(best_priority > needed, best_priority, -jnp.inf)
  above = jnp.repeat(growth.beam.candidate, scored.tokens.shape[2], axis=1)
  slot = jnp.where(growth.depth > 0, _first_slot(growth.depth, width), -1)
  parent_slots = jnp.where(growth.depth > 0, slot + chosen // scored.tokens.shape[2], -1)

  def pick(values, fill):
    picked = jnp.take_along_axis(values, chosen, axis=1)
    return _widen(picked, width, fill)

  beam = Beam(
    tokens=pick(tokens, 0),
    candidate=_widen(candidate[chosen], width, 0),
    parents=_widen(parent_slots, width, -1),
    value=pick(value, 0.0),
    priority=_widen(best_priority, width, -jnp.inf),
    rank=pick(rank, -jnp.inf),
  )
  put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
  return growth._replace(
    depth=growth.depth + 1,
    beam=beam,
    tokens=put(growth.tokens, tokens),
    parents=put(growth.parents, above),
    rank=put(growth.rank, rank),
    best=best,
  )


def _take_slots(state, growth, plan) -> tuple[_Growth, Nodes, jax.Array]:
  """Returns the growth with slots for the beam, the beam ready to be read, and its first slot."""
  beam, width = growth.beam, plan.beam_width
  num_slots = growth.read.shape[1]
  offset = _first_slot(growth.depth, width)
  above = jnp.take_along_axis(growth.ancestors, jnp.maximum(beam.parents, 0)[:, :, None], axis=1)
  itself = jnp.arange(num_slots)[None] == offset + jnp.arange(width)[:, None]
  mask = (above & (beam.parents >= 0)[:, :, None]) | itself[None]
  put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=offset, axis=1)
  exists = beam.priority > -jnp.inf
  growth = growth._replace(
    read=put(growth.read, jnp.where(exists, beam.candidate, growth.tokens.shape[1])),
    slot_tokens=put(growth.slot_tokens, beam.tokens),
    ancestors=put(growth.ancestors, mask),
  )
  positions = jnp.broadcast_to(state.length[:, None] - 1 + growth.depth, beam.tokens.shape)
  return growth, Nodes(beam.tokens, positions, beam.parents, mask), offset


def _harvest(growth, limit, sizes) -> tuple[Proposal, jax.Array]:
  """Returns the best candidates as a proposal, and the slot i32[B, N] of each; -1 for none."""
  batch_size = growth.tokens.shape[0]
  rows = jnp.arange(batch_size)[:, None]
  # Of equal ranks the first wins, so parents and earlier siblings come before what needs them.
  rank, chosen = lax.top_k(growth.rank, sizes.num_nodes)
  wanted = (rank > -jnp.inf) & (jnp.arange(sizes.num_nodes)[None] <= limit[:, None])
  keep = jnp.zeros(growth.tokens.shape, bool).at[rows, chosen].set(wanted)
  place, parents, valid = trees.compact_nodes(keep, growth.parents, sizes.num_nodes)
  slot_of = jnp.full((batch_size, sizes.num_candidates), -1, jnp.int32)
  slot_of = slot_of.at[rows, growth.read].set(
    jnp.arange(sizes.num_slots, dtype=jnp.int32)[None], mode='drop'
  )
  slots = jnp.where(valid, jnp.take_along_axis(slot_of, place, axis=1), -1)
  laws = growth.laws
  if laws is not None:
    laws = jnp.take_along_axis(laws, (1 + slots)[:, :, None], axis=1)  # of leaves: any
  tokens = jnp.take_along_axis(growth.tokens, place, axis=1)
  return Proposal(tokens, parents, valid, laws), slots


def _first_slot(depth, width):
  """Returns i32[], the first slot of the beam at `depth`."""
  return (depth - 1) * width


def _first_candidate(depth, plan):
  """Returns i32[], the first candidate among the children of the beam at `depth` of at least 1."""
  return 1 + plan.num_children + (depth - 1) * plan.beam_width * plan.num_children


def _put_laws(laws, law, first):
  if laws is None:
    return None
  return lax.dynamic_update_slice_in_dim(laws, law, first, 1)


def _widen(values, width, fill):
  """Returns [B, W], values with `fill` behind them."""
  missing = width - values.shape[1]
  return jnp.pad(values, ((0, 0), (0, missing)), constant_values=fill) if missing else values


def _greedy(state: DecodeState):
  return (state.sampling.temperature == 0)[:, None, None]


def _drawn(most: int) -> Candidates:
  """Returns what drawn candidates are, if no more than `most` nodes share a depth."""
  return Candidates.SAMPLED if most == 1 else Candidates.COMPETING


def _check_width(expander, width):
  if not 1 <= width <= num_choices(expander):
    raise ValueError(
      f'a beam, and the children of a node, must be 1 to {num_choices(expander)}: {width}'
    )
  return width

"""How a chain is drafted: token by token, each from the law of a model that has read the last.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import controllers
from decodax import sampling as sampling_lib
from decodax.controllers import Controller
from decodax.controllers import DraftStep
from decodax.decode import root_tokens
from decodax.decode import round_keys
from decodax.drafters.expander import Expander
from decodax.drafters.expander import Grown
from decodax.drafters.expander import GrowthState
from decodax.drafters.expander import Nodes
from decodax.drafters.expander import growing_drafter
from decodax.drafters.expander import start_round
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import PyTree
from decodax.types import Result


class Draft(NamedTuple):
  """One drafted token."""

  token: jax.Array  # i32[B]
  law: jax.Array | None  # f32[B, V] logits of the law it was drawn from, if wanted
  seen: jax.Array | None  # bool[B, V] tokens of the row with this one, if there is a penalty


def draw(
  state: DecodeState,
  logits: jax.Array,
  seen: jax.Array | None,
  depth: jax.Array,
  *,
  noise_fn: Callable,
  with_laws: bool,
) -> Draft:
  """Returns the token at `depth` drawn from the drafter's logits f32[B, V], warped as the target's.

  Args:
    state: for keys and sampling values.
    logits: f32[B, V], raw.
    seen: bool[B, V], tokens before this one; None without a repetition penalty.
    depth: i32[], 1 for the child of the root.
    noise_fn: the verifier's `draft_noise`.
    with_laws: return the law too.
  """
  if seen is not None:
    logits = sampling_lib.penalize(logits, seen, state.sampling.repetition_penalty)

  def sample():
    law = sampling_lib.warp(logits, state.sampling)
    gumbel = noise_fn(round_keys(state), logits.shape[-1], depth)
    return sampling_lib.argmax(law + gumbel), law if with_laws else None

  def take_best():
    return sampling_lib.argmax(logits), logits if with_laws else None

  live = state.result == Result.RUNNING
  token, law = lax.cond(sampling_lib.any_sampled(state.sampling, live), sample, take_best)
  if seen is not None:
    seen = sampling_lib.mark_seen(seen, token[:, None], jnp.ones_like(token, bool)[:, None])
  return Draft(token, law, seen)


def chain_drafter(
  expander: Expander,
  *,
  num_drafts: int,
  controller: Controller | None = None,
  may_lag: bool = False,
) -> Drafter:
  """Returns a drafter that samples a chain, of a length that a controller may shorten.

  With a controller, drafting ends when every live row has stopped, rows that stopped earlier
  propose the drafts they made until then, and the target's call is as wide as the longest needs.

  Args:
    expander: the model that drafts.
    num_drafts: D, tokens drafted a round at most.
    controller: of the length; None drafts `num_drafts` always.
    may_lag: accepted tokens may be another drafter's, so that the model may be far behind.

  Raises:
    ValueError: if num_drafts < 1.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  num_slots = max(num_drafts - 1, 1)  # the last draft is never read
  shape = DraftShape(
    num_nodes=num_drafts + 1,
    max_depth=num_drafts,
    candidates=Candidates.SAMPLED,
    widths=() if controller is None else controllers.widths_of(controller, num_drafts),
  )

  def grow(params, state, *, noise_fn, with_laws):
    limit, wanted, ctl = start_round(params, state, controller, num_drafts)
    if may_lag and wanted is None:
      wanted = state.result == Result.RUNNING
    own, block = state.drafter.own, state.drafter.block
    root, own, block = expander.begin(params, state, own, block, num_slots=num_slots, wanted=wanted)

    def draw_after(grown, seen, depth):
      return draw(state, grown.logits[:, 0], seen, depth, noise_fn=noise_fn, with_laws=with_laws)

    def expand(draft, block, slot):
      nodes = _chain_node(state, draft.token, slot, num_slots)
      return expander.expand(params, state, own, block, nodes, slot)

    if controller is None:
      tokens, laws, block = _draft_all(state, root, block, draw_after, expand, num_drafts)
      made = limit
    else:
      stop = _stop_rule(params, controller, limit)
      run = _draft_until(state, root, block, draw_after, expand, stop, ctl, limit, num_drafts)
      tokens, laws, block, made, ctl = run.tokens, run.laws, run.block, run.made, run.ctl
    proposal = chain_proposal(root_tokens(state), tokens, made, laws)
    return proposal, GrowthState(own, block, _chain_slots(made, num_drafts + 1), ctl)

  return growing_drafter(expander, shape, num_slots=num_slots, grow_fn=grow, controller=controller)


def _chain_node(state, token, slot, num_slots):
  """Returns the draft of slot i32[] as `Nodes`: it sees all slots before its own."""
  batch_size = token.shape[0]
  return Nodes(
    tokens=token[:, None],
    positions=state.length[:, None] + slot,
    parents=jnp.full((batch_size, 1), slot - 1, jnp.int32),
    mask=jnp.broadcast_to(jnp.arange(num_slots) <= slot, (batch_size, 1, num_slots)),
  )


def _chain_slots(made, num_nodes):
  """Returns i32[B, N]: draft i of a chain is in slot i - 1, and the last one made in none."""
  node = jnp.arange(num_nodes, dtype=jnp.int32)[None]
  return jnp.where((node > 0) & (node < made[:, None]), node - 1, -1)


def _draft_all(state, root, block, draw_after, expand, num_drafts):
  """Returns (drafts i32[B, D], laws f32[B, D, V] or None, block) of a chain of D drafts."""
  first = draw_after(root, state.seen, jnp.int32(1))

  def step(carry, slot):
    draft, block = carry
    grown, block = expand(draft, block, slot)
    following = draw_after(grown, draft.seen, slot + 2)
    return (following, block), (following.token, following.law)

  (_, block), (tokens, laws) = lax.scan(step, (first, block), jnp.arange(num_drafts - 1))
  tokens = jnp.concatenate([first.token[None], tokens]).swapaxes(0, 1)
  if first.law is not None:
    laws = jnp.concatenate([first.law[None], laws]).swapaxes(0, 1)
  return tokens, laws, block


class _Run(NamedTuple):
  """A chain being drafted under a controller."""

  index: jax.Array  # i32[] drafts made, in the rows that make any
  draft: Draft  # the last of them
  block: PyTree
  tokens: jax.Array  # i32[B, D]
  laws: jax.Array | None  # f32[B, D, V]
  made: jax.Array  # i32[B]
  going: jax.Array  # bool[B] rows that draft on
  ctl: PyTree


def _draft_until(state, root, block, draw_after, expand, stop, ctl, limit, num_drafts):
  """Returns the `_Run` after which no live row drafts on."""
  batch_size, vocab_size = root.logits.shape[0], root.logits.shape[-1]
  going = (state.result == Result.RUNNING) & (limit > 0)
  first = _draw_if(going.any(), lambda: draw_after(root, state.seen, jnp.int32(1)))
  laws = None
  if first.law is not None:
    laws = jnp.zeros((batch_size, num_drafts, vocab_size), first.law.dtype)
  run = _Run(
    index=jnp.int32(0), draft=first, block=block, laws=laws, going=going, ctl=ctl,
    tokens=jnp.zeros((batch_size, num_drafts), jnp.int32),
    made=jnp.zeros((batch_size,), jnp.int32),
  )  # fmt: skip

  def step(run):
    grown, block = expand(run.draft, run.block, run.index - 1)
    draft = draw_after(grown, run.draft.seen, run.index + 1)
    return stop(_record(run._replace(block=block), draft), grown)

  run = stop(_record(run, first), root)
  return lax.while_loop(lambda run: run.going.any(), step, run)


def _record(run, draft):
  """Returns the run with one more draft, in the rows that are going."""
  laws = run.laws
  if laws is not None:
    laws = lax.dynamic_update_slice_in_dim(laws, draft.law[:, None], run.index, 1)
  tokens = lax.dynamic_update_slice_in_dim(run.tokens, draft.token[:, None], run.index, 1)
  return run._replace(
    index=run.index + 1, draft=draft, tokens=tokens, laws=laws, made=run.made + run.going
  )


def _stop_rule(params, controller, limit):
  """Returns the function that asks the controller after a draft which rows go on."""

  def stop(run: _Run, grown: Grown) -> _Run:
    step = DraftStep(run.index, run.draft.token, grown.logits[:, 0], grown.hidden[:, 0])
    stopped, ctl = controller.should_stop(params.controller, run.ctl, step)
    stopped = stopped & (run.index >= controller.min_drafts)
    return run._replace(
      ctl=controllers.keep_rows(run.going, ctl, run.ctl),
      going=run.going & ~stopped & (run.index < limit),
    )

  return stop


def _draw_if(wanted, draw_fn):
  """Returns the draft, or zeros without the work unless wanted bool[]."""
  like = jax.eval_shape(draw_fn)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
  return lax.cond(wanted, draw_fn, lambda: zeros)

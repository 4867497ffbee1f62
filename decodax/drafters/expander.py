"""How a language model grows a round's drafts: the root, then many nodes per forward pass.

An `Expander` is the part of a drafter that runs a model. What is drafted from its logits is for
`chain`, `static_tree` and `dynamic_tree` to say, which work with every expander.

The nodes that are read live in the *slots* of a scratch block. A draft that is never read, because
nothing was to follow it, has no slot.

Axes: `B` batch, `W` nodes read at once, `M` slots, `N` proposal nodes, `D` depth, `V` vocabulary,
`C` tokens of a chunk, `K` nodes of a path.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import controllers
from decodax.decode import root_tokens
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Model
from decodax.types import Params
from decodax.types import Proposal
from decodax.types import PyTree
from decodax.types import Result

MAX_LAG = 2  # tokens a round leaves unread: the root, and the accepted draft before it if it had no
# slot. Drafts that have children were read, so there is at most one.
_CATCH_UP = 16  # tokens read at once after rounds without drafting


class Nodes(NamedTuple):
  """W nodes of one depth, to be read into consecutive slots.

  All of them are drafts; the root is read before.
  """

  tokens: jax.Array  # i32[B, W]
  positions: jax.Array  # i32[B, W]
  parents: jax.Array  # i32[B, W] slots; -1 for children of the root
  mask: jax.Array  # bool[B, W, M] which slots each one sees: its ancestors and itself


class Grown(NamedTuple):
  """What the model says after reading W nodes."""

  hidden: jax.Array  # f[B, W, hidden]
  logits: jax.Array  # f32[B, W, V] of each one's successor


class Expander(NamedTuple):
  """A model that reads the nodes of a tree that is still growing."""

  init: Callable[..., tuple[PyTree, PyTree]]
  """(params, request, capacity, num_slots) -> its own state, an empty block of M slots."""
  prefill: Callable[..., PyTree]
  """(params, own, tokens i32[B, C], positions i32[B, C], count i32[B], output) -> own."""
  begin: Callable[..., tuple[Grown, PyTree, PyTree]]
  """(params, state: DecodeState, own, block, *, num_slots, wanted: bool[B] | None) -> the root as
  `Grown` with W = 1, own, block. If no row is wanted nothing is read and `Grown` is zeros; None is
  all rows, in rounds that follow one another without a gap."""
  expand: Callable[..., tuple[Grown, PyTree]]
  """(params, state: DecodeState, own, block, nodes: Nodes, offset i32[]) -> the nodes, read into
  the slots from `offset` on, and the block. Does not change `own`."""
  commit: Callable[..., PyTree]
  """(own, block, slots i32[B, K], count i32[B]) -> own, after the first `count` slots of each row
  were accepted."""
  vocab_size: int
  observe: Callable[..., PyTree] | None = None
  """(params, own, observation, state: DecodeState after the round) -> own: what the target's own
  pass over the proposal teaches. Called after `commit`."""
  max_depth: int | None = None  # of the deepest draft it can make; None: any
  draft_vocab_size: int | None = None  # tokens it ever drafts; None: all


class GrowthState(NamedTuple):
  """What a drafter around an expander carries from round to round."""

  own: PyTree  # the expander's
  block: PyTree  # entries of this round's slots
  slots: jax.Array  # i32[B, N] the slot of each node; -1 if it has none
  controller: PyTree  # of the length control; () without


class DraftModelState(NamedTuple):
  """What an independent draft model carries."""

  cache: PyTree  # its own cache
  length: jax.Array  # i32[B] tokens in it


def model_expander(model: Model, *, draft_vocab_size: int | None = None) -> Expander:
  """Returns the expander of an independent draft model; its parameters are `Params.drafter`.

  Its cache gets the accepted drafts that were read, and the rest of what was emitted at the start
  of the next round. After rounds without drafting that may be many tokens.

  Args:
    model: the draft model; its vocabulary must be the target's.
    draft_vocab_size: how many tokens have a logit above -inf, if not all.

  Raises:
    ValueError: if the model has no scratch blocks.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
  """
  init_scratch = _require_scratch(model)

  def init(params, request, capacity, num_slots):
    batch_size = request.tokens.shape[0]
    own = DraftModelState(
      cache=model.init_cache(params.drafter, batch_size, capacity + _CATCH_UP),
      length=jnp.zeros((batch_size,), jnp.int32),
    )
    return own, init_scratch(params.drafter, batch_size, num_slots)

  def read(params, own, tokens, positions, count):
    """Returns (hidden f[B, 1, hidden] of each row's last token, own with `count` committed)."""
    batch_size, width = tokens.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (batch_size, width, width))
    output, block = model.extend(params.drafter, own.cache, tokens, positions, mask)
    path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    return jnp.take_along_axis(output.hidden, last, axis=1), DraftModelState(
      cache=model.commit(own.cache, block, path, count), length=own.length + count
    )

  def read_unread(params, state, own, width):
    count = jnp.clip(state.length - own.length, 0, width)
    positions = own.length[:, None] + jnp.arange(width)[None]
    tokens = jnp.take_along_axis(state.tokens, positions, axis=1, mode='clip')
    return (*read(params, own, tokens, positions, count), count > 0)

  def catch_up(params, state, own, wanted):
    """Returns what `read` does, after as many passes as the wanted row furthest behind needs."""
    shape = jax.eval_shape(lambda: read_unread(params, state, own, MAX_LAG)[0])
    carry = jnp.zeros(shape.shape, shape.dtype), own
    for width, allowed in ((_CATCH_UP, MAX_LAG), (MAX_LAG, 0)):

      def is_behind(carry, allowed=allowed):
        behind = state.length - carry[1].length > allowed
        return jnp.any(wanted) & jnp.any(wanted & behind)

      def step(carry, width=width):
        hidden, own, some = read_unread(params, state, carry[1], width)
        return jnp.where(some[:, None, None], hidden, carry[0]), own

      carry = lax.while_loop(is_behind, step, carry)
    return carry

  def prefill(params, own, tokens, positions, count, output):
    del output
    return read(params, own, tokens, positions, count)[1]

  def begin(params, state, own, block, *, num_slots, wanted):
    del num_slots
    if wanted is None:
      hidden, own, _ = read_unread(params, state, own, MAX_LAG)
      return Grown(hidden, model.unembed(params.drafter, hidden)), own, block
    hidden, own = catch_up(params, state, own, wanted)
    return _unembed_if(wanted.any(), model, params.drafter, hidden), own, block

  def expand(params, state, own, block, nodes, offset):
    del state
    output, block = model.extend(
      params.drafter, own.cache, nodes.tokens, nodes.positions, nodes.mask,
      scratch=block, offset=offset,
    )  # fmt: skip
    return Grown(output.hidden, model.unembed(params.drafter, output.hidden)), block

  def commit(own, block, slots, count):
    return DraftModelState(
      cache=model.commit(own.cache, block, slots, count), length=own.length + count
    )

  return Expander(
    init, prefill, begin, expand, commit, model.vocab_size, draft_vocab_size=draft_vocab_size
  )


def exit_expander(exit_model: Model) -> Expander:
  """Returns the expander of a truncated target, on the target's own parameters and cache.

  It keeps no state: what the target commits is what it reads. The root, which is not in the
  target's cache yet, takes a slot of its own before the others.

  Args:
    exit_model: the target cut short: its `extend` reads the target's cache and parameters and runs
      only the first layers. With `models`: `as_model(transformer, exit_layer=...)`.

  Raises:
    ValueError: if the model has no scratch blocks.

  Source: Draft & Verify, arXiv:2309.08168; LayerSkip, arXiv:2404.16710.
  """
  init_scratch = _require_scratch(exit_model)

  def init(params, request, capacity, num_slots):
    del capacity
    return (), init_scratch(params.target, request.tokens.shape[0], 1 + num_slots)

  def prefill(params, own, tokens, positions, count, output):
    del params, tokens, positions, count, output
    return own

  def extend(params, state, block, tokens, positions, mask, slot):
    """Returns (hidden f[B, W, hidden], block) of nodes read into the slots from `slot` on."""
    mask = jnp.pad(mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)  # all see the root
    output, block = exit_model.extend(
      params.target, state.cache, tokens, positions, mask, scratch=block, offset=slot
    )
    return output.hidden, block

  def begin(params, state, own, block, *, num_slots, wanted):
    def read():
      mask = jnp.zeros((state.length.shape[0], 1, num_slots), bool)
      root, position = root_tokens(state)[:, None], state.length[:, None] - 1
      return extend(params, state, block, root, position, mask, 0)

    if wanted is None:
      hidden, block = read()
      return Grown(hidden, exit_model.unembed(params.target, hidden)), own, block
    like = jax.eval_shape(read)[0]
    hidden, block = lax.cond(wanted.any(), read, lambda: (jnp.zeros(like.shape, like.dtype), block))
    return _unembed_if(wanted.any(), exit_model, params.target, hidden), own, block

  def expand(params, state, own, block, nodes, offset):
    del own
    hidden, block = extend(
      params, state, block, nodes.tokens, nodes.positions, nodes.mask, offset + 1
    )
    return Grown(hidden, exit_model.unembed(params.target, hidden)), block

  def commit(own, block, slots, count):
    del block, slots, count
    return own

  return Expander(init, prefill, begin, expand, commit, exit_model.vocab_size)


def growing_drafter(
  expander: Expander,
  shape: DraftShape,
  *,
  num_slots: int,
  grow_fn: Callable[..., tuple[Proposal, GrowthState]],
  controller: controllers.Controller | None = None,
) -> Drafter:
  """Returns the drafter that grows its proposals with an expander; its state is a `GrowthState`.

  After the round the accepted nodes that were read are committed, root first, and the controller
  learns.

  Args:
    expander: the model that drafts.
    shape: what is proposed.
    num_slots: M, nodes read a round at most.
    grow_fn: (params, state: DecodeState, *, noise_fn, with_laws) -> the proposal and its own
      `GrowthState`, the old one being `state.drafter`.
    controller: of the length; `grow_fn` asks it, here it is only started and taught.

  Raises:
    ValueError: if the shape is deeper than the model can draft.
  """

  def init(params, request, capacity):
    batch_size = request.tokens.shape[0]
    own, block = expander.init(params, request, capacity, num_slots)
    return GrowthState(
      own=own,
      block=block,
      slots=jnp.full((batch_size, shape.num_nodes), -1, jnp.int32),
      controller=() if controller is None else controller.init(batch_size),
    )

  def prefill(params, drafter_state, tokens, positions, count, output):
    own = expander.prefill(params, drafter_state.own, tokens, positions, count, output)
    return drafter_state._replace(own=own)

  def observe(params, drafter_state, observation, state):
    slots, count = _accepted_slots(drafter_state.slots, observation.verdict)
    ctl = drafter_state.controller
    if controller is not None:
      feedback = controllers.feedback_of(observation)
      new = controller.update(params.controller, ctl, feedback)
      ctl = controllers.keep_rows(feedback.live, new, ctl)
    own = expander.commit(drafter_state.own, drafter_state.block, slots, count)
    if expander.observe is not None:
      own = expander.observe(params, own, observation, state)
    return drafter_state._replace(own=own, controller=ctl)

  if expander.max_depth is not None and shape.max_depth > expander.max_depth:
    raise ValueError(
      f'the model drafts {expander.max_depth} tokens ahead at most, {shape.max_depth} are asked for'
    )
  shape = shape._replace(vocab_size=expander.vocab_size)
  return Drafter(shape=shape, init=init, prefill=prefill, propose=grow_fn, observe=observe)


def num_choices(expander: Expander) -> int:
  """Returns how many tokens an expander can ever draft."""
  return expander.draft_vocab_size or expander.vocab_size


def start_round(
  params: Params, state: DecodeState, controller: controllers.Controller | None, max_drafts: int
) -> tuple[jax.Array, jax.Array | None, PyTree]:
  """Returns (the most drafts i32[B], the rows wanted bool[B] for `Expander.begin` or None, ctl)."""
  ctl = state.drafter.controller
  if controller is None:
    return jnp.full_like(state.length, max_drafts), None, ctl
  limit, ctl = controller.start(params.controller, ctl, state)
  limit = jnp.clip(limit, min(controller.min_drafts, max_drafts), max_drafts).astype(jnp.int32)
  if controller.min_drafts > 0:
    return limit, None, ctl
  return limit, (limit > 0) & (state.result == Result.RUNNING), ctl


def _accepted_slots(slots, verdict):
  """Returns (i32[B, D] slots of the accepted path, i32[B] how many of them were read)."""
  on_path = jnp.take_along_axis(slots, verdict.path[:, 1:], axis=1)
  accepted = jnp.arange(on_path.shape[1])[None] < verdict.num_accepted[:, None]
  was_read = jnp.cumprod(accepted & (on_path >= 0), axis=-1, dtype=jnp.int32)
  return jnp.maximum(on_path, 0), was_read.sum(-1, dtype=jnp.int32)


def _unembed_if(wanted, model, params, hidden):
  """Returns the `Grown` of hidden f[B, W, hidden], with zeros for logits unless wanted bool[]."""

  def unembed():
    return model.unembed(params, hidden)

  like = jax.eval_shape(unembed)
  logits = lax.cond(wanted, unembed, lambda: jnp.zeros(like.shape, like.dtype))
  return Grown(hidden, logits)


def _require_scratch(model):
  if model.init_scratch is None:
    raise ValueError('the drafting model needs init_scratch, to draft without committing')
  return model.init_scratch

"""Which positions a denoising step recomputes, and whose keys and values it takes from before.

In a bidirectional network every key and value changes with every token, so reusing one is an
approximation, and each rule here says which. In a block-causal network a finished block never
changes, and `block_causal` is exact. All of them are `extend` over some positions and `commit` of
some nodes: `Model`'s protocol is all they know of a network.

Axes: `B` batch, `L` positions, `Q` recomputed positions, `W` window slots.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax.diffusion.scores import summarize
from decodax.diffusion.types import Board
from decodax.diffusion.types import CacheRule
from decodax.diffusion.types import MaskedModel
from decodax.diffusion.types import Reading
from decodax.types import PyTree

# --- One forward pass over chosen positions -------------------------------------------------------


class _Pass(NamedTuple):
  """What `extend` gave for the Q nodes, shadows apart."""

  hidden: jax.Array  # f[B, Q, hidden]
  shadow: jax.Array | None  # f[B, W, hidden]
  block: PyTree


def _extend(params, net: MaskedModel, cache, board: Board, nodes, seen, width, shadow) -> _Pass:
  """Returns one forward pass over positions nodes i32[B, Q], of which seen bool[B, Q] are keys.

  Shadows are W more nodes, MASK at the window's positions. Nobody outside sees them; each sees what
  the others see but the node at its own position, and every shadow.
  """
  nodes = jnp.clip(nodes, 0, board.tokens.shape[1] - 1)
  tokens = jnp.take_along_axis(board.tokens, nodes, axis=1)
  mask = jnp.broadcast_to(seen[:, None, :], (*nodes.shape, nodes.shape[1]))
  if net.block_size is not None:
    mask = mask & (nodes[:, None, :] // net.block_size <= nodes[:, :, None] // net.block_size)
  if shadow:
    tokens, nodes, mask = _append_shadows(tokens, nodes, mask, seen, net, board, width)
  output, block = net.model.extend(params, cache, tokens, nodes, mask)
  num_own = tokens.shape[1] - (width if shadow else 0)
  return _Pass(output.hidden[:, :num_own], output.hidden[:, num_own:] if shadow else None, block)


def _append_shadows(tokens, nodes, mask, seen, net, board, width):
  own = board.start[:, None] + jnp.arange(width)[None]
  real = own < board.length[:, None]
  of_nodes = seen[:, None, :] & (nodes[:, None, :] != own[:, :, None])
  if net.block_size is not None:
    of_nodes &= nodes[:, None, :] // net.block_size <= own[:, :, None] // net.block_size
  of_shadows = jnp.broadcast_to(real[:, None, :], (*own.shape, width))
  below = jnp.concatenate([of_nodes, of_shadows], axis=2)
  mask = jnp.concatenate([jnp.pad(mask, ((0, 0), (0, 0), (0, width))), below], axis=1)
  tokens = jnp.concatenate([tokens, jnp.full_like(own, net.mask_id)], axis=1)
  return tokens, jnp.concatenate([nodes, own], axis=1), mask


def _window(array, offset, width):
  """Returns array[B, offset[b] : offset[b] + width], clipped; array is [B, Q, ...]."""
  index = offset[:, None] + jnp.arange(width)[None]
  index = index.reshape(*index.shape, *[1] * (array.ndim - 2))
  return jnp.take_along_axis(array, jnp.clip(index, 0, array.shape[1] - 1), axis=1)


def _whole(params, net, cache, board, width, shadow) -> _Pass:
  """Returns a pass over every position of prompt and canvas, with `hidden` at every one."""
  nodes = _all_positions(board)
  return _extend(params, net, cache, board, nodes, nodes < board.length[:, None], width, shadow)


def _all_positions(board):
  return jnp.broadcast_to(jnp.arange(board.tokens.shape[1])[None], board.tokens.shape)


def _empty(params, net, board, capacity=1):
  return net.model.init_cache(params, board.tokens.shape[0], capacity)


def _select_rows(rows, new, old, net, params):
  """Returns the cache with `rows` bool[B] taken from `new`, whatever a cache is made of.

  The batch axis of each array is the one that grows with the batch.
  """
  batch_size = rows.shape[0]

  def shape_of(batch):
    return jax.eval_shape(lambda p: net.model.init_cache(p, batch, 1), params)

  def pick(small, large, new, old):
    axes = [
      axis for axis, (n, m) in enumerate(zip(small.shape, large.shape, strict=True)) if n != m
    ]
    if len(axes) != 1:
      raise ValueError(f'the cache needs one batch axis per array: {small.shape=}, {large.shape=}')
    return jnp.where(rows.reshape([-1 if a == axes[0] else 1 for a in range(new.ndim)]), new, old)

  return jax.tree.map(pick, shape_of(batch_size), shape_of(batch_size + 1), new, old)


def _where_rows(rows, new, old):
  """Returns the tree of `new` in rows bool[B] and of `old` elsewhere; arrays lead with B."""
  return jax.tree.map(lambda n, o: jnp.where(rows.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def _zeros_like(fn):
  """Returns zeros in the shape of what `fn()` returns."""
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn))


# --- No cache -------------------------------------------------------------------------------------


def no_cache() -> CacheRule:
  """Returns the rule that recomputes every position in every step.

  Exact, and what the other rules are compared with.
  """

  def init(params, board, *, net, width):
    del width
    return _empty(params, net, board)

  def read(params, state, board, *, net, width, shadow):
    done = _whole(params, net, state, board, width, shadow)
    hidden = _window(done.hidden, board.start - net.shifted, width)
    return Reading(hidden, board.length, done.shadow), state

  def branch(params, state, board, candidates, *, net, width):
    num = candidates.shape[1]
    many = jax.tree.map(lambda a: jnp.repeat(a, num, axis=0), board)
    slots = board.start[:, None] + jnp.arange(width)[None]
    where = jnp.repeat(jnp.where(slots < board.length[:, None], slots, 1 << 30), num, axis=0)
    rows = jnp.arange(where.shape[0])[:, None]
    tokens = many.tokens.at[rows, where].set(candidates.reshape(where.shape), mode='drop')
    many = many._replace(tokens=tokens)
    empty = _empty(params, net, many)
    reading, _ = read(params, empty, many, net=net, width=width, shadow=False)
    hidden = reading.hidden.reshape(*candidates.shape, -1)
    return Reading(hidden, reading.num_queries.reshape(-1, num).sum(-1)), state

  return CacheRule('none', 'exact', init, read, branch)


# --- Frozen prefix, frozen prefix and suffix ------------------------------------------------------


def prefix_cache(refresh: int | None = None) -> CacheRule:
  """Returns the rule that freezes what stands before the block and recomputes the rest.

  Keys and values before the block are those of the block's first forward, which is a whole one.
  Approximate for a bidirectional network: in the end the prefix would have seen the block's tokens.

  Args:
    refresh: forwards from one whole one to the next within a block; None: once per block. With 1
      nothing is ever stale.

  Source: Fast-dLLM, arXiv:2505.22618, section 3.2.
  """
  return _frozen('prefix', refresh, keep_suffix=False)


def dual_cache(refresh: int | None = None) -> CacheRule:
  """Returns the rule that freezes everything outside the window and recomputes the window.

  As `prefix_cache`, with the masked suffix frozen too: a step costs W positions instead of the rest
  of the canvas. Approximate, and the riskier of the two.

  Source: Fast-dLLM, arXiv:2505.22618, section 3.2 (DualCache).
  """
  return _frozen('dual', refresh, keep_suffix=True)


def _frozen(name, refresh, *, keep_suffix):
  if refresh is not None and refresh < 1:
    raise ValueError(f'refresh must be at least 1, or None: {refresh=}')

  def init(params, board, *, net, width):
    del width
    _refuse_block_causal(net, name)
    return _empty(params, net, board, board.tokens.shape[1] + 1)

  def read(params, state, board, *, net, width, shadow):
    first = board.start - net.shifted  # a shifted head reads the slot before the window
    nodes = _all_positions(board)

    def whole():
      done = _whole(params, net, _empty(params, net, board), board, width, shadow)
      keep = nodes < first[:, None]
      if keep_suffix:
        behind = (nodes >= board.start[:, None] + width) & (nodes < board.length[:, None])
        keep = keep | behind
      order = jnp.argsort(~keep, axis=1, stable=True).astype(jnp.int32)
      empty = _empty(params, net, board, board.tokens.shape[1] + 1)
      count = jnp.where(due, keep.sum(-1, dtype=jnp.int32), 0)
      cache = net.model.commit(empty, done.block, order, count)
      cache = _select_rows(due, cache, state, net, params)
      hidden = _window(done.hidden, first, width)
      return Reading(hidden, board.length, done.shadow), cache

    def part():
      num_nodes = width + net.shifted if keep_suffix else board.tokens.shape[1]
      some = first[:, None] + jnp.arange(num_nodes)[None]
      seen = some < board.length[:, None]
      done = _extend(params, net, state, board, some, seen, width, shadow)
      return Reading(done.hidden[:, :width], seen.sum(-1, dtype=jnp.int32), done.shadow)

    due = board.block_step == 0
    if refresh is not None:
      due = board.block_step % refresh == 0
    return _read_either(board, due, whole, part, state)

  return CacheRule(name, 'approximate: what is outside the window is stale', init, read)


def _read_either(board, due, whole, part, state):
  """Returns (reading, state): of `whole()` in rows where it is due, of `part()` elsewhere."""
  some_due = jnp.any(due & board.live)
  others = jnp.any(~due & board.live)
  fresh, state = lax.cond(some_due, whole, lambda: (_zeros_like(part), state))
  stale = lax.cond(others, part, lambda: _zeros_like(part))
  return _where_rows(due, fresh, stale), state


def _refuse_block_causal(net, name):
  if net.block_size is not None:
    raise ValueError(
      f'the {name} cache is for networks in which every token sees every other; for a block-causal '
      f'one (block_size={net.block_size}) block_causal_cache() is exact'
    )


# --- Delayed cache --------------------------------------------------------------------------------


class _Delayed(NamedTuple):
  cache: PyTree
  stored: jax.Array  # bool[B, L]


def delayed_cache(refresh: int = 8) -> CacheRule:
  """Returns the rule that stores a token's keys and values one forward after it was written.

  A token's representation changes most when it takes the place of MASK, so it is recomputed once
  with the token in place, and then kept. Masks are recomputed in every step. Every `refresh`
  forwards of a row all of it is recomputed. Approximate; with refresh=1 nothing is ever stale.

  Raises:
    ValueError: if refresh < 1.

  Source: dKV-Cache, arXiv:2505.15781, the decode variant.
  """
  if refresh < 1:
    raise ValueError(f'refresh must be at least 1: {refresh=}')

  def init(params, board, *, net, width):
    del width
    _refuse_block_causal(net, 'delayed')
    # Commits write L slots at a row's length.
    cache = _empty(params, net, board, 2 * board.tokens.shape[1] + 1)
    return _Delayed(cache, jnp.zeros_like(board.decoded))

  def read(params, state, board, *, net, width, shadow):
    first = board.start - net.shifted
    nodes = _all_positions(board)
    within = nodes < board.length[:, None]

    def whole(state):
      done = _whole(params, net, _empty(params, net, board), board, width, shadow)
      order = jnp.argsort(~board.decoded, axis=1, stable=True).astype(jnp.int32)
      empty = _empty(params, net, board, 2 * board.tokens.shape[1] + 1)
      count = board.decoded.sum(-1, dtype=jnp.int32)
      cache = net.model.commit(empty, done.block, order, jnp.where(due, count, 0))
      cache = _select_rows(due, cache, state.cache, net, params)
      stored = jnp.where(due[:, None], board.decoded, state.stored)
      reading = Reading(_window(done.hidden, first, width), board.length, done.shadow)
      return reading, _Delayed(cache, stored)

    def part(state):
      fresh = within & ~state.stored
      query = fresh
      if net.shifted:  # the slot before a mask predicts it
        query = query | (within & jnp.pad(fresh[:, 1:], ((0, 0), (0, 1))))
      order = jnp.argsort(~query, axis=1, stable=True).astype(jnp.int32)
      seen = jnp.take_along_axis(fresh, order, axis=1)
      done = _extend(params, net, state.cache, board, order, seen, width, shadow)
      rank = jnp.cumsum(query, axis=1, dtype=jnp.int32) - 1
      where = jnp.maximum(_window(rank, first, width), 0)
      hidden = jnp.take_along_axis(done.hidden, where[:, :, None], axis=1)
      new = fresh & board.decoded & live[:, None]
      keep = jnp.take_along_axis(new, order, axis=1)
      path = jnp.argsort(~keep, axis=1, stable=True).astype(jnp.int32)
      cache = net.model.commit(state.cache, done.block, path, new.sum(-1, dtype=jnp.int32))
      reading = Reading(hidden, query.sum(-1, dtype=jnp.int32), done.shadow)
      return reading, _Delayed(cache, state.stored | new)

    due = board.step % refresh == 0
    live = board.live & ~due
    nothing = _zeros_like(lambda: part(state))[0]
    stale, state = lax.cond(jnp.any(live), part, lambda state: (nothing, state), state)
    some_due = jnp.any(due & board.live)
    fresh, state = lax.cond(some_due, whole, lambda state: (nothing, state), state)
    return _where_rows(due, fresh, stale), state

  rule = CacheRule('delayed', 'approximate: tokens keep the keys of an earlier step', init, read)
  return rule._replace(allows_revoking=False)


# --- Exact cache of a block-causal network --------------------------------------------------------


class _Causal(NamedTuple):
  cache: PyTree
  stored: jax.Array  # i32[B] positions in the cache: whole blocks
  edge: jax.Array  # f[B, hidden] of the last stored position, for a shifted head


def block_causal_cache(prefill_chunk: int = 64) -> CacheRule:
  """Returns the rule that keeps the finished blocks of a block-causal network.

  Exact. A finished block enters the cache in the forward that starts the next one: both run side by
  side, the finished one not seeing the new one, so that storing costs no forward of its own.

  Raises:
    ValueError: in `init`, if the network is not block-causal, or the window is not one block.

  Source: Block Diffusion, arXiv:2503.09573; SDAR, arXiv:2510.06303.
  """

  def init(params, board, *, net, width):
    if net.block_size is None:
      raise ValueError('block_causal_cache() needs a network with a block_size')
    if net.block_size != width:
      raise ValueError(f'decode in the blocks of the network: {net.block_size=}, {width=}')
    return _prefill(params, board, net, width, prefill_chunk)

  def read(params, state, board, *, net, width, shadow):
    pending = board.live & (state.stored < board.start)

    def run(first, seen):
      # The first forward of a block runs the one before it too.
      num_nodes = width * (2 if first else 1)
      some = board.start[:, None] + jnp.arange(num_nodes)[None] - (num_nodes - width)
      seen = seen & (some >= 0) & (some < board.length[:, None])
      done = _extend(params, net, state.cache, board, some, seen, width, shadow)
      own = done.hidden[:, -width:]
      return done, own, seen.sum(-1, dtype=jnp.int32)

    def with_last_block():
      ours = jnp.arange(2 * width)[None] >= width
      done, own, num_queries = run(True, ours | pending[:, None])
      new = _store_block(state, done, pending, net, width)
      return Reading(_unshift(own, new.edge, net), num_queries, done.shadow), new

    def alone():
      done, own, num_queries = run(False, jnp.ones((1, 1), bool))
      return Reading(_unshift(own, state.edge, net), num_queries, done.shadow), state

    return lax.cond(jnp.any(pending), with_last_block, alone)

  def branch(params, state, board, candidates, *, net, width):
    pending = board.live & (state.stored < board.start)
    num = candidates.shape[1]

    def run(first):
      done, seen = _side_by_side(params, net, state.cache, board, candidates, pending, first)
      own = done.hidden[:, -num * width :].reshape(*candidates.shape, -1)
      return done, own, seen.sum(-1, dtype=jnp.int32)

    def with_last_block():
      done, own, num_queries = run(True)
      new = _store_block(state, done, pending, net, width)
      edge = jnp.broadcast_to(new.edge[:, None], (*own.shape[:2], own.shape[-1]))
      return Reading(_unshift(own, edge, net), num_queries), new

    def alone():
      _, own, num_queries = run(False)
      edge = jnp.broadcast_to(state.edge[:, None], (*own.shape[:2], own.shape[-1]))
      return Reading(_unshift(own, edge, net), num_queries), state

    return lax.cond(jnp.any(pending), with_last_block, alone)

  return CacheRule('block_causal', 'exact', init, read, branch)


def _store_block(state, done, pending, net, width):
  """Returns the state with the pass's first `width` nodes stored in rows pending bool[B]."""
  path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (pending.shape[0], width))
  count = jnp.where(pending, width, 0)
  cache = net.model.commit(state.cache, done.block, path, count)
  edge = jnp.where(pending[:, None], done.hidden[:, width - 1], state.edge)
  return _Causal(cache, state.stored + count, edge)


def _unshift(own, edge, net):
  """Returns what predicts each slot of the block, own f[..., W, hidden]: itself, or the one before.

  The one before the first is `edge` f[..., hidden].
  """
  if not net.shifted:
    return own
  return jnp.concatenate([edge[..., None, :], own[..., :-1, :]], axis=-2)


def _side_by_side(params, net, cache, board, candidates, pending, first):
  """Returns (the pass over all candidates of the window, the keys bool[B, Q] that were seen).

  One row holds them all: they share the cache and their positions, and none sees another. With
  `first` the block before the window stands in front, which pending rows bool[B] have yet to store.
  """
  batch_size, num, width = candidates.shape
  own = board.start[:, None] + jnp.arange(width)[None]
  nodes = jnp.tile(own, (1, num))
  seen = nodes < board.length[:, None]
  group = jnp.repeat(jnp.arange(1, num + 1), width)
  tokens = candidates.reshape(batch_size, -1)
  if first:
    before = jnp.maximum(own - width, 0)
    nodes = jnp.concatenate([before, nodes], axis=1)
    seen = jnp.concatenate([jnp.broadcast_to(pending[:, None], own.shape), seen], axis=1)
    group = jnp.concatenate([jnp.zeros(width, group.dtype), group])
    last = jnp.take_along_axis(board.tokens, before, axis=1)
    tokens = jnp.concatenate([last, tokens], axis=1)
  together = (group[:, None] == group[None, :]) | (group[None, :] == 0)
  nodes = jnp.minimum(nodes, board.tokens.shape[1] - 1)
  output, block = net.model.extend(params, cache, tokens, nodes, seen[:, None, :] & together[None])
  return _Pass(output.hidden, None, block), seen


def _prefill(params, board, net, width, prefill_chunk):
  """Returns the state with all whole blocks before each row's `start` stored."""
  chunk = max(prefill_chunk // width, 1) * width
  length = board.tokens.shape[1]
  cache = _empty(params, net, board, length + chunk + width)
  nodes = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32)[None], (len(board.start), chunk))

  def forward(cache, begin):
    positions = begin + nodes
    seen = positions < board.start[:, None]
    return _extend(params, net, cache, board, positions, seen, width, False)

  hidden = jax.eval_shape(lambda: forward(cache, 0)).hidden
  edge = jnp.zeros((hidden.shape[0], hidden.shape[2]), hidden.dtype)

  def unread(carry):
    return carry[0] < jnp.max(board.start)

  def read_chunk(carry):
    begin, state = carry
    done = forward(state.cache, begin)
    count = jnp.clip(board.start - begin, 0, chunk)
    last = _window(done.hidden, count - 1, 1)[:, 0]
    cache = net.model.commit(state.cache, done.block, nodes, count)
    edge = jnp.where((count > 0)[:, None], last, state.edge)
    return begin + chunk, _Causal(cache, state.stored + count, edge)

  start = (jnp.int32(0), _Causal(cache, jnp.zeros_like(board.start), edge))
  return lax.while_loop(unread, read_chunk, start)[1]


# --- How far off is it? ---------------------------------------------------------------------------


class Deviation(NamedTuple):
  """How a cache's predictions differ from the uncached ones, summed over masked window slots."""

  num_slots: jax.Array  # f32[B] masked slots compared
  kl: jax.Array  # f32[B] sum of KL(uncached || cached), in nats
  same_best: jax.Array  # f32[B] slots with the same most probable token


class _Audit(NamedTuple):
  inner: Any
  exact: Any
  deviation: Deviation


def audited(rule: CacheRule) -> CacheRule:
  """Returns the rule that also runs the whole forward and reports how far off the cache is.

  What is decoded is what the rule alone decodes; `DenoiseResult.cache` is a `Deviation`. It costs
  the forward that the rule saves.
  """
  whole = no_cache()

  def init(params, board, *, net, width):
    zeros = jnp.zeros(board.length.shape, jnp.float32)
    inner = rule.init(params, board, net=net, width=width)
    exact = whole.init(params, board, net=net, width=width)
    return _Audit(inner, exact, Deviation(zeros, zeros, zeros))

  def read(params, state, board, *, net, width, shadow):
    reading, inner = rule.read(params, state.inner, board, net=net, width=width, shadow=shadow)
    truth, _ = whole.read(params, state.exact, board, net=net, width=width, shadow=False)
    p, q = (net.model.unembed(params, r.hidden) for r in (truth, reading))
    masked = ~_window(board.decoded, board.start, width)
    slots = board.start[:, None] + jnp.arange(width)[None]
    masked = masked & (slots < board.length[:, None]) & board.live[:, None]
    same = summarize(p).best == summarize(q).best
    log_p, log_q = jax.nn.log_softmax(p, -1), jax.nn.log_softmax(q, -1)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    found = Deviation(masked, jnp.where(masked, kl, 0), masked & same)
    deviation = jax.tree.map(lambda old, new: old + new.sum(-1), state.deviation, found)
    return reading, _Audit(inner, state.exact, deviation)

  return rule._replace(
    name=f'audited {rule.name}', init=init, read=read, report=lambda state: state.deviation
  )

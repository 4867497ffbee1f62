"""The denoising loop: predict, select, write, until no row has a mask left.

One loop for every policy, block rule and cache. A row goes at its own pace: its block, its steps
and its random numbers are its own, so what it writes never depends on its neighbours. Every
function is pure and can be jitted; none jits itself.

Axes: `B` batch, `L` positions of prompt and canvas, `W` window slots, `V` vocabulary.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from decodax import sampling as sampling_lib
from decodax.diffusion.caches import no_cache
from decodax.diffusion.keys import Purpose
from decodax.diffusion.keys import StepKeys
from decodax.diffusion.scores import or_best
from decodax.diffusion.scores import probability_of
from decodax.diffusion.scores import summarize
from decodax.diffusion.types import BlockRule
from decodax.diffusion.types import Board
from decodax.diffusion.types import CacheRule
from decodax.diffusion.types import DenoiseResult
from decodax.diffusion.types import DenoiseState
from decodax.diffusion.types import DenoiseStats
from decodax.diffusion.types import MaskedModel
from decodax.diffusion.types import Params
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.types import Request
from decodax.types import Result


class Setup(NamedTuple):
  """What stays the same from step to step. All static but the guidance."""

  net: MaskedModel
  policy: Policy
  blocks: BlockRule
  cache: CacheRule = no_cache()
  guidance: jax.Array | float | None = None
  truncate: bool = False


def denoise(
  params: Params,
  request: Request,
  *,
  net: MaskedModel,
  policy: Policy,
  blocks: BlockRule,
  cache: CacheRule | None = None,
  template: ArrayLike | None = None,
  guidance: jax.Array | float | None = None,
  truncate: bool = False,
  step_fn: Callable | None = None,
  loop_fn: Callable = lax.while_loop,
) -> DenoiseResult:
  """Returns the finished rows of a request whose canvases have `max_new_tokens` slots.

  A row stops when its canvas is full, or when a stop id is written and nothing before it is masked;
  what stands behind the first stop id is dropped. The work of a step grows with the request's
  capacity, so give `make_request` no more than prompt and canvas need. A policy's thresholds may be
  traced: make the policy inside the function you jit.

  Args:
    params: of the network and of the policy.
    request: made by `decodax.make_request`.
    net: the network.
    policy: which slots to fill in a step.
    blocks: where blocks end.
    cache: what to recompute; default everything.
    template: i32[B, G], tokens that stand in the canvas from the beginning, MASK where it is free:
      a form to fill in, or an end at a chosen place. Slots beyond G are free.
    guidance: f[] or f[B], w in l_u + (w + 1) (l_c - l_u), with l_u the logits of a second forward
      whose prompt is masked. None: no second forward.
    truncate: once a stop id is written, what is behind it is no longer seen by the network. Saves
      nothing by itself, since shapes are fixed, but ends rows whose text is short sooner.
    step_fn: what does a step, in place of `denoise_step`; see `free_draft_step`.
    loop_fn: `lax.while_loop`, or `decodax.python_while_loop`.

  Raises:
    ValueError: if network, policy, blocks and cache do not go together, or the template's shape is
      wrong.

  Source: LLaDA, arXiv:2502.09992, section 2.4 (the loop); classifier-free guidance, its appendix,
  after arXiv:2410.18514; templates and prefilling, Dimple, arXiv:2505.16990; dropping what follows
  an end of text, Learn2PD, arXiv:2509.25188.
  """
  setup = Setup(net, policy, blocks, cache or no_cache(), guidance, truncate)
  check_setup(setup)
  state = init_denoising(params, request, setup, template)
  step = functools.partial(step_fn or denoise_step, setup=setup)
  running = lambda state: jnp.any(state.result == Result.RUNNING)  # noqa: E731
  state = loop_fn(running, lambda state: step(params, state), state)
  return finish_denoising(state, setup)


def check_setup(setup: Setup) -> None:
  """Checks that network, policy, blocks and cache go together.

  Raises:
    ValueError: if they do not.
  """
  net, policy, blocks, cache = setup.net, setup.policy, setup.blocks, setup.cache
  if not 0 <= net.mask_id < net.model.vocab_size:
    raise ValueError(f'mask_id must be in the vocabulary of {net.model.vocab_size}: {net.mask_id=}')
  if net.block_size is not None:
    fits = blocks.width % net.block_size == 0 if net.forced else blocks.width == net.block_size
    if not fits or blocks.end is not None:
      raise ValueError(
        f'this network was trained in blocks of {net.block_size} and can only be decoded in them: '
        f'use fixed_blocks({net.block_size})' + ', or several of them' * net.forced
      )
  if policy.revokes and not cache.allows_revoking:
    raise ValueError(f'policy {policy.name!r} takes tokens back; the {cache.name} cache keeps them')
  if policy.wants_shadow and net.shifted:
    raise ValueError(f'policy {policy.name!r} needs a network whose head is not shifted')


def init_denoising(
  params: Params, request: Request, setup: Setup, template: ArrayLike | None = None
) -> DenoiseState:
  """Returns the state before the first forward, with every block of the network's prompt read."""
  net, blocks = setup.net, setup.blocks
  batch_size, length = request.tokens.shape
  position = jnp.arange(length)[None]
  ends = request.prompt_length + request.max_new_tokens
  in_prompt = position < request.prompt_length[:, None]
  canvas = jnp.full((batch_size, length), net.mask_id, jnp.int32)
  if template is not None:
    canvas = _lay(jnp.asarray(template, jnp.int32), request, net.mask_id)
  tokens = jnp.where(in_prompt, request.tokens, canvas)
  tokens = jnp.where(position < ends[:, None], tokens, 0)
  zeros = jnp.zeros((batch_size,), jnp.int32)
  state = DenoiseState(
    tokens=tokens,
    given=in_prompt | (tokens != net.mask_id),
    prompt_length=request.prompt_length,
    length=ends,
    committed_at=jnp.full((batch_size, length), -1, jnp.int32),
    start=request.prompt_length,
    end=zeros,
    block_step=zeros,
    num_masks=zeros,
    policy=setup.policy.init(batch_size, blocks.width, net.model.vocab_size),
    cache=(),
    rng_keys=request.rng_keys,
    step=zeros,
    sampling=request.sampling,
    eos_ids=request.eos_ids,
    result=jnp.full((batch_size,), int(Result.RUNNING), jnp.int32),
    stats=DenoiseStats(*[zeros] * len(DenoiseStats._fields)),
  )
  if net.block_size is not None:  # blocks are counted from position 0
    state = state._replace(start=request.prompt_length // net.block_size * net.block_size)
  state = enter_blocks(state, state.start, jnp.ones((batch_size,), bool), setup)
  board = guided_board(make_board(state, setup), state, setup)
  cache = setup.cache.init(params.target, board, net=net, width=blocks.width)
  return state._replace(cache=cache)


def _lay(template, request, mask_id):
  """Returns i32[B, L] with the template from each row's prompt on and MASK elsewhere."""
  batch_size, length = request.tokens.shape
  if template.ndim != 2 or template.shape[0] != batch_size:
    raise ValueError(f'template must be i32[B, G] with B = {batch_size}: {template.shape=}')
  offset = jnp.arange(length)[None] - request.prompt_length[:, None]
  inside = (offset >= 0) & (offset < template.shape[1])
  index = jnp.clip(offset, 0, template.shape[1] - 1)
  return jnp.where(inside, jnp.take_along_axis(template, index, axis=1), mask_id)


def finish_denoising(state: DenoiseState, setup: Setup) -> DenoiseResult:
  """Returns what the caller sees of a final state."""
  found, where = _first_eos(state)
  length = jnp.where((state.result == Result.EOS) & found, where + 1, state.length)
  valid = jnp.arange(state.tokens.shape[1])[None] < length[:, None]
  report = setup.cache.report
  return DenoiseResult(
    tokens=jnp.where(valid, state.tokens, 0),
    length=length,
    prompt_length=state.prompt_length,
    committed_at=jnp.where(valid, state.committed_at, -1),
    result=state.result,
    stats=state.stats,
    cache=() if report is None else report(state.cache),
  )


# --- One step -------------------------------------------------------------------------------------


def denoise_step(params: Params, state: DenoiseState, *, setup: Setup) -> DenoiseState:
  """Returns the state after one forward and what the policy makes of it. Done rows keep all."""
  policy, live = setup.policy, state.result == Result.RUNNING
  logits, shadow, num_queries, cache = read_window(params, state, setup)
  view = make_view(state, logits, shadow, setup)
  if setup.blocks.end is not None:
    room = jnp.minimum(state.length - state.start, setup.blocks.width)
    first = live & (state.block_step == 0)
    end = jnp.where(first, state.start + setup.blocks.end(view, room), state.end)
    state = state._replace(end=end)
    state = state._replace(num_masks=jnp.where(first, _count_masks(state, setup), state.num_masks))
    slots = make_slots(state, setup)
    view = view._replace(
      eligible=slots.eligible, editable=slots.editable, num_masks=state.num_masks
    )
  finite = jnp.all(jnp.isfinite(view.summary.log_normalizer) | ~view.eligible, axis=-1)

  selection = policy.select(params.policy, state.policy, view)
  last = state.block_step + 1 >= policy.max_steps(setup.blocks.width)
  commit, tokens, revoke, hold = _settle_selection(selection, view, policy, last)
  keep = live & finite
  state = state._replace(
    cache=cache,
    policy=selection.state,
    stats=state.stats._replace(
      num_calls=state.stats.num_calls + live,
      num_queries=state.stats.num_queries + jnp.where(live, num_queries, 0),
    ),
    result=jnp.where(live & ~finite, int(Result.NON_FINITE), state.result),
  )
  if selection.failed is not None:
    failed = keep & selection.failed
    keep = keep & ~failed
    result = jnp.where(failed, int(Result.UNSATISFIABLE), state.result)
    state = state._replace(result=result.astype(jnp.int32))
  commit, revoke = commit & keep[:, None], revoke & keep[:, None]
  return write_and_advance(state, view, commit, tokens, revoke, hold, setup)


def _settle_selection(selection: Selection, view: View, policy: Policy, last):
  """Returns (commit, tokens, revoke, hold), within what may be touched and what must be done."""
  tokens = view.candidates if selection.tokens is None else selection.tokens
  commit = selection.commit & (view.eligible | view.editable if policy.revokes else view.eligible)
  revoke = jnp.zeros_like(commit)
  if selection.revoke is not None:
    revoke = selection.revoke & view.editable & ~commit & ~last[:, None]
  if policy.guarded:
    stuck = ~jnp.any(commit, axis=-1, keepdims=True)
    commit = commit | (or_best(commit, view.confidence, view.eligible) & stuck)
  commit = commit | (view.eligible & last[:, None])
  hold = jnp.zeros_like(last) if selection.hold is None else selection.hold & ~last
  return commit, tokens, revoke, hold


def read_window(params: Params, state: DenoiseState, setup: Setup):
  """Returns (logits f32[B, W, V], shadow logits or None, num_queries i32[B], the cache's state).

  MASK has the logit -inf: it is never predicted.
  """
  net, width = setup.net, setup.blocks.width
  board = guided_board(make_board(state, setup), state, setup)
  reading, cache = setup.cache.read(
    params.target, state.cache, board, net=net, width=width, shadow=setup.policy.wants_shadow
  )
  logits = window_logits(params, reading.hidden, setup)
  shadow = None
  if reading.shadow is not None:
    shadow = window_logits(params, reading.shadow, setup)
  num_queries = reading.num_queries.reshape(-1, state.tokens.shape[0]).sum(0)
  return logits, shadow, num_queries, cache


def window_logits(params: Params, hidden: jax.Array, setup: Setup) -> jax.Array:
  """Returns f32[B, ..., V] of hidden f[B or 2B, ..., hidden], guided, with MASK at -inf."""
  net = setup.net
  logits = net.model.unembed(params.target, hidden)
  expected = (*hidden.shape[:-1], net.model.vocab_size)
  if logits.shape != expected:
    raise ValueError(f'unembed must return {expected}: {logits.shape=}')
  if setup.guidance is not None:
    with_prompt, without = jnp.split(logits, 2)
    scale = jnp.asarray(setup.guidance, logits.dtype).reshape(-1, *[1] * (logits.ndim - 1)) + 1
    logits = without + scale * (with_prompt - without)
  is_mask = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == net.mask_id
  return jnp.where(is_mask, -jnp.inf, logits)


def make_board(state: DenoiseState, setup: Setup) -> Board:
  """Returns what a cache rule sees of a state."""
  within = jnp.arange(state.tokens.shape[1])[None] < state.length[:, None]
  decoded = within & ((state.tokens != setup.net.mask_id) | state.given)
  live = state.result == Result.RUNNING
  return Board(state.tokens, decoded, state.length, state.start, state.block_step, state.step, live)


def guided_board(board: Board, state: DenoiseState, setup: Setup) -> Board:
  """Returns the board; with guidance, the rows once more behind, their prompts masked."""
  if setup.guidance is None:
    return board
  in_prompt = jnp.arange(board.tokens.shape[1])[None] < state.prompt_length[:, None]
  blind = board._replace(tokens=jnp.where(in_prompt, setup.net.mask_id, board.tokens))
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), board, blind)


def make_view(state: DenoiseState, logits, shadow, setup: Setup) -> View:
  """Returns what the policy sees, its candidates drawn by the row's sampling values."""
  view = make_slots(state, setup)
  summary = summarize(logits)
  laws = _laws(logits, state)
  candidates = draw_tokens(laws, view, summary.best)
  return view._replace(
    candidates=candidates,
    confidence=probability_of(logits, summary, candidates),
    summary=summary,
    logits=logits,
    laws=laws,
    shadow=shadow,
  )


def make_slots(state: DenoiseState, setup: Setup) -> View:
  """Returns a view of what stands in the window, with None for all that a forward tells."""
  positions = state.start[:, None] + jnp.arange(setup.blocks.width)[None]
  tokens, given = _at(state.tokens, positions), _at(state.given, positions)
  live = (state.result == Result.RUNNING)[:, None]
  ours = live & (positions < state.end[:, None]) & ~given
  masked = tokens == setup.net.mask_id
  nothing: Any = None
  return View(
    tokens=tokens,
    eligible=ours & masked,
    editable=ours & ~masked,
    positions=positions,
    candidates=nothing,
    confidence=nothing,
    summary=nothing,
    logits=nothing,
    laws=nothing,
    step=state.block_step,
    num_masks=state.num_masks,
    greedy=state.sampling.temperature == 0,
    sequence=state.tokens,
    canvas_start=state.prompt_length,
    canvas_end=state.length,
    mask_id=setup.net.mask_id,
    keys=StepKeys(state.rng_keys, state.step),
  )


def _laws(logits, state):
  """Returns logits f32[B, W, V] of the laws that the row's sampling values make of these."""
  sampling = state.sampling
  greedy = sampling.temperature == 0
  warped = sampling._replace(temperature=jnp.where(greedy, 1, sampling.temperature))
  filtered = any(rule is not None for rule in (sampling.top_k, sampling.top_p, sampling.min_p))
  if filtered:
    return sampling_lib.warp(logits, warped)
  live = state.result == Result.RUNNING
  return lax.cond(
    sampling_lib.any_sampled(sampling, live),
    lambda: sampling_lib.warp(logits, warped),
    lambda: logits,
  )


def draw_tokens(laws: jax.Array, view: View, best: jax.Array | None = None) -> jax.Array:
  """Returns i32[B, W], a token from each of the laws f32[B, W, V]; the best one in greedy rows.

  Args:
    laws: logits.
    view: says which rows are greedy, and has the random numbers.
    best: i32[B, W], the most probable tokens, if they are known.
  """
  best = sampling_lib.argmax(laws) if best is None else best

  def sampled():
    gumbel = view.keys.gumbel(laws.shape[1:], Purpose.TOKEN)
    return jnp.where(view.greedy[:, None], best, sampling_lib.argmax(laws + gumbel))

  return lax.cond(jnp.all(view.greedy), lambda: best, sampled)


# --- Writing, and moving on -----------------------------------------------------------------------


def write_and_advance(
  state: DenoiseState,
  view: View,
  commit: jax.Array,
  tokens: jax.Array,
  revoke: jax.Array,
  hold: jax.Array,
  setup: Setup,
  *,
  num_steps: jax.Array | int = 1,
  committed_at: jax.Array | None = None,
) -> DenoiseState:
  """Returns the state with the window's slots written and, where a block is done, the next entered.

  Args:
    state: before it.
    view: of the window.
    commit: bool[B, W], slots that take one of `tokens` i32[B, W].
    tokens: what they take.
    revoke: bool[B, W], slots that become MASK.
    hold: bool[B], rows that stay in their block although it is full.
    setup: of the loop.
    num_steps: i32[] or i32[B], how many steps of the policy this was.
    committed_at: i32[B, W], when each slot was written; default this forward.
  """
  live = state.result == Result.RUNNING
  rows = jnp.arange(state.tokens.shape[0])[:, None]
  changed = (commit & (tokens != view.tokens)) | revoke
  slots = jnp.where(changed, view.positions, state.tokens.shape[1])
  new = jnp.where(revoke, setup.net.mask_id, tokens)
  when = jnp.broadcast_to(state.step[:, None], new.shape) if committed_at is None else committed_at
  when = jnp.where(revoke, -1, when)
  masked = view.tokens == setup.net.mask_id
  stats = state.stats
  state = state._replace(
    tokens=state.tokens.at[rows, slots].set(new, mode='drop'),
    committed_at=state.committed_at.at[rows, slots].set(when, mode='drop'),
    step=state.step + live,
    block_step=state.block_step + jnp.where(live, num_steps, 0),
    stats=stats._replace(
      num_committed=stats.num_committed + (changed & masked).sum(-1),
      num_revoked=stats.num_revoked + revoke.sum(-1),
      num_edited=stats.num_edited + (changed & ~masked & ~revoke).sum(-1),
    ),
  )
  return _advance(state, hold, live, setup)


def _advance(state, hold, live, setup):
  """Returns the state with finished blocks left and finished rows stopped."""
  full = _count_masks(state, setup) == 0
  done = live & full & ~hold
  found, where = _first_eos(state)
  filled = _first_mask(state, setup, jnp.zeros_like(state.start)) > where
  if setup.policy.revokes:  # what is in the block may still change
    filled = filled & (where < jnp.where(done, state.end, state.start))
  ended = live & found & filled
  if setup.truncate:
    settled = found if not setup.policy.revokes else ended
    state = state._replace(
      length=jnp.where(live & settled, jnp.minimum(state.length, where + 1), state.length)
    )
    state = state._replace(end=jnp.minimum(state.end, state.length))
  result = jnp.where(done & (state.end >= state.length), int(Result.LENGTH), state.result)
  result = jnp.where(ended & (state.result == Result.RUNNING), int(Result.EOS), result)
  stats = state.stats._replace(num_blocks=state.stats.num_blocks + done)
  state = state._replace(result=result.astype(jnp.int32), stats=stats)
  return enter_blocks(state, state.end, done & (result == Result.RUNNING), setup)


def enter_blocks(
  state: DenoiseState, start: jax.Array, enters: jax.Array, setup: Setup
) -> DenoiseState:
  """Returns the state with rows bool[B] at a new block from start i32[B] on.

  Blocks that a template has filled are passed over, unless the network must read them.
  """
  blocks, width = setup.blocks, setup.blocks.width
  if setup.net.block_size is None:
    gap = jnp.maximum(_first_mask(state, setup, start) - start, 0)
    start = start + gap // blocks.size * blocks.size
    start = jnp.minimum(start, jnp.maximum(state.length - 1, 0))
  size = blocks.size if blocks.end is None else width
  fresh = setup.policy.init(state.tokens.shape[0], width, setup.net.model.vocab_size)
  policy = jax.tree.map(
    lambda new, old: jnp.where(enters.reshape(-1, *[1] * (old.ndim - 1)), new, old),
    fresh,
    state.policy,
  )
  state = state._replace(
    start=jnp.where(enters, start, state.start),
    end=jnp.where(enters, jnp.minimum(start + size, state.length), state.end),
    block_step=jnp.where(enters, 0, state.block_step),
    policy=policy,
  )
  return state._replace(num_masks=jnp.where(enters, _count_masks(state, setup), state.num_masks))


def _at(array, positions):
  return jnp.take_along_axis(array, jnp.minimum(positions, array.shape[1] - 1), axis=1)


def _is_masked(state, setup):
  within = jnp.arange(state.tokens.shape[1])[None] < state.length[:, None]
  return (state.tokens == setup.net.mask_id) & ~state.given & within


def _count_masks(state, setup):
  """Returns i32[B], the masks of each row's block."""
  position = jnp.arange(state.tokens.shape[1])[None]
  block = (position >= state.start[:, None]) & (position < state.end[:, None])
  return (_is_masked(state, setup) & block).sum(-1, dtype=jnp.int32)


def _first_mask(state, setup, start):
  """Returns i32[B], the first masked position from start i32[B] on; L if there is none."""
  masked = _is_masked(state, setup)
  masked = masked & (jnp.arange(masked.shape[1])[None] >= start[:, None])
  first = jnp.where(masked.any(-1), jnp.argmax(masked, -1), masked.shape[1])
  return first.astype(jnp.int32)


def _first_eos(state):
  """Returns (bool[B], i32[B]): does the canvas hold a stop id, and where is the first?"""
  position = jnp.arange(state.tokens.shape[1])[None]
  canvas = (position >= state.prompt_length[:, None]) & (position < state.length[:, None])
  stops = jnp.any(state.tokens[:, :, None] == state.eos_ids[:, None, :], axis=-1) & canvas
  return stops.any(-1), jnp.argmax(stops, -1).astype(jnp.int32)

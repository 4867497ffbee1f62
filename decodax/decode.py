"""The decoding loop: read the prompt, then draft, verify and commit until every row has stopped.

Every function is pure and can be jitted; none jits itself. Axes: `B` batch, `N` proposal nodes, `D`
maximal draft depth, `S` token slots, `V` vocabulary, `C` prompt chunk.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp

from decodax import sampling as sampling_lib
from decodax import trees
from decodax.noise import RoundKeys
from decodax.types import DecodeResult
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import Evidence
from decodax.types import Model
from decodax.types import ModelOutput
from decodax.types import Observation
from decodax.types import Params
from decodax.types import Request
from decodax.types import Result
from decodax.types import RoundInfo
from decodax.types import Stats
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.greedy import greedy

PREFILL_CHUNK = 64


def decode(
  params: Params,
  request: Request,
  *,
  model: Model,
  drafter: Drafter,
  verifier: Verifier,
  prefill_chunk: int = PREFILL_CHUNK,
  loop_fn: Callable = lax.while_loop,
) -> DecodeResult:
  """Returns the finished rows of a request: `init_state`, `prefill`, `generate`, `finish`.

  Everything but `params` and `request` is static. To compile it:
  `jax.jit(functools.partial(decode, model=..., drafter=..., verifier=...))`.

  Raises:
    ValueError: if model, drafter and verifier do not go together, or prefill_chunk < 1.
  """
  step_fn = make_step_fn(model=model, drafter=drafter, verifier=verifier)
  state = init_state(params, request, model=model, drafter=drafter, prefill_chunk=prefill_chunk)
  state = prefill(
    params, state, model=model, drafter=drafter, prefill_chunk=prefill_chunk, loop_fn=loop_fn
  )
  return finish(generate(params, state, step_fn=step_fn, loop_fn=loop_fn))


def init_state(
  params: Params,
  request: Request,
  *,
  model: Model,
  drafter: Drafter,
  prefill_chunk: int = PREFILL_CHUNK,
) -> DecodeState:
  """Returns the state before the prompt is read."""
  batch_size, num_slots = request.tokens.shape
  # Commits write whole chunks or paths; the slack keeps their dead ends inside the cache.
  capacity = num_slots + max(prefill_chunk, drafter.shape.num_nodes)
  zeros = jnp.zeros((batch_size,), jnp.int32)
  by_depth = jnp.zeros((batch_size, drafter.shape.max_depth), jnp.int32)
  seen = None
  if request.sampling.repetition_penalty is not None:
    valid = jnp.arange(num_slots)[None] < request.prompt_length[:, None]
    nothing = jnp.zeros((batch_size, model.vocab_size), bool)
    seen = sampling_lib.mark_seen(nothing, request.tokens, valid)
  return DecodeState(
    tokens=request.tokens,
    length=request.prompt_length,
    prompt_length=request.prompt_length,
    seen=seen,
    cache=model.init_cache(params.target, batch_size, capacity),
    drafter=drafter.init(params, request, capacity),
    rng_keys=request.rng_keys,
    round=zeros,
    sampling=request.sampling,
    max_new_tokens=request.max_new_tokens,
    eos_ids=request.eos_ids,
    # An int: filled with an enum the array would be weakly typed, and a step would compile twice.
    result=jnp.full((batch_size,), int(Result.RUNNING), jnp.int32),
    stats=Stats(zeros, zeros, zeros, zeros, by_depth, by_depth, by_depth),
  )


def prefill(
  params: Params,
  state: DecodeState,
  *,
  model: Model,
  drafter: Drafter,
  prefill_chunk: int = PREFILL_CHUNK,
  loop_fn: Callable = lax.while_loop,
) -> DecodeState:
  """Returns the state with all prompt tokens but the last committed.

  The prompt is read in chunks of `prefill_chunk` tokens, as many as the longest row needs; any
  chunk size, up to the one given to `init_state`, gives the same result. The last prompt token is
  the first round's root.

  Raises:
    ValueError: if prefill_chunk < 1.
  """
  if prefill_chunk < 1:
    raise ValueError(f'prefill_chunk must be at least 1: {prefill_chunk=}')
  batch_size, num_slots = state.tokens.shape
  chunk = min(prefill_chunk, num_slots)
  wanted = state.prompt_length - 1
  path = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), (batch_size, chunk))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((chunk, chunk), bool)), (batch_size, chunk, chunk))
  padded = jnp.pad(state.tokens, ((0, 0), (0, chunk)))

  def unread(carry):
    start, _, _ = carry
    return start < jnp.max(wanted)

  def read_chunk(carry):
    start, cache, drafter_state = carry
    tokens = lax.dynamic_slice_in_dim(padded, start, chunk, axis=1)
    positions = start + path
    count = jnp.clip(wanted - start, 0, chunk)
    output, block = model.extend(params.target, cache, tokens, positions, mask)
    drafter_state = drafter.prefill(params, drafter_state, tokens, positions, count, output)
    return start + chunk, model.commit(cache, block, path, count), drafter_state

  start = (jnp.int32(0), state.cache, state.drafter)
  _, cache, drafter_state = loop_fn(unread, read_chunk, start)
  return state._replace(cache=cache, drafter=drafter_state)


def generate(
  params: Params,
  state: DecodeState,
  *,
  step_fn: Callable[[Params, DecodeState], tuple[DecodeState, RoundInfo]],
  loop_fn: Callable = lax.while_loop,
) -> DecodeState:
  """Returns the state after rounds of `step_fn` until no row is running.

  Every round emits at least one token in every running row, so the loop ends.
  """

  def running(state):
    return jnp.any(state.result == Result.RUNNING)

  def body(state):
    return step_fn(params, state)[0]

  return loop_fn(running, body, state)


def finish(state: DecodeState) -> DecodeResult:
  """Returns what the caller sees of a final state."""
  valid = jnp.arange(state.tokens.shape[1])[None] < state.length[:, None]
  return DecodeResult(
    tokens=jnp.where(valid, state.tokens, 0),
    length=state.length,
    prompt_length=state.prompt_length,
    result=state.result,
    stats=state.stats,
  )


def make_step_fn(
  *, model: Model, drafter: Drafter, verifier: Verifier
) -> Callable[[Params, DecodeState], tuple[DecodeState, RoundInfo]]:
  """Returns `speculative_step` with its static arguments bound, once they have been checked."""
  check_compatible(drafter, verifier, model)
  return functools.partial(speculative_step, model=model, drafter=drafter, verifier=verifier)


def check_compatible(drafter: Drafter, verifier: Verifier, model: Model | None = None) -> None:
  """Checks that the verifier is exact for the drafter's proposals, and drafter for the model.

  Raises:
    ValueError: if the verifier is not, or if drafter and model differ in their vocabulary.
  """
  shape = drafter.shape
  if model is not None and shape.vocab_size not in (None, model.vocab_size):
    raise ValueError(
      f'the drafter has a vocabulary of {shape.vocab_size} tokens, the target one of '
      f'{model.vocab_size}; draft and target must share one'
    )
  if shape.candidates not in verifier.supports:
    allowed = ', '.join(sorted(kind.value for kind in verifier.supports))
    raise ValueError(
      f'verifier {verifier.name!r} is not exact for proposals of kind {shape.candidates.value!r}; '
      f"it takes {allowed}. 'coupled' takes any."
    )
  if verifier.chains_only and not shape.is_chain:
    raise ValueError(
      f'verifier {verifier.name!r} takes chains; this drafter proposes trees of '
      f'{shape.num_nodes} nodes and depth {shape.max_depth}'
    )


def speculative_step(
  params: Params, state: DecodeState, *, model: Model, drafter: Drafter, verifier: Verifier
) -> tuple[DecodeState, RoundInfo]:
  """Returns the state after one round of draft, verify and commit, and what the round did.

  Rows that are done keep everything: they emit nothing and commit nothing.
  """
  live = state.result == Result.RUNNING
  proposal, drafter_state = _propose(params, state, drafter, verifier)
  proposal = proposal._replace(valid=proposal.valid & (live[:, None] | _is_root(proposal)))
  scored = _score(params, state, proposal, live, model, drafter, verifier)
  verdict, finite, output, block, logits, extra_logits = scored

  tokens, num_emitted, result = _emit(state, proposal, verdict, live, finite)
  seen = state.seen
  if seen is not None:
    emitted = jnp.arange(tokens.shape[1])[None] < num_emitted[:, None]
    seen = sampling_lib.mark_seen(seen, tokens, emitted)
  new_state = state._replace(
    tokens=_append_tokens(state.tokens, tokens, state.length, num_emitted),
    length=state.length + num_emitted,
    seen=seen,
    cache=model.commit(state.cache, block, verdict.path, num_emitted),
    round=state.round + live,
    result=result,
    stats=_count(state.stats, proposal, verdict, num_emitted, live, drafter),
  )
  last = jnp.maximum(num_emitted - 1, 0)
  emitted_verdict = Verdict(
    path=verdict.path,
    num_accepted=last,
    next_token=jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0],
  )
  observation = Observation(proposal, emitted_verdict, num_emitted, output, logits, extra_logits)
  drafter_state = drafter.observe(params, drafter_state, observation, new_state)
  info = RoundInfo(proposal, verdict, tokens, num_emitted)
  return new_state._replace(drafter=drafter_state), info


def round_keys(state: DecodeState) -> RoundKeys:
  """Returns where this round's random numbers come from."""
  return RoundKeys(state.rng_keys, state.round, state.length - 1)


def root_tokens(state: DecodeState) -> jax.Array:
  """Returns i32[B], the last emitted token of each row."""
  return jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]


def _propose(params, state, drafter, verifier):
  """Returns the proposal and the drafter's state.

  If the verifier weighs evidence, rows at temperature 0 still draft the argmax, but as a draw at
  temperature 1 without noise, so that the proposal holds the whole law.
  """
  noise_fn = verifier.draft_noise
  if verifier.needs_laws and verifier.needs_evidence:
    greedy = state.sampling.temperature == 0
    state = state._replace(sampling=_unwarp(state.sampling, greedy))

    def noise_fn(*args, **kwargs):
      return jnp.where(greedy[:, None], 0, verifier.draft_noise(*args, **kwargs))

  return drafter.propose(params, state, noise_fn=noise_fn, with_laws=verifier.needs_laws)


def _unwarp(sampling, rows):
  """Returns sampling values that leave the logits of rows bool[B] as they are."""
  off = {'temperature': 1, 'top_k': 0, 'top_p': 1, 'min_p': 0}
  values = {name: getattr(sampling, name) for name in off}
  return sampling._replace(
    **{k: jnp.where(rows, off[k], v) for k, v in values.items() if v is not None}
  )


def _is_root(proposal):
  return (jnp.arange(proposal.tokens.shape[1]) == 0)[None]


# --- Scoring: one target call, at the narrowest compiled width that holds every live row ---------


def _score(params, state, proposal, live, model, drafter, verifier):
  """Returns (verdict, finite bool[B], output, block, logits or None, logits of the drafter's extra
  nodes or None), all at full width N.
  """
  shape = drafter.shape
  score = functools.partial(
    _score_at_width, params, state, proposal, live, model, drafter, verifier
  )
  widths = sorted({*shape.widths, shape.num_nodes})
  if len(widths) == 1:
    return score(widths[0])
  full = jax.eval_shape(lambda: score(widths[-1]))
  needed = jnp.max(jnp.where(live, proposal.valid.sum(-1), 1))
  branch = jnp.searchsorted(jnp.asarray(widths), needed)
  return lax.switch(branch, [lambda w=w: _pad_like(score(w), full) for w in widths])


def _score_at_width(params, state, proposal, live, model, drafter, verifier, width):
  shape = drafter.shape
  narrow = _narrow(proposal, width)
  max_depth = min(shape.max_depth, width - 1)
  mask, depths = trees.topology(
    narrow, shape._replace(num_nodes=width, max_depth=max_depth) if shape.is_chain else shape
  )
  extra = _extra_nodes(narrow, verifier)
  layout = (narrow.tokens, depths, mask)
  tokens, depths, visible = layout if extra is None else _append_nodes(*layout, extra)
  positions = state.length[:, None] - 1 + depths
  options = {} if narrow.embeddings is None else {'embeddings': narrow.embeddings}
  output, block = model.extend(params.target, state.cache, tokens, positions, visible, **options)
  own: ModelOutput = jax.tree.map(lambda a: a[:, :width], output)
  hidden = own.hidden
  if extra is not None:
    asked = jnp.take_along_axis(output.hidden, width + extra.opinions[:, :, None], axis=1)
    hidden = jnp.concatenate([hidden, asked], axis=1)
  every = model.unembed(params.target, hidden)  # at once: it reads the whole vocabulary
  _check_logits(every, hidden, narrow, model)
  logits, opinions = every[:, :width], None if extra is None else every[:, width:]
  if state.seen is not None:
    logits = _penalize_nodes(logits, narrow, mask, state)
    if narrow.extra is None and opinions is not None:
      opinions = _penalize_nodes(opinions, narrow, mask, state)
  evidence = Evidence(params, state.sampling, own, logits, opinions)
  verdict = _verify(state, narrow, evidence, live, verifier, max_depth)
  path = jnp.pad(verdict.path, ((0, 0), (0, shape.max_depth - max_depth)))
  verdict = verdict._replace(path=path)
  finite = _path_is_finite(logits, verdict)
  shown = logits if shape.needs_logits else None
  return verdict, finite, own, block, shown, None if narrow.extra is None else opinions


def _narrow(proposal, width):
  """Returns the first `width` nodes of the proposal, and all extra nodes."""
  extra, num_nodes = proposal.extra, proposal.tokens.shape[1]
  by_node = proposal._replace(extra=None, embeddings=None)
  narrow = jax.tree.map(lambda a: a[:, :width], by_node)._replace(embeddings=proposal.embeddings)
  if extra is None:
    return narrow
  mask = jnp.concatenate([extra.mask[:, :, :width], extra.mask[:, :, num_nodes:]], axis=2)
  return narrow._replace(extra=extra._replace(mask=mask))


def _extra_nodes(proposal, verifier):
  """Returns the nodes to be read beside the proposal, the drafter's or the verifier's, or None."""
  if verifier.extra_nodes is None:
    return proposal.extra
  if proposal.extra is not None:
    raise ValueError(
      f'verifier {verifier.name!r} has nodes of its own read beside the proposal, and so has this '
      f'drafter; only one of them can'
    )
  return verifier.extra_nodes(proposal)


def _append_nodes(tokens, depths, mask, extra):
  """Returns (tokens i32[B, N + M], depths i32[B, N + M], mask bool[B, N + M, N + M])."""
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, extra.tokens.shape[1])))  # no draft sees them
  return (
    jnp.concatenate([tokens, extra.tokens], axis=1),
    jnp.concatenate([depths, extra.depths], axis=1),
    jnp.concatenate([mask, extra.mask], axis=1),
  )


def _check_logits(logits, hidden, proposal, model):
  expected = (*hidden.shape[:2], model.vocab_size)
  if logits.shape != expected:
    raise ValueError(f'unembed must return [B, N, V] = {expected}: {logits.shape=}')
  expected = (*proposal.tokens.shape, model.vocab_size)
  if proposal.laws is not None and proposal.laws.shape != expected:
    raise ValueError(
      f'the proposal has laws over another vocabulary: {proposal.laws.shape=}, '
      f'expected {expected}; draft and target must share one'
    )


def _verify(state, proposal, evidence, live, verifier, max_depth):
  """Returns the verdict; a batch without sampled rows takes the greedy short cut."""
  keys = round_keys(state)
  logits = evidence.logits
  options = {'evidence': evidence} if verifier.needs_evidence else {}

  def general():
    warped = sampling_lib.warp(logits, state.sampling)
    return verifier.verify(keys, proposal, warped, max_depth=max_depth, **options)

  if not verifier.lossless:
    return general()
  return lax.cond(
    sampling_lib.any_sampled(state.sampling, live),
    general,
    lambda: greedy.verify(keys, proposal, logits, max_depth=max_depth),
  )


def _penalize_nodes(logits, proposal, mask, state):
  """Returns logits penalised for the tokens before each node: the row's, and its own path's."""
  penalty = state.sampling.repetition_penalty
  batch_size, num_nodes, vocab_size = logits.shape
  rows = jnp.arange(batch_size)[:, None, None]
  nodes = jnp.arange(num_nodes)[None, :, None]
  tokens = jnp.where(mask, proposal.tokens[:, None, :], vocab_size)
  seen = jnp.broadcast_to(state.seen[:, None], logits.shape)
  seen = seen.at[rows, nodes, tokens].set(True, mode='drop')
  return sampling_lib.penalize(logits, seen, penalty)


def _path_is_finite(logits, verdict):
  """Returns bool[B]: are the largest logits finite at the root and at every accepted node?"""
  finite = jnp.isfinite(logits.max(-1))  # max is NaN if any logit is
  on_path = jnp.take_along_axis(finite, verdict.path, axis=1, mode='clip')
  past_end = jnp.arange(verdict.path.shape[1])[None] > verdict.num_accepted[:, None]
  return jnp.all(on_path | past_end, axis=-1)


def _pad_like(tree, shapes):
  """Returns the tree with every array padded at the end to the shape it has in `shapes`."""

  def pad(array, like):
    extra = [(0, n - m) for m, n in zip(array.shape, like.shape, strict=True)]
    return array if array.shape == like.shape else jnp.pad(array, extra)

  return jax.tree.map(pad, tree, shapes)


# --- Emission ------------------------------------------------------------------------------------


def _emit(state, proposal, verdict, live, finite):
  """Returns (tokens i32[B, D + 1], num_emitted i32[B], result i32[B]) after all stop rules."""
  tokens = trees.path_tokens(proposal, verdict)
  wanted = verdict.num_accepted + 1
  is_eos = jnp.any(tokens[:, :, None] == state.eos_ids[:, None, :], axis=-1)
  is_eos = is_eos & (jnp.arange(tokens.shape[1])[None] < wanted[:, None])
  until_eos = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, -1) + 1, wanted)
  budget = state.prompt_length + state.max_new_tokens - state.length
  room = state.tokens.shape[1] - state.length
  num_emitted = jnp.minimum(until_eos, jnp.minimum(budget, room))
  ended = is_eos.any(-1) & (num_emitted == until_eos)
  result = jnp.where(num_emitted == room, Result.CAPACITY, Result.RUNNING)
  result = jnp.where(num_emitted == budget, Result.LENGTH, result)
  result = jnp.where(ended, Result.EOS, result)
  result = jnp.where(finite, result, Result.NON_FINITE)
  num_emitted = jnp.where(live & finite, num_emitted, 0).astype(jnp.int32)
  return tokens, num_emitted, jnp.where(live, result, state.result).astype(jnp.int32)


def _append_tokens(buffer, tokens, length, count):
  """Returns i32[B, S] with the first count[b] of tokens[b] written from length[b] on."""
  index = jnp.arange(tokens.shape[1])[None]
  slots = jnp.where(index < count[:, None], length[:, None] + index, buffer.shape[1])
  rows = jnp.arange(buffer.shape[0])[:, None]
  return buffer.at[rows, slots].set(tokens, mode='drop')


def _count(stats, proposal, verdict, num_emitted, live, drafter):
  depth = jnp.arange(drafter.shape.max_depth)[None]  # depth of the parent of a draft
  accepted = verdict.num_accepted[:, None]
  on_path = verdict.path[:, :-1, None] == proposal.parents[:, None, :]
  has_draft = jnp.any(on_path & proposal.valid[:, None, :], axis=-1)
  if drafter.shape.is_chain:
    proposed = proposal.valid[:, 1:]
  else:
    _, depths = trees.topology(proposal, drafter.shape)
    at_depth = depths[:, None, :] == depth[:, :, None] + 1
    proposed = jnp.any(at_depth & proposal.valid[:, None, :], axis=-1)
  live_rows = live[:, None]
  return Stats(
    num_target_calls=stats.num_target_calls + live,
    num_emitted=stats.num_emitted + num_emitted,
    num_accepted=stats.num_accepted + jnp.minimum(verdict.num_accepted, num_emitted),
    num_drafted=stats.num_drafted + jnp.where(live, proposal.valid.sum(-1) - 1, 0),
    num_proposed_at=stats.num_proposed_at + (proposed & live_rows),
    num_tested_at=stats.num_tested_at + (has_draft & (depth <= accepted) & live_rows),
    num_accepted_at=stats.num_accepted_at + ((depth < accepted) & live_rows),
  )


def python_while_loop(cond_fn: Callable, body_fn: Callable, init):
  """Returns what `lax.while_loop` returns, by a Python loop: to debug, and to test the loop."""
  carry = init
  while bool(cond_fn(carry)):
    carry = body_fn(carry)
  return carry

"""FreeDave: the static sampler's own output in fewer forwards, with no second model.

One forward at a state predicts every masked slot. From it d candidates are made: what the static
sampler would have after 1, 2, ..., d more steps if its predictions stayed as they are. All d are
run at once, and what each one predicts says what the static sampler does next from there. Candidate
i + 1 is accepted if it is just that, seen from candidate i.

Axes: `B` batch, `C` candidates, `W` window slots, `V` vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decodax.diffusion import loop
from decodax.diffusion.policies.llada import llada
from decodax.diffusion.policies.llada import num_to_fill
from decodax.diffusion.scores import longest_prefix
from decodax.diffusion.scores import ranks
from decodax.diffusion.scores import score_fn
from decodax.diffusion.scores import summarize
from decodax.diffusion.scores import top
from decodax.diffusion.types import DenoiseResult
from decodax.diffusion.types import DenoiseState
from decodax.diffusion.types import MaskedModel
from decodax.diffusion.types import Params
from decodax.diffusion.types import Policy
from decodax.types import Request
from decodax.types import Result

_DETERMINISTIC = ('confidence', 'margin', 'entropy', 'left_to_right')


class _Drafts(NamedTuple):
  """What the forward before predicted at the state as it stands."""

  best: jax.Array  # i32[B, W]
  score: jax.Array  # f32[B, W]
  known: jax.Array  # bool[B] False where there was no such forward


def free_draft(
  params: Params,
  request: Request,
  *,
  net: MaskedModel,
  num_steps: int | jax.Array,
  num_drafts: int = 4,
  score: str = 'confidence',
  **options: Any,
) -> DenoiseResult:
  """Returns what `denoise` returns for the policy `llada(num_steps, score)`, in fewer forwards.

  **Lossless (token-identical)** to that static sampler at temperature 0, up to ties that the
  network's rounding decides, at any number of drafts. Every forward but a block's first does at
  least one static step, so a block never takes more forwards than the static sampler's.
  `committed_at` counts static steps, not forwards, and so is the static sampler's too.

  Args:
    params: of the network.
    request: a row that is not at temperature 0 ends at once with `Result.UNSATISFIABLE`.
    net: the network.
    num_steps: steps per block of the static sampler, i32[]; may be traced.
    num_drafts: candidates per forward, d.
    score: the static sampler's; not 'random'.
    **options: `blocks` and what else `denoise` takes. Without a cache candidates are rows of a
      larger batch; with that of a block-causal network they stand side by side in one row.

  Raises:
    ValueError: if num_drafts < 1, the score is random, blocks adapt, or the cache cannot branch.

  Source: FreeDave, arXiv:2510.00294, algorithm 1.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  if score not in _DETERMINISTIC:
    raise ValueError(f'score must be one of {", ".join(_DETERMINISTIC)}: {score!r}')
  policy = _static_policy(num_steps, score)
  return loop.denoise(
    params, request, net=net, policy=policy, step_fn=_make_step(num_steps, num_drafts, score),
    **options,
  )  # fmt: skip


def _static_policy(num_steps, score) -> Policy:
  """Returns the static sampler with a place to keep what the last forward predicted."""

  def init(batch_size, width, vocab_size):
    del vocab_size
    best = jnp.zeros((batch_size, width), jnp.int32)
    return _Drafts(best, jnp.zeros((batch_size, width)), jnp.zeros((batch_size,), bool))

  return llada(num_steps, score)._replace(name='free-draft', init=init)


def _make_step(num_steps, num_drafts, score):
  """Returns a step of the loop: draft, run all candidates, keep the longest right one."""
  score_of = score_fn(score)

  def step(params: Params, state: DenoiseState, *, setup: loop.Setup) -> DenoiseState:
    if setup.cache.branch is None or setup.blocks.end is not None:
      raise ValueError(
        f'free drafting takes blocks of fixed size, and no cache or the exact one of a '
        f'block-causal network: {setup.cache.name=}'
      )
    live = state.result == Result.RUNNING
    drafts: _Drafts = state.policy
    view = loop.make_slots(state, setup)
    filled = _steps_to_slots(state, view.eligible, num_steps, num_drafts + 2)  # i32[B, d + 2]
    first = drafts.known.astype(jnp.int32)  # a candidate i holds i + first more steps
    index = first[:, None] + jnp.arange(num_drafts)[None]
    counts = jnp.take_along_axis(filled, index, axis=1)  # i32[B, d] slots of each candidate
    rank = ranks(drafts.score, view.eligible)
    shown = view.eligible[:, None] & (rank[:, None] < counts[:, :, None])
    candidates = jnp.where(shown, drafts.best[:, None], view.tokens[:, None])
    masks = view.eligible.sum(-1)
    valid = (counts < masks[:, None]) & (
      drafts.known[:, None] | (jnp.arange(num_drafts) == 0)[None]
    )

    best, scores, finite, num_queries, cache = _predict(
      params, state, candidates, view, setup, score_of
    )
    # What the static sampler does next from each candidate, and whether the next one is that.
    masked = view.eligible[:, None] & ~shown
    further = jnp.take_along_axis(filled, index + 1, axis=1) - counts
    after = _reveal(candidates, best, scores, masked, further)
    right = jnp.all(candidates[:, 1:] == after[:, :-1], axis=-1) & valid[:, 1:]
    kept = longest_prefix(right)

    def of_kept(array):
      where = kept.reshape(-1, *[1] * (array.ndim - 1))
      return jnp.take_along_axis(array, where, axis=1)[:, 0]

    # If the next static step fills the block, nothing is left to look at: it is done right away.
    closes = of_kept(counts + further) >= masks
    done = first + kept + closes
    commit = jnp.where(closes[:, None], view.eligible, of_kept(shown))
    tokens = jnp.where(closes[:, None], of_kept(after), of_kept(candidates))
    order = jnp.sum(rank[:, :, None] >= filled[:, None, 1:], axis=-1)
    order = jnp.where(of_kept(shown), order, (first + kept)[:, None])
    base = state.committed_at.max(-1, keepdims=True) + 1
    # Only greedy rows have a static output to reproduce.
    sampled = live & (state.sampling.temperature > 0)
    keep = live & finite & ~sampled
    stats = state.stats
    state = state._replace(
      cache=cache,
      policy=_Drafts(of_kept(best), of_kept(scores), jnp.ones_like(drafts.known)),
      stats=stats._replace(
        num_calls=stats.num_calls + live,
        num_queries=stats.num_queries + jnp.where(live, num_queries, 0),
      ),
      result=_outcome(state.result, live & ~finite, sampled),
    )
    commit = commit & keep[:, None]
    nothing = jnp.zeros_like(commit)
    return loop.write_and_advance(
      state, view, commit, tokens, nothing, nothing[:, 0], setup,
      num_steps=done, committed_at=base + order,
    )  # fmt: skip

  return step


def _outcome(result, broken, sampled):
  result = jnp.where(broken, int(Result.NON_FINITE), result)
  return jnp.where(sampled, int(Result.UNSATISFIABLE), result).astype(jnp.int32)


def _steps_to_slots(state, eligible, num_steps, most):
  """Returns i32[B, most], how many slots the next 0, 1, ... static steps fill in all."""
  steps = state.block_step[:, None] + jnp.arange(most - 1)[None]
  masks = state.num_masks[:, None]
  count = num_to_fill(masks, jnp.minimum(num_steps, masks), steps)
  total = jnp.pad(jnp.cumsum(count, axis=1), ((0, 0), (1, 0)))
  return jnp.minimum(total, eligible.sum(-1, keepdims=True)).astype(jnp.int32)


def _predict(params, state, candidates, view, setup, score_of):
  """Returns (best i32[B, C, W], score f32[B, C, W], finite bool[B], num_queries, the cache)."""
  batch_size, num, width = candidates.shape
  board = loop.guided_board(loop.make_board(state, setup), state, setup)
  copies = board.tokens.shape[0] // batch_size
  reading, cache = setup.cache.branch(
    params.target, state.cache, board, jnp.tile(candidates, (copies, 1, 1)), net=setup.net,
    width=width,
  )  # fmt: skip
  logits = loop.window_logits(params, reading.hidden, setup)
  summary = summarize(logits)
  flat = jax.tree.map(lambda a: a.reshape(batch_size * num, width), summary)
  seen = view._replace(
    summary=flat,
    confidence=flat.top,
    candidates=flat.best,
    positions=jnp.repeat(view.positions, num, axis=0),
  )
  scores = score_of(seen).reshape(candidates.shape)
  finite = jnp.all(jnp.isfinite(summary.log_normalizer) | ~view.eligible[:, None], axis=(1, 2))
  num_queries = reading.num_queries.reshape(copies, batch_size).sum(0)
  return summary.best, scores, finite, num_queries, cache


def _reveal(candidates, best, scores, masked, count):
  """Returns candidates i32[B, C, W] with each one's `count` i32[B, C] best masked slots filled."""
  shape = candidates.shape
  scores, masked = (a.reshape(-1, shape[-1]) for a in (scores, masked))
  chosen = top(scores, masked, count.reshape(-1)).reshape(shape)
  return jnp.where(chosen, best, candidates)

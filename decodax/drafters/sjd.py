"""Speculative Jacobi decoding: Jacobi iteration on draws and their laws, for sampling.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

import enum
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import sampling as sampling_lib
from decodax.decode import root_tokens
from decodax.decode import round_keys
from decodax.drafters import guesses
from decodax.drafters.jacobi import known_after
from decodax.drafters.jacobi import take_from
from decodax.drafters.plain import stateless_prefill
from decodax.noise import RoundKeys
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Result
from decodax.verifiers.laws import residual

_REDRAW = -1  # index of a redraw's decisions: no rule for chains decides under it


class Redraw(enum.Enum):
  """How drafts that were not emitted are drawn again."""

  FRESH = 'fresh'  # anew from their new laws
  COUPLED = 'coupled'  # kept as often as the new law allows


class SJDState(NamedTuple):
  """The window after the last emitted token."""

  drafts: jax.Array  # i32[B, D] drawn already, of which the first num_known count
  laws: jax.Array  # f32[B, D, V] logits of the laws they are drawn from, warped
  num_known: jax.Array  # i32[B]


def sjd(
  *,
  vocab_size: int,
  num_drafts: int = 7,
  redraw: Redraw | str = Redraw.COUPLED,
  guess_fn: guesses.GuessFn | None = None,
) -> Drafter:
  """Returns the drafter that draws each draft from the law that the target last gave its place.

  Those laws were conditioned on the drafts before it, right or wrong. With `speculative`
  verification draft x is accepted with probability min(1, p(x) / q(x)), q being the last round's
  law and p this round's, which tend to agree once the drafts before x are settled.

  * *Fresh* redraw: every round draws all drafts anew. `Candidates.SAMPLED`: exact for every rule
    for chains.
  * *Coupled* redraw: a draft that was neither emitted nor rejected stays with probability
    min(1, p(x) / q(x)) and is otherwise drawn from norm(max(p - q, 0)). Given the drafts before it
    its law is still p, so the output's law is exact; that it equals its draft of the round before
    is what raises acceptance. What is lost: drafts of different rounds are not independent, so a
    rule that looks below a draft before it decides on it would be biased: `Candidates.CARRIED`.

  The rejected place itself needs no draw: its token is emitted. At temperature 0 both are Jacobi
  decoding. With `coupled` verification the noise of fresh redraws is keyed by position, and the
  output that of plain sampling.

  Args:
    vocab_size: V of the target.
    num_drafts: D; the window that is read is one token wider.
    redraw: a `Redraw` or its value.
    guess_fn: fills places that no forward pass has filled, see `guesses`; default `random_prompt`.
      A guess is certain: its law is a point mass.

  Raises:
    ValueError: if num_drafts < 1 or there is no such redraw.

  Source: Speculative Jacobi Decoding, arXiv:2410.01699, algorithm 1; coupled redraw: MC-SJD,
  arXiv:2510.24211, section 4.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  redraw = Redraw(redraw)
  guess = guess_fn or guesses.random_prompt()

  def init(params, request, capacity):
    del params, capacity
    batch_size = request.tokens.shape[0]
    drafts = jnp.zeros((batch_size, num_drafts), jnp.int32)
    laws = jnp.zeros((batch_size, num_drafts, vocab_size), jnp.float32)
    return SJDState(drafts, laws, drafts[:, 0])

  def propose(params, state, *, noise_fn, with_laws):
    del params
    own: SJDState = state.drafter
    known = jnp.arange(num_drafts)[None] < own.num_known[:, None]
    drafts = own.drafts
    if redraw is Redraw.FRESH:
      drafts = _draw_all(state, own.laws, noise_fn)
    drafts = guess(state, jnp.where(known, drafts, own.drafts), own.num_known)
    index = lax.broadcasted_iota(jnp.int32, own.laws.shape, 2)
    certain = jnp.where(index == drafts[:, :, None], 0, -jnp.inf)
    laws = jnp.where(known[:, :, None], own.laws, certain)
    count = jnp.full_like(own.num_known, num_drafts)
    proposal = chain_proposal(root_tokens(state), drafts, count, laws if with_laws else None)
    return proposal, SJDState(drafts, laws, own.num_known)

  def observe(params, drafter_state, observation, state):
    del params
    start = observation.num_emitted
    laws = take_from(observation.logits, start, num_drafts)
    known = known_after(start, num_drafts)
    laws = _if_sampled(state, lambda: sampling_lib.warp(laws, state.sampling), lambda: laws)
    drafts = drafter_state.drafts
    if redraw is Redraw.COUPLED:
      drafts = _couple_all(state, drafter_state, laws, start)
    return SJDState(drafts, laws, known.sum(-1, dtype=jnp.int32))

  candidates = Candidates.CARRIED if redraw is Redraw.COUPLED else Candidates.SAMPLED
  return Drafter(
    shape=DraftShape(
      num_nodes=num_drafts + 1,
      max_depth=num_drafts,
      candidates=candidates,
      needs_logits=True,
      vocab_size=vocab_size,
    ),
    init=init,
    prefill=stateless_prefill,
    propose=propose,
    observe=observe,
  )


def couple(
  keys: RoundKeys, token: jax.Array, old: jax.Array, new: jax.Array, depth: jax.Array | int
) -> jax.Array:
  """Returns i32[B], a draw from law `new` that is `token`, a draw from law `old`, if possible.

  A maximal coupling: the two differ with the probability of their total variation.

  Args:
    keys: decides.
    token: i32[B], drawn from `old`.
    old: float[B, V].
    new: float[B, V].
    depth: i32[], of the draft.
  """
  p, q = (jnp.take_along_axis(law, token[:, None], axis=1)[:, 0] for law in (new, old))
  stays = keys.accepts(jnp.minimum(p, q) / jnp.where(q > 0, q, 1), depth, _REDRAW)
  return jnp.where(stays, token, keys.pick(residual(new, old), depth, _REDRAW))


def _draw_all(state, laws, noise_fn):
  """Returns i32[B, D], a draw from each of laws f32[B, D, V]."""
  keys, vocab_size = round_keys(state), laws.shape[-1]

  def draw(index):
    law = lax.dynamic_index_in_dim(laws, index, 1, keepdims=False)
    return sampling_lib.argmax(law + noise_fn(keys, vocab_size, index + 1))

  return _if_sampled(
    state,
    lambda: lax.map(draw, jnp.arange(laws.shape[1])).T,
    lambda: sampling_lib.argmax(laws),
  )


def _couple_all(state, own, laws, start):
  """Returns i32[B, D], the next window's drafts: the old ones where they can stay.

  The draft of the next window's place i stood `start` places further on in the old window. Behind
  its end there was none; there nothing is coupled.
  """
  keys, num_drafts = round_keys(state), laws.shape[1]

  def draw(index):
    new = jax.nn.softmax(lax.dynamic_index_in_dim(laws, index, 1, keepdims=False), -1)
    was_drafted = (start + index < num_drafts)[:, None]
    old = jax.nn.softmax(take_from(own.laws, start + index, 1)[:, 0], -1)
    token = take_from(own.drafts, start + index, 1)[:, 0]
    # From a law of no mass nothing can stay, and the residual is all of the new law.
    return couple(keys, token, jnp.where(was_drafted, old, 0), new, index + 1)

  return _if_sampled(
    state, lambda: lax.map(draw, jnp.arange(num_drafts)).T, lambda: sampling_lib.argmax(laws)
  )


def _if_sampled(state, sampled_fn, greedy_fn):
  """Returns what sampled_fn does, or greedy_fn without the cost of noise if no row samples."""
  live = state.result == Result.RUNNING
  return lax.cond(sampling_lib.any_sampled(state.sampling, live), sampled_fn, greedy_fn)

"""Jacobi decoding: guess the next tokens, read them all at once, take the answers as new guesses.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import sampling as sampling_lib
from decodax.decode import root_tokens
from decodax.decode import round_keys
from decodax.drafters import guesses
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Result


class JacobiState(NamedTuple):
  """The window after the last emitted token."""

  drafts: jax.Array  # i32[B, D] tokens, of which the first num_known came from a forward pass
  num_known: jax.Array  # i32[B]
  age: jax.Array  # i32[B, D] forward passes that each of them came out of, one after the other


def jacobi(
  *,
  num_drafts: int = 7,
  guess_fn: guesses.GuessFn | None = None,
  exit_after: int | jax.Array | None = None,
) -> Drafter:
  """Returns the drafter whose drafts are what the target last said would stand there.

  Solves y_i = argmax p(. | y_<i) for a window of D + 1 tokens by fixed-point iteration: a round
  reads the window once, and everything up to the first token that changed is final. What follows it
  is kept, shifted to the window's start. Rows that sample iterate on `argmax(log p + g_i)` with the
  coupled noise g_i of position i, so that their fixed point is what plain sampling emits.

  With `greedy` or `coupled` verification: lossless (token-identical) for any window and any guess,
  and never more calls than plain decoding. With `trusting` verification and `exit_after`: lossy.

  Args:
    num_drafts: D; the window that is read is one token wider.
    guess_fn: fills places that no forward pass has filled, see `guesses`; default `random_prompt`.
    exit_after: i32[] or i32[B], marks as trusted every draft that has come out of so many forward
      passes, so that `trusting` emits it even if it would still change; may be traced. Above D none
      would. None: no draft is trusted.

  Raises:
    ValueError: if num_drafts < 1 or exit_after < 1.

  Source: Accelerating Transformer Inference for Translation via Parallel Decoding,
  arXiv:2305.10427, algorithms 1 and 2; early exit: CEED-VLA, arXiv:2506.13725, section 3.3.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  if isinstance(exit_after, int) and exit_after < 1:
    raise ValueError(f'exit_after must be at least 1: {exit_after=}')
  guess = guess_fn or guesses.random_prompt()

  def init(params, request, capacity):
    del params, capacity
    drafts = jnp.zeros((request.tokens.shape[0], num_drafts), jnp.int32)
    return JacobiState(drafts, drafts[:, 0], drafts)

  def propose(params, state, *, noise_fn, with_laws):
    del params, noise_fn, with_laws
    own: JacobiState = state.drafter
    own = own._replace(drafts=guess(state, own.drafts, own.num_known))
    count = jnp.full_like(own.num_known, num_drafts)
    proposal = chain_proposal(root_tokens(state), own.drafts, count)
    if exit_after is not None:
      trusted = own.age >= jnp.reshape(jnp.asarray(exit_after), (-1, 1))
      proposal = proposal._replace(trusted=jnp.pad(trusted, ((0, 0), (1, 0))))
    return proposal, own

  def observe(params, drafter_state, observation, state):
    del params
    answers, known = _answers(observation, state)
    age = jnp.pad(drafter_state.age, ((0, 0), (0, 1)))  # the answer to the last draft is new
    age = jnp.where(known, take_from(age, observation.num_emitted, num_drafts) + 1, 0)
    return JacobiState(answers, known.sum(-1, dtype=jnp.int32), age)

  return Drafter(
    shape=DraftShape(
      num_nodes=num_drafts + 1,
      max_depth=num_drafts,
      candidates=Candidates.DETERMINISTIC,
      needs_logits=True,
    ),
    init=init,
    prefill=stateless_prefill,
    propose=propose,
    observe=observe,
  )


def take_from(nodes: jax.Array, start: jax.Array, count: int) -> jax.Array:
  """Returns [B, count, ...]: for each row, entries of nodes [B, N, ...] from start i32[B] on.

  Past the end the last entry is repeated.
  """
  index = start[:, None] + jnp.arange(count)[None]
  index = jnp.minimum(index, nodes.shape[1] - 1)
  return jnp.take_along_axis(nodes, index.reshape(*index.shape, *[1] * (nodes.ndim - 2)), axis=1)


def known_after(num_emitted: jax.Array, num_drafts: int) -> jax.Array:
  """Returns bool[B, D]: which places of the next window a node of this one has an answer for."""
  return num_emitted[:, None] + jnp.arange(num_drafts)[None] <= num_drafts


def _answers(observation, state):
  """Returns (i32[B, D] what the target says of the next window, bool[B, D] where it does)."""
  num_drafts = observation.proposal.tokens.shape[1] - 1
  start = observation.num_emitted
  logits = observation.logits

  def best():
    return take_from(sampling_lib.argmax(logits), start, num_drafts)

  def sample():
    keys = round_keys(state)

    def draw(depth):
      law = sampling_lib.warp(take_from(logits, start + depth, 1)[:, 0], state.sampling)
      return keys.pick_coupled(law, depth + 1)

    return lax.map(draw, jnp.arange(num_drafts)).T

  live = state.result == Result.RUNNING
  drafts = lax.cond(sampling_lib.any_sampled(state.sampling, live), sample, best)
  return drafts, known_after(start, num_drafts)

"""Input-guided aggressive decoding: copy the input on, and find back to it after every change.

Axes: `B` batch, `D` drafts, `S` token slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.decode import root_tokens
from decodax.drafters.ngram import suffix_matches
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape


class Source(NamedTuple):
  """Where the text to copy stands in each row's prompt: `Params.drafter`, if it is known."""

  start: jax.Array  # i32[B]
  end: jax.Array  # i32[B]


class CopyState(NamedTuple):
  """Where copying goes on."""

  source: Source
  pointer: jax.Array  # i32[B] the slot to copy next; -1: no place has been found


def input_guided(*, num_drafts: int = 15, max_ngram: int = 3) -> Drafter:
  """Returns the drafter that copies a source text from the prompt, for tasks that change little.

  While the output is the source, the next D tokens of it are the drafts. After a token that is not,
  copying goes on behind the only place in the source that ends like the output does: of suffixes of
  1, 2, .. `max_ngram` output tokens the shortest that occurs exactly once decides. Until there is
  such a place, rounds have no drafts and are one token wide. Behind the end of the source the draft
  is the row's first stop id.

  The source is given by `Params.drafter`, a `Source`, and copying starts with it. If that is `()`,
  the source is the whole prompt, and copying starts once a place is found.

  Lossless (token-identical) with `greedy` and `coupled`.

  Args:
    num_drafts: D.
    max_ngram: longest suffix to look for.

  Raises:
    ValueError: if num_drafts or max_ngram is below 1.

  Source: Lossless Acceleration for Seq2seq Generation with Aggressive Decoding, arXiv:2205.10350,
  section 3.1.
  """
  if num_drafts < 1 or max_ngram < 1:
    raise ValueError(f'num_drafts and max_ngram must be at least 1: {num_drafts=}, {max_ngram=}')

  def init(params, request, capacity):
    del capacity
    given = params.drafter
    if isinstance(given, Source):
      return CopyState(given, given.start)
    nowhere = jnp.full_like(request.prompt_length, -1)
    return CopyState(Source(jnp.zeros_like(nowhere), request.prompt_length), nowhere)

  def propose(params, state, *, noise_fn, with_laws):
    del params, noise_fn, with_laws
    own: CopyState = state.drafter
    index = own.pointer[:, None] + jnp.arange(num_drafts)[None]
    drafts = jnp.take_along_axis(state.tokens, jnp.maximum(index, 0), axis=1, mode='clip')
    if state.eos_ids.shape[1]:
      drafts = jnp.where(index == own.source.end[:, None], state.eos_ids[:, :1], drafts)
      end = own.source.end + (state.eos_ids[:, 0] >= 0)
    else:
      end = own.source.end
    count = jnp.where(own.pointer < 0, 0, jnp.clip(end - own.pointer, 0, num_drafts))
    return chain_proposal(root_tokens(state), drafts, count), own

  def observe(params, drafter_state, observation, state):
    del params
    source, pointer = drafter_state
    count = observation.num_emitted
    copied = _emitted_is_source(state, source, pointer, count, num_drafts + 1)
    found = _only_place(state, source, max_ngram)
    return CopyState(source, jnp.where(copied, pointer + count, found))

  return Drafter(
    shape=DraftShape(
      num_nodes=num_drafts + 1,
      max_depth=num_drafts,
      candidates=Candidates.DETERMINISTIC,
      widths=(*(width for width in (1, 4, 8, 16) if width <= num_drafts), num_drafts + 1),
    ),
    init=init,
    prefill=stateless_prefill,
    propose=propose,
    observe=observe,
  )


def _emitted_is_source(state, source, pointer, count, max_count):
  """Returns bool[B]: are the last count i32[B] tokens what stands in the source at the pointer?"""
  step = jnp.arange(max_count)[None]
  emitted, expected = (
    jnp.take_along_axis(state.tokens, jnp.maximum(start[:, None] + step, 0), axis=1, mode='clip')
    for start in (state.length - count, pointer)
  )
  same = jnp.all((emitted == expected) | (step >= count[:, None]), axis=-1)
  return same & (pointer >= 0) & (pointer + count <= source.end)


def _only_place(state, source, max_ngram):
  """Returns i32[B], the slot behind the one place in the source that ends like the output, or -1.

  Places at the very end of the source do not help: nothing is left to copy.
  """
  match = suffix_matches(state.tokens, state.length, max_ngram)
  slot = jnp.arange(state.tokens.shape[1])[None]
  place = jnp.full_like(state.length, -1)
  for size in range(max_ngram, 0, -1):  # the shortest comes last, and counts
    first = (source.start + size - 1)[:, None]
    occurs = (match >= size) & (slot >= first) & (slot < source.end[:, None])
    long_enough = state.length - state.prompt_length >= size
    unique = (occurs.sum(-1) == 1) & long_enough
    place = jnp.where(unique, jnp.argmax(occurs, axis=-1) + 1, place)
  return jnp.where(place < source.end, place, -1)

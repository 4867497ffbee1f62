"""Prompt lookup: copy what followed the last tokens when they occurred before.

Axes: `B` batch, `S` token slots, `D` drafts, `n` n-gram length.
"""

import jax
import jax.numpy as jnp

from decodax.decode import root_tokens
from decodax.drafters.plain import stateless_init
from decodax.drafters.plain import stateless_observe
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape


def ngram(
  *, num_drafts: int = 4, max_ngram: int = 3, min_ngram: int = 2, latest: bool = True
) -> Drafter:
  """Returns a drafter that looks the longest suffix of the text up in the text itself.

  The longest suffix of at most `max_ngram` tokens that occurred earlier is found, and the tokens
  that followed it are proposed: fewer than `num_drafts` if the text ends there, none if no suffix
  of at least `min_ngram` tokens recurs. When no row of the batch has a match the round is one
  token wide.

  Args:
    num_drafts: D, tokens to copy at most.
    max_ngram: longest suffix to look for.
    min_ngram: shortest suffix to trust. One token says little: where nothing repeats it costs more
      in wide calls than it saves.
    latest: of several occurrences take the latest, else the earliest.

  Raises:
    ValueError: unless 1 <= min_ngram <= max_ngram and num_drafts >= 1.

  Source: Prompt Lookup Decoding, github.com/apoorvumang/prompt-lookup-decoding; LLMA,
  arXiv:2304.04487.
  """
  if not 1 <= min_ngram <= max_ngram:
    raise ValueError(f'need 1 <= min_ngram <= max_ngram: {min_ngram=}, {max_ngram=}')
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')

  def propose(params, state, *, noise_fn, with_laws):
    del params, noise_fn, with_laws
    start, num_drafts_found = _lookup(state.tokens, state.length)
    index = start[:, None] + jnp.arange(num_drafts)[None]
    drafts = jnp.take_along_axis(state.tokens, index, axis=1, mode='clip')
    return chain_proposal(root_tokens(state), drafts, num_drafts_found), state.drafter

  def _lookup(tokens, length):
    match = suffix_matches(tokens, length, max_ngram)
    match = jnp.where(match >= min_ngram, match, 0)
    slot = jnp.arange(tokens.shape[1])[None]
    best = match.max(-1, keepdims=True)
    rank = slot if latest else tokens.shape[1] - slot
    found = jnp.argmax(jnp.where(match == best, rank, -1), axis=-1) + 1
    available = jnp.clip(length - found, 0, num_drafts)
    return found, jnp.where(best[:, 0] > 0, available, 0)

  return Drafter(
    shape=DraftShape(
      num_nodes=num_drafts + 1,
      max_depth=num_drafts,
      candidates=Candidates.DETERMINISTIC,
      widths=(1, num_drafts + 1),
    ),
    init=stateless_init,
    prefill=stateless_prefill,
    propose=propose,
    observe=stateless_observe,
  )


def suffix_matches(tokens: jax.Array, length: jax.Array, max_ngram: int) -> jax.Array:
  """Returns i32[B, S]: how many tokens up to slot i agree with the end of the row, at most n.

  The end of the row itself does not count: slots from length - 1 on are 0.

  Args:
    tokens: i32[B, S].
    length: i32[B], valid tokens.
    max_ngram: n.
  """
  slot = jnp.arange(tokens.shape[1])[None]
  count = jnp.zeros(tokens.shape, jnp.int32)
  agree = slot < length[:, None] - 1
  for back in range(max_ngram):
    last = jnp.take_along_axis(tokens, length[:, None] - 1 - back, axis=1, mode='clip')
    shifted = jnp.roll(tokens, back, axis=1)
    agree = agree & (shifted == last) & (slot >= back) & (length[:, None] > back)
    count = count + agree
  return count

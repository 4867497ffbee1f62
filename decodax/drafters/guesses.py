"""Initial guesses: what stands in the places of a Jacobi window that no forward pass has filled.

A guess is a function `(state, drafts, num_known) -> drafts`. It gets the decode state before the
round, the window i32[B, D], and how many of its tokens, from the left, are known i32[B]; it returns
the window with the others filled in. Any tokens will do: a guess decides how soon the iteration
converges, never what it converges to.

Axes: `B` batch, `D` drafts, `S` token slots, `V` vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from decodax.decode import round_keys
from decodax.drafters.ngram import suffix_matches
from decodax.types import DecodeState

GuessFn = Callable[[DecodeState, jax.Array, jax.Array], jax.Array]


def constant(token: int) -> GuessFn:
  """Returns the guess that fills a window with one token, such as a padding id.

  Source: Accelerating Transformer Inference for Translation via Parallel Decoding,
  arXiv:2305.10427, section 3.
  """

  def guess(state, drafts, num_known):
    del state
    return _fill(drafts, num_known, jnp.full_like(drafts, token))

  return guess


def random_prompt() -> GuessFn:
  """Returns the guess that takes random tokens of the row's prompt.

  Source: CLLMs, arXiv:2403.00835, section 3.1.
  """

  def guess(state, drafts, num_known):
    draws = round_keys(state).draft_uniform(drafts.shape[1])
    return _fill(
      drafts, num_known, random_tokens_of_prompt(state.tokens, state.prompt_length, draws)
    )

  return guess


def random_tokens(vocab_size: int) -> GuessFn:
  """Returns the guess that takes any tokens of the vocabulary, all alike likely.

  Source: Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative
  Jacobi Decoding, arXiv:2410.01699, section 4.3.
  """

  def guess(state, drafts, num_known):
    draws = round_keys(state).draft_uniform(drafts.shape[1])
    return _fill(drafts, num_known, jnp.floor(draws * vocab_size).astype(jnp.int32))

  return guess


def neighbour(distance: int = 1) -> GuessFn:
  """Returns the guess that repeats the token `distance` places before.

  For tokens of an image in raster order, 1 is the left neighbour and the width of the image the one
  above; for text, 1 repeats the last token.

  Raises:
    ValueError: if distance < 1.

  Source: arXiv:2410.01699, section 4.3, initialisation by spatial neighbours.
  """
  if distance < 1:
    raise ValueError(f'distance must be at least 1: {distance=}')

  def guess(state, drafts, num_known):
    text, end = _with_known(state, drafts, num_known)
    return _fill(drafts, num_known, _repeat(text, end, end - distance, state, drafts))

  return guess


def prompt_in_place(start: int = 0) -> GuessFn:
  """Returns the guess that output i is token start + i of the prompt: for rewriting and editing."""

  def guess(state, drafts, num_known):
    index = (state.length - state.prompt_length)[:, None] + jnp.arange(drafts.shape[1])[None]
    index = (start + index) % state.prompt_length[:, None]
    return _fill(drafts, num_known, jnp.take_along_axis(state.tokens, index, axis=1))

  return guess


def ngram(*, max_ngram: int = 3, otherwise: GuessFn | None = None) -> GuessFn:
  """Returns the guess that copies what followed the last tokens where they occurred before.

  The last tokens are those of the text with the known part of the window; of several earlier places
  with the longest match the latest counts.

  Args:
    max_ngram: longest suffix to look for.
    otherwise: the guess where nothing recurs; default `random_prompt`.

  Raises:
    ValueError: if max_ngram < 1.
  """
  if max_ngram < 1:
    raise ValueError(f'max_ngram must be at least 1: {max_ngram=}')
  fallback = otherwise or random_prompt()

  def guess(state, drafts, num_known):
    text, end = _with_known(state, drafts, num_known)
    match = suffix_matches(text, end, max_ngram)
    slot = jnp.arange(text.shape[1])[None]
    best = match.max(-1, keepdims=True)
    found = jnp.argmax(jnp.where(match == best, slot, -1), axis=-1) + 1
    copied = _repeat(text, end, found, state, drafts)
    other = fallback(state, drafts, num_known)
    return _fill(drafts, num_known, jnp.where(best > 0, copied, other))

  return guess


def random_tokens_of_prompt(
  tokens: jax.Array, prompt_length: jax.Array, draws: jax.Array
) -> jax.Array:
  """Returns i32[B, D], tokens of each row's prompt, chosen by draws f32[B, D] in [0, 1).

  Args:
    tokens: i32[B, S].
    prompt_length: i32[B].
    draws: f32[B, D].
  """
  slot = jnp.floor(draws * prompt_length[:, None]).astype(jnp.int32)
  slot = jnp.minimum(slot, prompt_length[:, None] - 1)  # rounding may reach 1
  return jnp.take_along_axis(tokens, slot, axis=1)


def _fill(drafts, num_known, guessed):
  known = jnp.arange(drafts.shape[1])[None] < num_known[:, None]
  return jnp.where(known, drafts, guessed)


def _with_known(state, drafts, num_known):
  """Returns (i32[B, S + D] the text with the known drafts after it, i32[B] where it ends)."""
  index = jnp.arange(drafts.shape[1])[None]
  text = jnp.pad(state.tokens, ((0, 0), (0, drafts.shape[1])))
  slots = jnp.where(index < num_known[:, None], state.length[:, None] + index, text.shape[1])
  rows = jnp.arange(drafts.shape[0])[:, None]
  return text.at[rows, slots].set(drafts, mode='drop'), state.length + num_known


def _repeat(text, end, start, state, drafts):
  """Returns i32[B, D]: the text goes on at `end` as it did at `start`, over and over."""
  start = jnp.maximum(start, 0)
  beyond = state.length[:, None] + jnp.arange(drafts.shape[1])[None] - end[:, None]
  index = start[:, None] + beyond % (end - start)[:, None]
  return jnp.take_along_axis(text, index, axis=1, mode='clip')

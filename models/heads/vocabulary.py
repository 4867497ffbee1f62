"""A draft vocabulary: the tokens a head drafts where a projection to all of them costs too much.

A draft id is the place of a token among the kept ones, whose ids rise. Laws stay laws over the
whole vocabulary: a token outside has the logit -inf, so that every verifier is as exact as without.

Axes: `V` vocabulary, `Vd` draft vocabulary.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


class Fixed(nnx.Variable):
  """A variable that is part of a module and is never trained."""


class DraftVocabulary(nnx.Module):
  """Which tokens are drafted.

  Args:
    ids: i32[Vd], target ids, rising.
    vocab_size: V.

  Raises:
    ValueError: if the ids do not rise or are out of range.
  """

  def __init__(self, ids: np.ndarray, vocab_size: int):
    ids = np.asarray(ids)
    check_draft_ids(ids, vocab_size)
    index = np.full(vocab_size, len(ids), np.int32)
    index[ids] = np.arange(len(ids))
    self.size, self.vocab_size = len(ids), vocab_size
    self.ids = Fixed(jnp.asarray(ids, jnp.int32))
    self.index = Fixed(jnp.asarray(index))  # i32[V] draft id of each token; Vd outside

  def encode(self, tokens: jax.Array) -> jax.Array:
    """Returns i32[...], the draft ids of tokens; Vd for a token outside."""
    return self.index[...][tokens]

  def contains(self, tokens: jax.Array) -> jax.Array:
    """Returns bool[...]: is the token drafted?"""
    return self.encode(tokens) < self.size

  def widen(self, logits: jax.Array) -> jax.Array:
    """Returns f[..., V] for logits f[..., Vd] of the draft vocabulary, -inf outside."""
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, 1)]
    padded = jnp.pad(logits, pad, constant_values=-jnp.inf)
    return jnp.take(padded, self.index[...], axis=-1)

  def restrict(self, logits: jax.Array) -> jax.Array:
    """Returns f[..., Vd] of logits f[..., V]."""
    return jnp.take(logits, self.ids[...], axis=-1)


def make_vocabulary(
  token_counts: np.ndarray, size: int | None, always: Sequence[int] = ()
) -> DraftVocabulary | None:
  """Returns the vocabulary of the `size` most frequent tokens; None if that is all of them.

  Args:
    token_counts: i64[V], how often each token is drafted for: counts over supervised tokens.
    size: Vd; None keeps all.
    always: tokens kept however rare they are, such as stop ids.

  Raises:
    ValueError: if the size is out of range, or too small for what is always kept.

  Source: EAGLE-3, arXiv:2503.01840, and its code; FastDraft, arXiv:2411.11055.
  """
  vocab_size = len(token_counts)
  if size is None or size == vocab_size:
    return None
  kept = {int(token) for token in always}
  if not max(len(kept), 1) <= size < vocab_size:
    raise ValueError(
      f'a draft vocabulary must have {max(len(kept), 1)} to {vocab_size} tokens: {size=}'
    )
  counts = np.asarray(token_counts, np.int64).copy()
  counts[sorted(kept)] = np.iinfo(np.int64).max
  # Of equal counts the lowest ids, so that rare tokens fill up the same way everywhere.
  order = np.argsort(-counts, kind='stable')[:size]
  return DraftVocabulary(np.sort(order), vocab_size)


def check_draft_ids(ids: np.ndarray, vocab_size: int) -> None:
  """Checks the target ids i[Vd] of a draft vocabulary.

  Raises:
    ValueError: unless they rise strictly within 0..V - 1.
  """
  if ids.ndim != 1 or not len(ids):
    raise ValueError(f'a draft vocabulary is a list of token ids: {ids.shape=}')
  if (np.diff(ids) <= 0).any():
    raise ValueError('the target ids of a draft vocabulary must rise strictly')
  if ids[0] < 0 or ids[-1] >= vocab_size:
    raise ValueError(
      f'the target ids of a draft vocabulary must be 0 to {vocab_size - 1}: they are '
      f'{ids[0]} to {ids[-1]}'
    )

"""What a frozen target says about a batch: the one record that every objective learns from.

A *tape* is made once for each batch, inside the jitted training step, and is read only. It holds
no logits: they are recomputed from `hidden` in chunks, see `train.losses`.

Axes: `B` rows, `T` tokens of a packed row, `D` width of the target, `V` vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from models.transformer import Transformer


class Batch(NamedTuple):
  """Documents packed into rows. A document never spans rows."""

  tokens: jax.Array  # i32[B, T] 0 at padding
  positions: jax.Array  # i32[B, T] inside the document, from 0
  segments: jax.Array  # i32[B, T] which document of the row, from 1; 0 is padding
  loss_mask: jax.Array  # bool[B, T] is token t worth predicting (a text, an assistant's turn)?


class Tape(NamedTuple):
  """A batch as the target read it. Nothing here has a gradient.

  `hidden[:, t]` has read the tokens up to and including t, so `target.unembed(hidden)[:, t]` is
  the law of token t + 1.
  """

  tokens: jax.Array  # i32[B, T]
  positions: jax.Array  # i32[B, T]
  segments: jax.Array  # i32[B, T]
  loss_mask: jax.Array  # bool[B, T]
  hidden: jax.Array | None  # f[B, T, D] after the final norm; None if there is no target
  taps: Mapping[str, jax.Array]  # 'layer_i': f[B, T, D], the residual stream that enters layer i

  def mask(self) -> jax.Array:
    """Returns bool[B, T, T]: which tokens of the row each one attends to."""
    return causal_mask(self.segments)


def make_tape(target: Transformer | None, batch: Batch, taps: Sequence[int] = ()) -> Tape:
  """Returns what the target says about a batch.

  Args:
    target: frozen; None gives a tape without `hidden`, for training a model from scratch.
    batch: packed documents; attention does not cross from one to another.
    taps: layers whose incoming residual stream is wanted; the number of layers gives the stream
      that leaves the last one, before the final norm.
  """
  if target is None:
    return Tape(*batch, hidden=None, taps={})
  output, _ = target(
    batch.tokens, batch.positions, causal_mask(batch.segments), taps=tuple(dict.fromkeys(taps))
  )
  hidden, features = lax.stop_gradient((output.hidden, output.features))
  return Tape(*batch, hidden=hidden, taps=features)


def causal_mask(segments: jax.Array) -> jax.Array:
  """Returns bool[B, T, T], causal within each document; padding sees itself only."""
  length = segments.shape[1]
  same = segments[:, :, None] == segments[:, None, :]
  causal = jnp.tril(jnp.ones((length, length), bool))[None]
  padding = jnp.eye(length, dtype=bool)[None]
  return jnp.where((segments > 0)[:, :, None], same & causal, padding)


def shift_left(x: jax.Array, num: int, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (x with entry t + num at t, bool[B, T] where that is of the same document).

  Where it is not, the entry is zero. Use this for every label and every shifted input.

  Args:
    x: [B, T, ...].
    num: places to shift, at least 0.
    segments: i32[B, T], 0 at padding.
  """
  length = segments.shape[1]
  index = jnp.arange(length)[None]
  ok = (index < length - num) & (jnp.roll(segments, -num, axis=1) == segments) & (segments > 0)
  keep = ok.reshape(ok.shape + (1,) * (x.ndim - 2))
  return jnp.where(keep, jnp.roll(x, -num, axis=1), jnp.zeros((), x.dtype)), ok


def supervised(tape: Tape | Batch, ahead: int) -> jax.Array:
  """Returns f32[B, T]: 1 where token t + ahead is of t's document and worth predicting, else 0."""
  mask, ok = shift_left(tape.loss_mask, ahead, tape.segments)
  return (mask & ok).astype(jnp.float32)

"""Masks of who sees whom inside a block, as booleans and as bits.

Axes: `B` batch, `T` queries, `N` block tokens, `W = ceil(N / 32)` words.
"""

import jax
from jax import lax
import jax.numpy as jnp

WORD = 32  # bits of a packed word


def pack_mask(mask: jax.Array) -> jax.Array:
  """Returns i32[B, T, W], a mask bool[B, T, N] as bits: token j is bit j % 32 of word j // 32."""
  num_tokens = mask.shape[-1]
  num_words = -(-num_tokens // WORD)
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, num_words * WORD - num_tokens)))
  bits = mask.reshape(*mask.shape[:2], num_words, WORD).astype(jnp.uint32)
  shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None, None]
  return lax.bitcast_convert_type((bits << shifts).sum(-1, dtype=jnp.uint32), jnp.int32)


def unpack_mask(words: jax.Array, num_tokens: int) -> jax.Array:
  """Returns bool[B, T, N], the mask that `pack_mask` made i32[B, T, W] of; N is `num_tokens`."""
  words = lax.bitcast_convert_type(words, jnp.uint32)[..., None]
  shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None, None]
  bits = (words >> shifts) & 1
  return bits.reshape(*words.shape[:2], -1)[..., :num_tokens] > 0

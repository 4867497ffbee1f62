"""A language model small enough to know its law exactly, as a decodax `Model`.

The law of a token depends on the two tokens before it. Axes: `B` batch, `T` tokens, `S` slots, `V`
vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decodax.types import Model
from decodax.types import ModelOutput


class _Block(NamedTuple):
  tokens: jax.Array  # i32[B, T]


class _Cache(NamedTuple):
  tokens: jax.Array  # i32[B, S]
  length: jax.Array  # i32[B]


def random_table(seed: int, vocab_size: int, *, sharpness: float = 1.0) -> np.ndarray:
  """Returns f64[V, V, V]: table[a, b] is the law of the token after a, b."""
  rng = np.random.default_rng(seed)
  table = np.exp(sharpness * rng.standard_normal((vocab_size,) * 3))
  return table / table.sum(-1, keepdims=True)


def table_model(vocab_size: int) -> Model:
  """Returns the model whose parameters are a table of laws float[V, V, V].

  Before the first token stands token 0.
  """

  def init_cache(params, batch_size, capacity):
    del params
    return _Cache(jnp.zeros((batch_size, capacity), jnp.int32), jnp.zeros((batch_size,), jnp.int32))

  def init_scratch(params, batch_size, num_nodes):
    del params
    return _Block(jnp.zeros((batch_size, num_nodes), jnp.int32))

  def extend(params, cache, tokens, positions, mask, *, scratch=None, offset=0):
    del params, positions
    block = tokens
    if scratch is not None:
      block = jax.lax.dynamic_update_slice_in_dim(scratch.tokens, tokens, offset, 1)
    own = offset + jnp.arange(tokens.shape[1])[None, :, None]
    before = mask & (jnp.arange(block.shape[1])[None, None] < own)  # nodes are in tree order
    parent = jnp.max(jnp.where(before, jnp.arange(block.shape[1])[None, None], -1), axis=-1)
    last = jnp.take_along_axis(cache.tokens, jnp.maximum(cache.length - 1, 0)[:, None], axis=1)
    last = jnp.where(cache.length[:, None] > 0, last, 0)
    previous = jnp.where(
      parent >= 0, jnp.take_along_axis(block, jnp.maximum(parent, 0), axis=1), last
    )
    return ModelOutput(jnp.stack([previous, tokens], axis=-1)), _Block(block)

  def commit(cache, block, path, count):
    kept = jnp.take_along_axis(block.tokens, path, axis=1, mode='clip')
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    return _Cache(write(cache.tokens, kept, cache.length), cache.length + count)

  def unembed(params, hidden):
    return jnp.log(params[hidden[..., 0], hidden[..., 1]])

  return Model(init_cache, extend, commit, unembed, vocab_size, init_scratch)


def sequence_law(table: np.ndarray, context: tuple[int, ...], length: int) -> np.ndarray:
  """Returns f64[V, ..., V], the law of the next `length` tokens after a context."""
  vocab_size = table.shape[-1]
  law = np.zeros((vocab_size,) * length)
  for tokens in np.ndindex(*law.shape):
    history, chance = (0, *context), 1.0
    for token in tokens:
      chance *= table[history[-2], history[-1], token]
      history = (*history, token)
    law[tokens] = chance
  return law

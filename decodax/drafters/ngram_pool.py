"""A pool of n-grams: for a token, the sequences that were last seen to follow it.

Axes: `B` batch, `H` keys that a pool has room for, `G` n-grams a key, `n` tokens after the key, `N`
proposal nodes, `S` token slots.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import trees
from decodax.types import Proposal

_EMPTY = -1


class NgramPool(NamedTuple):
  """A hash table a row. A token has one place; of two that share it the later one stays."""

  keys: jax.Array  # i32[B, H] the token whose n-grams a place holds
  values: jax.Array  # i32[B, H, G, n] what followed it, newest first


def empty_pool(batch_size: int, num_keys: int, num_ngrams: int, size: int) -> NgramPool:
  """Returns a pool for `num_keys` tokens with `num_ngrams` sequences of `size` tokens each."""
  return NgramPool(
    jnp.full((batch_size, num_keys), _EMPTY, jnp.int32),
    jnp.full((batch_size, num_keys, num_ngrams, size), _EMPTY, jnp.int32),
  )


def insert(pool: NgramPool, key: jax.Array, value: jax.Array, wanted: jax.Array) -> NgramPool:
  """Returns the pool with one n-gram as its key's newest, in the wanted rows bool[B].

  An n-gram that is there already moves to the front; otherwise the oldest gives way.

  Args:
    pool: the pool.
    key: i32[B].
    value: i32[B, n], what followed the key.
    wanted: bool[B].
  """
  rows, place = jnp.arange(key.shape[0]), key % pool.keys.shape[1]
  owned = (pool.keys[rows, place] == key)[:, None, None]
  old = jnp.where(owned, pool.values[rows, place], _EMPTY)
  same = jnp.all(old == value[:, None], axis=-1)
  num_ngrams = same.shape[1]
  gives_way = jnp.where(same.any(-1), jnp.argmax(same, axis=-1), num_ngrams - 1)
  moved = jnp.concatenate([value[:, None], old[:, :-1]], axis=1)
  behind = (jnp.arange(num_ngrams)[None] > gives_way[:, None])[:, :, None]
  place = jnp.where(wanted, place, pool.keys.shape[1])  # out of range: dropped
  return NgramPool(
    pool.keys.at[rows, place].set(key, mode='drop'),
    pool.values.at[rows, place].set(jnp.where(behind, old, moved), mode='drop'),
  )


def insert_text(
  pool: NgramPool, tokens: jax.Array, start: jax.Array, end: jax.Array, max_count: jax.Array | int
) -> NgramPool:
  """Returns the pool with every n-gram of a text whose last token lies in [start, end).

  Args:
    pool: the pool.
    tokens: i32[B, S].
    start: i32[B].
    end: i32[B].
    max_count: the most of end - start.
  """
  size = pool.values.shape[-1]

  def add(offset, pool):
    first = start + offset - size
    index = first[:, None] + jnp.arange(size + 1)[None]
    gram = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1, mode='clip')
    return insert(pool, gram[:, 0], gram[:, 1:], (first >= 0) & (start + offset < end))

  return lax.fori_loop(0, max_count, add, pool)


def lookup(pool: NgramPool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (i32[B, G, n] the n-grams of key i32[B], newest first, bool[B, G] which exist)."""
  rows, place = jnp.arange(key.shape[0]), key % pool.keys.shape[1]
  found = (pool.keys[rows, place] == key)[:, None]
  values = pool.values[rows, place]
  return values, found & (values[:, :, 0] != _EMPTY)


def as_tree(root: jax.Array, ngrams: jax.Array, valid: jax.Array) -> Proposal:
  """Returns the tree of the root i32[B] and of valid n-grams after it; prefixes are shared.

  It has N = 1 + G n nodes, of which those that merge leave the last ones invalid.

  Args:
    root: i32[B].
    ngrams: i32[B, G, n].
    valid: bool[B, G].
  """
  batch_size, num_ngrams, size = ngrams.shape
  equal = ngrams[:, :, None] == ngrams[:, None]  # [B, G, G, n]
  shared = jnp.cumprod(equal, axis=-1, dtype=jnp.int32) > 0
  first = jnp.argmax(shared & valid[:, None, :, None], axis=2)  # the first with the same prefix
  gram = jnp.arange(num_ngrams)[None, :, None]
  keep = valid[:, :, None] & (first == gram)
  above = 1 + first[:, :, :-1] * size + jnp.arange(size - 1)[None, None]
  parents = jnp.pad(above, ((0, 0), (0, 0), (1, 0))).reshape(batch_size, -1)
  parents = jnp.pad(parents, ((0, 0), (1, 0)), constant_values=-1).astype(jnp.int32)
  keep = jnp.pad(keep.reshape(batch_size, -1), ((0, 0), (1, 0)), constant_values=True)
  tokens = jnp.concatenate([root[:, None], ngrams.reshape(batch_size, -1)], axis=1)
  index, parents, exists = trees.compact_nodes(keep, parents, tokens.shape[1])
  return Proposal(jnp.take_along_axis(tokens, index, axis=1), parents, exists)

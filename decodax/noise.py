"""Where random numbers come from: two disciplines, one key per row.

*Coupled* noise depends on the row and on the position of the token it decides, and on nothing
else. A rule that commits `argmax(logits + noise)` at every position therefore emits, token for
token, what plain sampling with the same key emits, whatever was drafted.

*Fresh* noise depends on the row, the row's own round counter, a depth, an index and a purpose.
Rules that accept by a ratio must use it: they look past the first rejection, so noise keyed by
position alone would not be uniform given the history.

A verifier takes all its decisions through the methods of `RoundKeys`, so that a test can put an
object in its place that enumerates them.

Axes: `B` batch, `V` vocabulary.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax import sampling


class Tag(enum.IntEnum):
  """What a random number is for. Numbers with different tags are independent."""

  TOKEN = 0
  DRAFT = 1
  ACCEPT = 2
  RESIDUAL = 3


class RoundKeys(NamedTuple):
  """The randomness of one round. Depths count from the root; they may be i32[] or i32[B]."""

  rng_keys: jax.Array  # key[B]
  round: jax.Array  # i32[B] the row's own round counter
  position: jax.Array  # i32[B] position of the root

  def coupled_gumbel(self, vocab_size: int, depth, node=0) -> jax.Array:
    """Returns f32[B, V], the noise of plain sampling for the token at `depth`, at any node."""
    del node
    return _gumbel(_fold(self.rng_keys, self.position + depth, Tag.TOKEN), vocab_size)

  def draft_gumbel(self, vocab_size: int, depth, node=0) -> jax.Array:
    """Returns f32[B, V], fresh noise to draw the children, at `depth`, of a node."""
    return _gumbel(self._fresh(Tag.DRAFT, depth, node), vocab_size)

  def draft_uniform(self, size: int) -> jax.Array:
    """Returns f32[B, size] in [0, 1), fresh numbers for a drafter's own choices."""
    keys = self._fresh(Tag.DRAFT, 0, 0)  # depth 0 is the root, which no one draws
    return jax.vmap(lambda key: jax.random.uniform(key, (size,)))(keys)

  def accepts(self, probability: jax.Array, depth, index: jax.Array | int = 0) -> jax.Array:
    """Returns bool[B], True with the given probability[B]; never where it is 0.

    Decisions of one round are independent if they differ in depth or in index.
    """
    draw = jax.vmap(jax.random.uniform)(self._fresh(Tag.ACCEPT, depth, index))
    return 1 - draw <= probability

  def pick(self, law: jax.Array, depth, index: jax.Array | int = 0) -> jax.Array:
    """Returns i32[B], tokens drawn from law float[B, V], which need not be normalised."""
    gumbel = _gumbel(self._fresh(Tag.RESIDUAL, depth, index), law.shape[-1])
    return sampling.argmax(jnp.log(law) + gumbel)

  def pick_coupled(self, logits: jax.Array, depth) -> jax.Array:
    """Returns i32[B], the tokens at `depth` that plain sampling draws from logits float[B, V]."""
    gumbel = self.coupled_gumbel(logits.shape[-1], depth)
    return sampling.argmax(logits + gumbel)

  def _fresh(self, tag, depth, index):
    # Round counters are folded in as negative numbers, positions as non-negative ones.
    return _fold(self.rng_keys, -1 - self.round, tag, depth, index)


def row_keys(seed: int, row_ids: jax.Array) -> jax.Array:
  """Returns key[B], one key for each of row_ids i32[B], whatever the order of the rows."""
  return _fold(jnp.broadcast_to(jax.random.key(seed), row_ids.shape), row_ids)


def _fold(keys, *data):
  """Returns key[B] with each of i32[B] or i32[] folded in, row by row."""
  for item in data:
    item = jnp.broadcast_to(jnp.asarray(item, jnp.int32), keys.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, item)
  return keys


def _gumbel(keys, size):
  return jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)

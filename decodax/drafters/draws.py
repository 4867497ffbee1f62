"""Draws from many laws over a large vocabulary, with few random numbers.

Noise for every token of every node is what drawing a tree costs most. Here a draw takes two
uniform numbers: one finds a block of tokens by the sums of the blocks, one a token in the block.
The vocabulary is read once, for the sums; every further draw reads the sums and a block.

Axes: `B` batch, `W` nodes, `K` draws from a node, `V` vocabulary, `S` blocks of `L` tokens.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

_BLOCK = 256  # L: about the root of the size of a vocabulary
_SMALLEST = 2.0**-25  # below half the distance of uniform numbers: a waiting time is never 0


class Draws(NamedTuple):
  """K draws from each of W laws, in order."""

  tokens: jax.Array  # i32[B, W, K]
  scores: jax.Array  # f32[B, W, K] log-probability with Gumbel noise, falling along K if drawn
  # without replacement; -inf where the support is used up
  log_q: jax.Array  # f32[B, W, K] log-probability in the law


def num_uniforms(num_draws: int) -> int:
  """Returns how many numbers `without_replacement` and `independent` take for a node."""
  return 3 * num_draws


def without_replacement(law: jax.Array, uniforms: jax.Array) -> Draws:
  """Returns draws without replacement, with scores like those of the Gumbel-top-k trick.

  The K largest of V sums of log-probability and Gumbel noise have the law of this: a token by its
  probability among those that are left, and the logarithms of the arrival times of a process whose
  rate is the mass that is left.

  Args:
    law: f32[B, W, V] logits, not normalised, -inf outside the support.
    uniforms: f32[B, W, 3 K] in [0, 1), independent.

  Exactness: the law of the logits up to rounding of sums in float32.

  Source: Stochastic Beams and Where to Find Them, arXiv:1903.06059, section 2.3; the arrival times
  are A* Sampling, arXiv:1411.0030, section 3, for finitely many outcomes.
  """
  return _draw(law, uniforms, replace=False)


def independent(law: jax.Array, uniforms: jax.Array) -> Draws:
  """Returns independent draws; their scores are their log-probabilities. Otherwise as above."""
  drawn = _draw(law, uniforms, replace=True)
  return drawn._replace(scores=drawn.log_q)


def _draw(law, uniforms, *, replace):
  blocks, top = _in_blocks(law)
  sums = jnp.exp(blocks - top[..., None]).sum(-1)  # f32[B, W, S]
  whole = sums.sum(-1)
  numbers = jnp.arange(blocks.shape[-2])[None, None]  # of the blocks
  places = jnp.arange(blocks.shape[-1])[None, None]  # in a block
  num_draws = uniforms.shape[-1] // 3
  for_block, for_token, for_time = jnp.moveaxis(
    uniforms.reshape(*uniforms.shape[:-1], 3, num_draws), (-2, -1), (0, 1)
  )

  def step(carry, inputs):
    sums, taken, time = carry
    index, u_block, u_token, u_time = inputs
    left = sums.sum(-1)
    block = _pick(sums, u_block)
    logits = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :] - top
    ids = block[..., None] * blocks.shape[-1] + places
    gone = (ids[..., None] == taken[..., None, :]).any(-1)
    weights = jnp.where(gone, 0, jnp.exp(logits))
    inside = _pick(weights, u_token)
    token = block * blocks.shape[-1] + inside
    value = jnp.take_along_axis(logits, inside[..., None], axis=-1)[..., 0]
    time = time - jnp.log1p(-jnp.maximum(u_time, _SMALLEST)) * (whole / left)
    if not replace:
      taken = taken.at[..., index].set(token)
      rest = weights.sum(-1, where=places != inside[..., None])
      sums = jnp.where(numbers == block[..., None], rest[..., None], sums)
    exists = left > 0
    score = jnp.where(exists, -jnp.log(time), -jnp.inf)
    log_q = jnp.where(exists, value - jnp.log(whole), -jnp.inf)
    return (sums, taken, time), (token.astype(jnp.int32), score, log_q)

  start = sums, jnp.full((*whole.shape, num_draws), -1), jnp.zeros_like(whole)
  _, found = lax.scan(step, start, (jnp.arange(num_draws), for_block, for_token, for_time))
  return Draws(*(jnp.moveaxis(each, 0, -1) for each in found))


def _in_blocks(law):
  """Returns (f32[B, W, S, L] with -inf behind the last token, f32[B, W, 1] the largest logit)."""
  vocab_size = law.shape[-1]
  padded = jnp.pad(law, ((0, 0), (0, 0), (0, -vocab_size % _BLOCK)), constant_values=-jnp.inf)
  return padded.reshape(*law.shape[:-1], -1, _BLOCK), law.max(-1, keepdims=True)


def _pick(weights, uniform):
  """Returns i32[B, W], an index of weights f32[B, W, n] by its share; never one of weight 0."""
  sums = jnp.cumsum(weights, axis=-1)
  found = (sums <= uniform[..., None] * sums[..., -1:]).sum(-1)
  last = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, axis=-1)
  return jnp.minimum(found, last)  # the product may round up to the sum of all

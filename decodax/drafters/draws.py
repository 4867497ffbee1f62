"""Draws from many laws over a large vocabulary, with few random numbers.

Gumbel noise for every token of every node is what drawing a tree costs most. Here blocks of tokens
are drawn first, by noise on the logarithms of their sums, and only the tokens of blocks that win
get noise of their own, conditioned on what the block won with. The vocabulary is read once, for
the sums.

Axes: `B` batch, `W` nodes, `K` draws from a node, `V` vocabulary, `S` blocks of `L` tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import sampling

Noise = Callable[[int], jax.Array]
"""size -> independent Gumbel noise f32[B, W, size]."""


class Draws(NamedTuple):
  """K draws from each of W laws, in order."""

  tokens: jax.Array  # i32[B, W, K]
  scores: jax.Array  # f32[B, W, K] log-probability with the noise that chose it; -inf where the
  # support is used up
  log_q: jax.Array  # f32[B, W, K] log-probability in the law


def without_replacement(law: jax.Array, noise: Noise, num_draws: int) -> Draws:
  """Returns draws without replacement: the K largest of log-probability plus Gumbel noise.

  The largest sum of a block is its log-probability plus Gumbel noise, so the blocks with the K
  largest hold all draws, and the sums in a block are noise given its largest.

  Args:
    law: f32[B, W, V] logits, not normalised, -inf outside the support.
    noise: called once, for far fewer than V numbers a node if K is small against V.
    num_draws: K.

  Exactness: the law of the logits, up to rounding of sums in float32.

  Source: Stochastic Beams and Where to Find Them, arXiv:1903.06059, sections 2.3 and 4.1: its
  top-down sampling of a tree, here of two levels.
  """
  blocks = sampling.in_blocks(law)
  num_blocks, size = blocks.shape[-2:]
  sums = jax.nn.logsumexp(blocks, axis=-1)
  total = jax.nn.logsumexp(sums, axis=-1, keepdims=True)
  taken = min(num_draws, num_blocks)
  made = noise(num_blocks + taken * size)
  won, chosen = lax.top_k(sums - total + made[..., :num_blocks], taken)
  inside = jnp.take_along_axis(blocks, chosen[..., None], axis=-2) - total[..., None]
  perturbed = inside + made[..., num_blocks:].reshape(inside.shape)
  perturbed = condition_on_maximum(perturbed, won)
  scores, places = lax.top_k(_flat(perturbed), num_draws)
  tokens = jnp.take_along_axis(chosen, places // size, axis=-1) * size + places % size
  log_q = jnp.take_along_axis(_flat(inside), places, axis=-1)
  return Draws(tokens.astype(jnp.int32), scores, log_q)


def condition_on_maximum(perturbed: jax.Array, maximum: jax.Array) -> jax.Array:
  """Returns Gumbel-perturbed log-probabilities f32[..., K] conditioned on their maximum.

  Order is kept, and the largest becomes the maximum exactly.

  Args:
    perturbed: f32[..., K].
    maximum: f32[...]; -inf gives -inf.

  Source: Stochastic Beams and Where to Find Them, arXiv:1903.06059, appendix B.3, in the stable
  form given there.
  """
  maximum = maximum[..., None]
  exists = perturbed > -jnp.inf
  finite = jnp.where(exists, perturbed, 0)
  top = perturbed.max(-1, keepdims=True)
  below = maximum - finite + jnp.log1p(-jnp.exp(finite - jnp.where(exists, top, 1)))
  conditioned = maximum - jnp.maximum(below, 0) - jnp.log1p(jnp.exp(-jnp.abs(below)))
  return jnp.where(exists, conditioned, -jnp.inf)


def _flat(values):
  return values.reshape(*values.shape[:-2], -1)

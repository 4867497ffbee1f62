"""Random numbers of a denoising step: one key per row, fresh in every step.

Axes: `B` batch.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Purpose(enum.IntEnum):
  """What a random number is for. Numbers with different purposes are independent."""

  TOKEN = 16  # apart from `decodax.noise.Tag`
  ORDER = 17
  REVEAL = 18
  REVOKE = 19


class StepKeys(NamedTuple):
  """The randomness of one step: it depends on the row's key, its own step and the purpose."""

  rng_keys: jax.Array  # key[B]
  step: jax.Array  # i32[B]

  def gumbel(self, shape: tuple[int, ...], purpose: Purpose) -> jax.Array:
    """Returns f32[B, *shape], Gumbel noise at full resolution.

    Noise of low resolution has no large values, which sharpens laws without being asked to.

    Source: Masked Diffusion Models are Secretly Time-Agnostic Masked Models, arXiv:2409.02908.
    """
    return jax.vmap(lambda key: jax.random.gumbel(key, shape, mode='high'))(self._fold(purpose))

  def uniform(self, shape: tuple[int, ...], purpose: Purpose) -> jax.Array:
    """Returns f32[B, *shape] in [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(self._fold(purpose))

  def _fold(self, purpose):
    def fold(key, step):
      return jax.random.fold_in(jax.random.fold_in(key, -1 - step), jnp.int32(purpose))

    return jax.vmap(fold)(self.rng_keys, self.step)

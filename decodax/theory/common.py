"""What all closed forms share: laws as arrays of one dtype.

Axes: `V` vocabulary.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike


def promote(*values: ArrayLike) -> tuple[jax.Array, ...]:
  """Returns the values as arrays of their common dtype, at least float32."""
  dtype = jnp.result_type(*values)
  if not jnp.issubdtype(dtype, jnp.floating):
    dtype = jnp.result_type(float)
  dtype = jnp.promote_types(dtype, jnp.float32)
  return tuple(jnp.asarray(value, dtype) for value in values)


def as_laws(p: ArrayLike, q: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Returns both laws f[..., V] in their common dtype, once their shapes have been compared."""
  p, q = promote(p, q)
  if p.shape != q.shape or not p.ndim:
    raise ValueError(
      f'p and q must be laws of the same shape [..., V]: got {p.shape=} and {q.shape=}.'
    )
  return p, q


def normalize(weights: jax.Array) -> jax.Array:
  """Returns the law in proportion to the weights; all zeros if they are."""
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)


def sorted_by_ratio(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns both laws with the tokens in falling order of q / p."""
  rising = jnp.where(q > 0, p / jnp.where(q > 0, q, 1), jnp.inf)
  order = jnp.argsort(lax.stop_gradient(rising), axis=-1)
  return jnp.take_along_axis(p, order, axis=-1), jnp.take_along_axis(q, order, axis=-1)

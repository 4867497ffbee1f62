"""The XLA form of skinny_matmul."""

from collections.abc import Sequence
import functools

import jax
from jax import lax
import jax.numpy as jnp


def skinny_matmul_reference(
  x: jax.Array, layer: jax.Array, matrices: Sequence[jax.Array]
) -> jax.Array:
  """Returns the product with a layer's matrix; see `skinny_matmul` for arguments and errors."""

  def times(matrix, x):
    return jnp.matmul(x, matrix.astype(x.dtype))

  if len(matrices) == 1:
    return times(matrices[0], x)
  return lax.switch(layer, [functools.partial(times, matrix) for matrix in matrices], x)


def check_arguments(x: jax.Array, layer: jax.Array, matrices: Sequence[jax.Array]) -> None:
  """Checks shapes.

  Raises:
    ValueError: if they disagree.
  """
  shapes = {matrix.shape for matrix in matrices}
  if x.ndim != 2 or len(shapes) != 1 or len(next(iter(shapes))) != 2:
    raise ValueError(
      'skinny_matmul takes x[M, K] and matrices[K, N] of one shape: '
      f'{x.shape=}, shapes of matrices {sorted(shapes)}'
    )
  size = next(iter(shapes))[0]
  if x.shape[1] != size:
    raise ValueError(f'x has {x.shape[1]} columns, the matrices have {size} rows')
  if layer.shape:
    raise ValueError(f'layer must be a scalar: {layer.shape=}')

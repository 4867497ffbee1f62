"""A product of a few rows with one of many large matrices, for CPUs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Kernel
from pallas_kernels.dispatch import dispatch
from pallas_kernels.skinny_matmul import cpu
from pallas_kernels.skinny_matmul.reference import check_arguments
from pallas_kernels.skinny_matmul.reference import skinny_matmul_reference

__all__ = ['skinny_matmul', 'why_not']


def skinny_matmul(
  x: jax.Array,
  matrices: Sequence[jax.Array],
  layer: jax.Array | int = 0,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Returns f[M, N], x times `matrices[layer]`.

  The CPU kernel reads the matrix once for all rows, where XLA packs it first, and takes it where it
  lies: XLA would copy a layer's part of a stacked array. A row gives the same bits alone and in
  a block. It is compiled by the machine's C++ compiler when it is first asked for,
  see `cpu`; without one, and for other dtypes and more rows, this is the XLA form.

  Args:
    x: f[M, K].
    matrices: L times f[K, N].
    layer: i32[], which of them.
    implementation: None (the best that works on the device), 'xla' or 'cpu'.

  Raises:
    ValueError: if shapes disagree.
    NotImplementedError: if the named implementation cannot do this problem.
  """
  layer = jnp.asarray(layer, jnp.int32)
  matrices = tuple(matrices)
  check_arguments(x, layer, matrices)

  def load(name):
    del name  # there is one
    return Kernel(cpu.skinny_matmul_cpu, why_not(x, matrices))

  return dispatch(
    'skinny_matmul', implementation, (x, layer, matrices), xla=skinny_matmul_reference, load=load,
    kernels=('cpu',),
  )  # fmt: skip


def why_not(x: jax.Array, matrices: Sequence[jax.Array]) -> str | None:
  """Returns what keeps the CPU kernel from a problem, or None."""
  return cpu.why_not(x, matrices)

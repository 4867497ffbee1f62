"""Which implementation of an operation runs: the best that works, or the one that was named."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
from typing import Any, NamedTuple

import jax
from jax import lax

IMPLEMENTATIONS = ('xla', 'tpu', 'gpu', 'cpu', 'interpret')
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar('implementation', default=None)


class Kernel(NamedTuple):
  """A Pallas kernel with its options bound, and what keeps it from this problem, if anything."""

  run: Callable  # (*arrays) -> what the operation returns
  why_not: str | None  # None: it can do this problem


@contextlib.contextmanager
def default_implementation(name: str | None) -> Iterator[None]:
  """Within it, `implementation=None` means `name`, in every operation of `pallas_kernels`.

  It is read when a function is traced, so a function that was compiled before keeps what it has.

  Raises:
    ValueError: if there is no such implementation.
  """
  if name is not None and name not in IMPLEMENTATIONS:
    raise ValueError(f'no such implementation: {name!r}; there are {", ".join(IMPLEMENTATIONS)}')
  token = _chosen.set(name)
  try:
    yield
  finally:
    _chosen.reset(token)


def dispatch(
  operation: str,
  implementation: str | None,
  arrays: Sequence[Any],
  *,
  xla: Callable,
  load: Callable[[str], Kernel],
  kernels: Sequence[str] = ('tpu', 'gpu', 'interpret'),
):
  """Returns `f(*arrays)`, f being the implementation that was named or the best that works.

  With None a device gets its kernel if the kernel can do the problem, else the XLA form; so does a
  computation that XLA partitions over several devices, which it could not do with a kernel. What
  `default_implementation` names does not count for an operation that has no such kernel.

  Args:
    operation: its name, for messages.
    implementation: 'xla', one of `kernels` or None.
    arrays: pytrees of arrays.
    xla: the reference.
    load: one of `kernels` -> that kernel. Called when it is needed, since importing Pallas takes a
      second.
    kernels: which ones the operation has: 'tpu', 'gpu', 'cpu', and 'interpret', the TPU kernel
      interpreted on any device.

  Raises:
    NotImplementedError: if what was named does not exist or cannot do this problem.
  """
  there_are = ('xla', *kernels)
  if implementation is None and _chosen.get() in there_are:
    implementation = _chosen.get()
  if implementation == 'xla':
    return xla(*arrays)
  if implementation is None:
    return _automatic(arrays, xla, load, kernels)
  if implementation not in there_are:
    raise NotImplementedError(
      f'{operation} has no {implementation!r} implementation; there are None, '
      + ', '.join(map(repr, there_are))
    )
  kernel = _load(load, implementation)
  if kernel.why_not is not None:
    raise NotImplementedError(f'{operation} with {implementation=}: {kernel.why_not}')
  return kernel.run(*arrays)


def device_kind() -> str:
  """Returns the kind of device that is compiled for: of the abstract mesh if there is one."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if abstract is None else abstract.device_kind


def _automatic(arrays, xla, load, kernels):
  name = jax.default_backend()
  if name not in kernels or _is_partitioned() or (name == 'gpu' and not _is_hopper()):
    return xla(*arrays)
  kernel = _load(load, name)
  if kernel.why_not is not None:
    return xla(*arrays)
  branch = {'cuda' if name == 'gpu' else name: kernel.run}
  return lax.platform_dependent(*arrays, default=xla, **branch)


def _load(load, name):
  try:
    return load(name)
  except ImportError as error:  # Mosaic GPU needs absl-py, which jax does not bring
    return Kernel(run=lambda *_: None, why_not=f'Pallas cannot be imported: {error}')


def _is_partitioned():
  """Returns whether XLA, not a shard_map, spreads what is being traced over several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(
    size > 1 and kind != jax.sharding.AxisType.Manual
    for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  )


def _is_hopper():
  """Returns whether the device has the matrix instructions of compute capability 9.0."""
  return str(getattr(jax.devices()[0], 'compute_capability', '')) == '9.0'

"""Where arrays live on a mesh of devices, and how several processes start together.

The mesh has three axes. Rows of a batch are split over `data` and `fsdp`; parameters over `fsdp`,
and over `tensor` along heads, MLP widths and the vocabulary. A parameter is found by the name it
has in its module, and each of its axes has a *logical* name; the table `RULES` says which mesh axis
a logical one is split over. An axis that does not divide evenly is kept whole.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from decodax.types import PyTree
from train.config import MeshConfig

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # what the rows of a batch are split over

# Logical names of the last axes of a parameter; an axis before them is a stack of layers.
LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
  'embedding': ('vocab', 'embed'),
  'head': ('embed', 'vocab'),
  'qkv': ('embed', 'kv_heads', None, None),
  'qkv_bias': ('kv_heads', None, None),
  'out': ('heads', 'embed'),
  'gate_up': ('embed', None, 'mlp'),
  'gate_up_bias': (None, 'mlp'),
  'down': ('mlp', 'embed'),
  'router': ('embed', None),
}
RULES: dict[str, str] = {
  'vocab': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'embed': 'fsdp',
}
_SMALL = 1 << 14  # entries; smaller arrays are copied everywhere


def start_processes(
  coordinator: str | None, num_processes: int | None, process_id: int | None, *, detect: bool
) -> None:
  """Connects this process with the others of a run, if there are any.

  Args:
    coordinator: 'host:port' of process 0; None unless the three are given by hand.
    num_processes: how many there are.
    process_id: which one this is.
    detect: find the three out from Cloud TPU, Kubernetes, SLURM or OpenMPI.

  Raises:
    ValueError: if some are given and others are missing.
  """
  given = (coordinator, num_processes, process_id)
  if any(each is not None for each in given):
    if any(each is None for each in given):
      raise ValueError('--coordinator, --num-processes and --process-id go together')
    jax.distributed.initialize(coordinator, num_processes, process_id)
  elif detect:
    jax.distributed.initialize()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh over these devices; None is all devices of all processes.

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  sizes, count = [config.data, config.fsdp, config.tensor], len(devices or jax.devices())
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f'mesh axes must be at least 1, or -1 once: {config}')
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count:
    raise ValueError(f'the mesh {dict(zip(AXES, sizes, strict=True))} is not {count} devices')
  types = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def parameter_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns a sharding for every array of a tree of parameters, or of the optimizer's state."""

  def one(path, leaf):
    return NamedSharding(mesh, partition_spec(_names(path), leaf.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(one, tree)


def partition_spec(
  names: Sequence[str], shape: Sequence[int], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
  """Returns how one parameter is split.

  Args:
    names: of the modules it is in, and its own, outermost first.
    shape: of the array.
    mesh_shape: size of each mesh axis.
  """
  if math.prod(shape) < _SMALL:
    return PartitionSpec()
  name = next((each for each in reversed(names) if each in LOGICAL_AXES), None)
  if name is None or len(LOGICAL_AXES[name]) > len(shape):
    return _split_largest(shape, mesh_shape)
  logical = LOGICAL_AXES[name]
  axes: list[str | None] = [None] * (len(shape) - len(logical))
  for axis, size in zip(logical, shape[len(axes) :], strict=True):
    mesh_axis = RULES.get(axis) if axis else None
    fits = mesh_axis is not None and size % mesh_shape[mesh_axis] == 0
    axes.append(mesh_axis if fits else None)
  return PartitionSpec(*axes)


def _split_largest(shape, mesh_shape):
  """Returns the split over `fsdp` of the largest axis that divides evenly."""
  axes: list[str | None] = [None] * len(shape)
  for index in sorted(range(len(shape)), key=lambda i: -shape[i]):
    if shape[index] % mesh_shape['fsdp'] == 0:
      axes[index] = 'fsdp'
      break
  return PartitionSpec(*axes)


def _names(path):
  found = []
  for entry in path:
    name = getattr(entry, 'key', getattr(entry, 'name', None))
    if isinstance(name, str):
      found.append(name)
  return found


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Returns how arrays [B, ...] of a batch are split."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def my_rows(batch_size: int, mesh: Mesh) -> slice:
  """Returns the rows of a batch that this process reads.

  Raises:
    ValueError: if the rows cannot be split evenly over the mesh.
  """
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size % ways:
    raise ValueError(
      f'{batch_size} rows cannot be split over data x fsdp = {ways}; change batch_size, '
      'accumulation or the mesh'
    )
  if ways % jax.process_count():
    raise ValueError(
      f'{jax.process_count()} processes need data x fsdp, {ways}, to be a multiple of them'
    )
  size = batch_size // jax.process_count()
  return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def to_mesh(batch: Any, mesh: Mesh) -> Any:
  """Returns global arrays [B, ...] made of each process's own rows."""
  sharding = row_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """Returns the tree on the mesh; every process must hold the same values."""

  def one(x, sharding):
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(one, tree, shardings)


def to_host(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns NumPy copies of arrays that may be spread over processes; all of them must call it."""
  whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
  return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)

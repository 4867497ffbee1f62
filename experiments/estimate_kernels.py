"""What block attention should take on devices that are not at hand: a model, not a measurement.

    python -m experiments.estimate_kernels

Counts what the kernel, with the block sizes it would choose, moves and computes: bytes of memory,
padding and parts of splits included; products, with the rows of queries and the head padded to the
device's matrix unit; exponentials and other vector operations of the softmax; on a GPU what widens
an 8-bit cache, by the instructions that the compiler makes of it. The estimate is the largest of
these times, each at a stated share of the device's published peak, plus on a TPU the fixed cost of
the grid's steps where memory does not hide it. Axes as in `kernel_problems`.
"""

import argparse
from typing import NamedTuple

import jax.numpy as jnp

from experiments.kernel_problems import Attention
from experiments.kernel_problems import attention
from pallas_kernels.block_attention import block_sizes


class Device(NamedTuple):
  """Published peaks of one device, or of one core where a chip has two devices."""

  kind: str
  bytes_per_second: float
  flops_per_second: float  # of bfloat16 products
  matrix_unit: int  # its height and width: less than that costs as much
  vector_ops_per_second: float  # float32 operations outside the matrix unit


# From the manufacturers' data sheets; vector rates are lanes x issue slots x clock. A tpu7x chip
# is two devices, each with half of its memory bandwidth and products.
DEVICES = {
  'v5e': Device('TPU v5 lite', 819e9, 197e12, 128, 4 * 1024 * 1.5e9),
  'v5p': Device('TPU v5', 2765e9, 459e12, 128, 2 * 4 * 1024 * 1.75e9),
  'v6e': Device('TPU v6 lite', 1640e9, 918e12, 256, 4 * 1024 * 1.75e9),
  'tpu7x': Device('TPU7x', 3690e9, 1153e12, 256, 4 * 1024 * 1.9e9),
  'h200': Device('NVIDIA H200', 4800e9, 989e12, 64, 132 * 128 * 1.755e9),
}
_MEMORY_SHARE = 0.9  # of peak, as copies reach
_MATRIX_SHARE = 0.65  # of peak, as good attention kernels reach
_OPS_PER_SCORE = 12  # scale, mask, maximum, exponential, sum, conversion
_OPS_PER_WIDENED = 4  # of a number of 8 bits: read, convert by way of float32, arrange, write
_LONE_WARPGROUP = 0.5  # of the issue slots that one warpgroup fills, having nothing to switch to
_STEP_SECONDS = 0.35e-6  # of a TPU grid step that memory does not hide


class Estimate(NamedTuple):
  """One problem on one device."""

  device: str
  problem: str
  ms: float
  bound: str  # what takes longest
  share_of_bandwidth: float  # of peak, counting the least bytes that must move
  moved_over_least: float
  fast_memory_kb: float  # of a TPU step, or of a thread block
  detail: str


def estimate(name: str, shape: Attention) -> Estimate:
  """Returns the estimate of a device for a problem with full rows."""
  device, problem = DEVICES[name], attention(shape)
  count = _on_tpu
  if name == 'h200':
    count = _on_gpu_in_float32 if shape.dtype == jnp.float32 else _on_gpu
  moved, rows, fast_memory, fixed, detail = count(device, shape)
  unit = device.matrix_unit if name != 'h200' else 1
  flops_per_second = device.flops_per_second
  if name == 'h200' and shape.dtype == jnp.float32:  # multiplied and added by the vector units
    flops_per_second = 2 * device.vector_ops_per_second
  head = -(-shape.head_dim // unit) * unit
  pairs = shape.batch * shape.num_kv_heads * (shape.prefix + shape.num_queries)
  flops = 4 * pairs * max(rows, unit) * head
  times = {
    'memory': moved / device.bytes_per_second / _MEMORY_SHARE,
    'products': flops / flops_per_second / _MATRIX_SHARE,
    'softmax': pairs * rows * _OPS_PER_SCORE / device.vector_ops_per_second,
  }
  if name == 'h200':
    times['widening'] = _widening_seconds(device, shape)
  bound = max(times, key=times.__getitem__)
  seconds = max(times[bound], fixed)
  return Estimate(
    name, problem.name, 1e3 * seconds, bound if times[bound] >= fixed else 'steps',
    problem.num_bytes / seconds / device.bytes_per_second, moved / problem.num_bytes,
    fast_memory / 1024, detail,
  )  # fmt: skip


def _bytes_outside(shape, rows, rows_out, tokens, num_splits):
  """Returns bytes of queries, outputs or their parts, and the block's own keys and values."""
  heads = shape.batch * shape.num_kv_heads
  size = jnp.dtype(shape.dtype).itemsize
  queries = heads * rows * shape.head_dim * size
  outputs = heads * rows_out * shape.head_dim * size
  outputs *= 1 if num_splits == 1 else 2 * num_splits  # written, and read to merge
  return queries + outputs + 2 * heads * tokens * shape.head_dim * size


def _cache_bytes(shape):
  size = jnp.dtype(shape.cache_dtype or shape.dtype).itemsize
  return 2 * shape.batch * shape.num_kv_heads * shape.prefix * shape.head_dim * size


def _widening_seconds(device, shape):
  """Returns the time a GPU takes to widen an 8-bit cache, once for each tile of queries."""
  if shape.cache_dtype is None or shape.dtype == jnp.float32:
    return 0.0
  num_rows = shape.num_queries * (shape.num_heads // shape.num_kv_heads)
  tiles, warpgroups = (1, 2) if num_rows <= 64 else (-(-num_rows // 128), 1)
  numbers = tiles * _cache_bytes(shape)
  rate = device.vector_ops_per_second * _LONE_WARPGROUP * warpgroups
  return numbers * _OPS_PER_WIDENED / rate


def _on_tpu(device, shape):
  rows = -(-shape.num_queries * (shape.num_heads // shape.num_kv_heads) // 16) * 16
  tokens = -(-shape.num_queries // 16) * 16
  size = jnp.dtype(shape.dtype).itemsize
  problem = block_sizes.Problem(
    rows, tokens, shape.num_kv_heads, shape.head_dim, size,
    jnp.dtype(shape.cache_dtype or shape.dtype).itemsize, shape.prefix,
    128 if shape.paged else None,
  )  # fmt: skip
  sizes = block_sizes.tpu_block_sizes(device.kind, problem)
  assert sizes is not None
  steps = shape.batch * -(-shape.prefix // sizes.block_kv) * (shape.num_kv_heads // sizes.heads)
  moved = _cache_bytes(shape) + _bytes_outside(shape, rows, rows, tokens, sizes.num_splits)
  used = block_sizes.vmem_bytes(problem, sizes.block_kv, sizes.heads)
  detail = f'{sizes.block_kv} slots x {sizes.heads} heads a step, {steps} steps'
  return moved, rows, used, steps * _STEP_SECONDS, detail


def _on_gpu(device, shape):
  num_rows = shape.num_queries * (shape.num_heads // shape.num_kv_heads)
  groups = 1 if num_rows <= 64 else 2
  rows = -(-num_rows // (64 * groups)) * 64 * groups
  tiles, pairs = rows // (64 * groups), shape.batch * shape.num_kv_heads
  page = 128 if shape.paged else None
  narrow = shape.cache_dtype is not None
  sizes = block_sizes.gpu_block_sizes(
    device.kind, shape.head_dim, pairs * tiles, shape.prefix, page, narrow
  )
  tokens = -(-shape.num_queries // sizes.block_kv) * sizes.block_kv
  rows_out = rows if groups > 1 else -(-num_rows // 8) * 8
  moved = _cache_bytes(shape) + _bytes_outside(shape, rows, rows_out, tokens, sizes.num_splits)
  used = 2 * shape.head_dim * (groups * 64 + 2 * sizes.stages * sizes.block_kv)
  if narrow:
    used += 2 * shape.head_dim * sizes.narrow_stages * sizes.block_kv
  blocks = pairs * tiles * sizes.num_splits
  resident = max(1, int(227 * 1024 // used))
  detail = f'{sizes.num_splits} splits, {blocks} thread blocks, {resident} a multiprocessor'
  return moved, rows, used, 0.0, detail


def _on_gpu_in_float32(device, shape):
  num_rows = shape.num_queries * (shape.num_heads // shape.num_kv_heads)
  pairs = shape.batch * shape.num_kv_heads
  sizes = block_sizes.float32_block_sizes(
    device.kind, shape.head_dim, num_rows, pairs, shape.prefix
  )
  rows = -(-num_rows // sizes.rows) * sizes.rows
  tokens = -(-shape.num_queries // sizes.block_kv) * sizes.block_kv
  moved = _cache_bytes(shape) + _bytes_outside(shape, rows, rows, tokens, sizes.num_splits)
  used = 4 * shape.head_dim * (sizes.rows + 2 * sizes.stages * sizes.block_kv)
  blocks = pairs * (rows // sizes.rows) * sizes.num_splits
  return moved, rows, used, 0.0, f'{sizes.num_splits} splits, {blocks} thread blocks'


def render(estimates: list[Estimate]) -> str:
  """Returns a Markdown table."""
  lines = [
    '| device | problem | estimate, ms | bound by | of peak bandwidth | moved / least | '
    'fast memory, KiB | blocks |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for e in estimates:
    lines.append(
      f'| {e.device} | {e.problem} | {e.ms:.3f} | {e.bound} | {e.share_of_bandwidth:.0%} | '
      f'{e.moved_over_least:.2f} | {e.fast_memory_kb:.0f} | {e.detail} |'
    )
  return '\n'.join(lines)


def main(argv=None) -> int:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description='What block attention should take on devices that are not at hand.'
  )
  parser.add_argument('--devices', nargs='+', choices=sorted(DEVICES), default=list(DEVICES))
  options = parser.parse_args(argv)
  shapes = [
    Attention(num_queries=1, prefix=1024),
    Attention(num_queries=1, prefix=32768),
    Attention(num_queries=16, prefix=32768),
    Attention(num_queries=64, prefix=32768),
    Attention(num_queries=64, prefix=32768, num_heads=8),
  ]
  more = {
    'h200': [
      *(Attention(num_queries=n, prefix=32768, cache_dtype=jnp.int8) for n in (1, 16, 64)),
      *(Attention(num_queries=n, prefix=32768, dtype=jnp.float32) for n in (1, 16, 64)),
    ]
  }
  jobs = [(name, s) for name in options.devices for s in (*shapes, *more.get(name, []))]
  print(render([estimate(*job) for job in jobs]))
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

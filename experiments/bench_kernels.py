"""How near the kernels come to what the device can do, beside XLA and, on CUDA, PyTorch.

    python -m experiments.bench_kernels --out results/bench-kernels

On a TPU or a GPU every problem runs with the kernel and with XLA; attention also with
`jax.nn.dot_product_attention` over one long sequence with a dense mask, and, if PyTorch is
installed, with its scaled dot-product attention (dense mask) and FlexAttention (the same tree as a
mask function, compiled). On a CPU, where XLA is what runs, the layouts it could read the cache in
are compared. Achieved bandwidth counts the bytes that any implementation must move, and stands
beside the bandwidth of a copy and the FLOP/s of a matrix product measured in the same run.
"""

import argparse
from collections.abc import Callable
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import files
from experiments.kernel_problems import Attention
from experiments.kernel_problems import Problem
from experiments.kernel_problems import attention
from experiments.kernel_problems import commit_path
from experiments.kernel_problems import fill
from experiments.kernel_problems import unmask_block
from experiments.kernel_problems import verify_nodes
from experiments.timing import Ceilings
from experiments.timing import measure_ceilings
from experiments.timing import seconds_per_call


class Row(NamedTuple):
  """One problem with one implementation."""

  problem: str
  implementation: str
  ms: float | None  # None: why says why not
  share_of_bandwidth: float | None = None
  share_of_flops: float | None = None
  why: str = ''


def problems_for(backend: str) -> list[Problem]:
  """Returns what is measured on a device of that kind."""
  if backend == 'cpu':
    small = functools.partial(
      Attention, batch=2, num_heads=8, num_kv_heads=2, head_dim=64, dtype=jnp.float32
    )
    return [
      attention(small(num_queries=1, prefix=2048)),
      attention(small(num_queries=16, prefix=2048)),
      commit_path(batch=4, num_layers=4, num_slots=1024),
      verify_nodes(batch=1, nodes=16, vocab_size=32000, filtered=True),
      unmask_block(batch=1, length=32, vocab_size=32000, dtype=jnp.float32),
    ]
  shapes = [
    Attention(batch=batch, num_queries=num_queries, prefix=prefix)
    for prefix in (1024, 8192, 32768)
    for batch, num_queries in ((1, 1), (8, 1), (8, 16), (8, 64))
  ]
  shapes += [
    Attention(num_queries=64, prefix=32768, num_heads=8, num_kv_heads=8),  # bound by memory
    Attention(paged=True),
    Attention(windowed=True),
    Attention(cache_dtype=jnp.int8),
    Attention(num_queries=1, prefix=32768, cache_dtype=jnp.int8),
    Attention(num_queries=1, prefix=32768, cache_dtype=jnp.float8_e4m3fn),
    Attention(num_queries=1, dtype=jnp.float32),
    Attention(num_queries=16, dtype=jnp.float32),
  ]
  return [
    *map(attention, shapes),
    commit_path(),
    commit_path(paged=True),
    verify_nodes(),
    verify_nodes(filtered=True),
    verify_nodes(laws=True),
    unmask_block(),
    unmask_block(hidden=4096),
  ]


def measure(problem: Problem, ceilings: Ceilings, repeats: int) -> list[Row]:
  """Returns a row for every implementation of a problem on the default device."""
  args = fill(problem)
  backend = jax.default_backend()
  names = ['xla'] if backend == 'cpu' else ['xla', backend]
  rows = [
    _row(problem, name, _job(problem, args, implementation=name), ceilings, repeats)
    for name in names
  ]
  if not problem.name.startswith('attention'):
    return rows
  if backend == 'cpu':
    for size in (64, 256, 1024):
      if problem.args[4].positions.shape[1] % size:
        continue
      job = _job(problem, args, implementation='xla', prefix_block_size=size)
      rows.append(_row(problem, f'xla, {size} slots at a time', job, ceilings, repeats))
  if problem.args[4].page_table is None and problem.args[4].key_scale is None:
    job = functools.partial(_dense_job, args)
    rows.append(_row(problem, 'jax.nn.dot_product_attention', job, ceilings, repeats))
  if backend == 'gpu':
    rows += _torch_rows(problem, args, ceilings)
  return rows


def _row(problem, name, make_job, ceilings, repeats):
  try:
    call, carry = make_job()
    seconds = seconds_per_call(call, carry, repeats=repeats)
  except Exception as error:  # a peer or a kernel that cannot is a line in the table
    return Row(problem.name, name, None, why=' '.join(str(error).split())[:300])
  return _timed(problem, name, seconds, ceilings)


def _timed(problem, name, seconds, ceilings):
  return Row(
    problem.name,
    name,
    ms=1e3 * seconds,
    share_of_bandwidth=problem.num_bytes / seconds / ceilings.copy_bytes_per_second,
    share_of_flops=problem.num_flops / seconds / ceilings.flops_per_second,
  )


def _job(problem: Problem, args, **options) -> Callable:
  """Returns () -> (call, carry): a call takes what the one before it returned, if it can."""

  def make():
    run = functools.partial(problem.run, **options)
    if problem.name.startswith('commit'):
      compiled = jax.jit(run, donate_argnums=0)
      return lambda slots: compiled(slots, *args[1:]), jnp.copy(args[0])
    compiled = jax.jit(run)
    if problem.name.startswith('attention'):
      return lambda queries: compiled(queries, *args[1:]), args[0]
    return lambda _: compiled(*args), None

  return make


def _dense_job(args):
  """Attention over prefix and block as one sequence, with a dense mask."""
  queries, keys, values, mask, prefix, *_ = args
  long = [
    jnp.concatenate([slots[0], own], axis=2).transpose(0, 2, 1, 3)
    for slots, own in ((prefix.keys, keys), (prefix.values, values))
  ]
  seen = jnp.ones((*mask.shape[:2], prefix.positions.shape[1]), bool)
  dense = jnp.concatenate([seen, mask], axis=2)[:, None]
  run = jax.jit(lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m))
  return lambda q: run(q, *long, dense), queries


def _torch_rows(problem, args, ceilings):
  try:
    from experiments import torch_attention
  except ImportError as error:
    return [Row(problem.name, 'PyTorch', None, why=str(error))]
  queries, keys, values, mask, prefix, *_ = args
  if prefix.page_table is not None or prefix.key_scale is not None:
    return []
  if queries.dtype != jnp.bfloat16:  # which is what PyTorch is measured in
    return []
  shape = (queries.shape, keys.shape[1], prefix.positions.shape[1])
  rows = []
  for name, seconds in torch_attention.measure(*shape, jax.device_get(mask)).items():
    if isinstance(seconds, str):
      rows.append(Row(problem.name, name, None, why=seconds))
    else:
      rows.append(_timed(problem, name, seconds, ceilings))
  return rows


def render(ceilings: Ceilings, rows: list[Row]) -> str:
  """Returns the result as Markdown."""
  lines = [
    f'{ceilings.device}, jax {jax.__version__}: a copy moves '
    f'{ceilings.copy_bytes_per_second / 1e9:.0f} GB/s, a matrix product makes '
    f'{ceilings.flops_per_second / 1e12:.1f} TFLOP/s.',
    '',
    '| problem | implementation | ms | of copy bandwidth | of matmul FLOP/s |',
    '|---|---|---|---|---|',
  ]
  for row in rows:
    if row.ms is None:
      lines.append(f'| {row.problem} | {row.implementation} | - | | |')
    else:
      shares = f'{row.share_of_bandwidth:.0%} | {row.share_of_flops:.0%}'
      lines.append(f'| {row.problem} | {row.implementation} | {row.ms:.3f} | {shares} |')
  notes = [f'{r.problem}, {r.implementation}: {r.why}' for r in rows if r.ms is None]
  return '\n'.join([*lines, '', *notes])


def plot(rows: list[Row], path: pathlib.Path) -> None:
  """Writes bars of the share of copy bandwidth; does nothing without matplotlib."""
  try:
    from matplotlib import pyplot
  except ImportError:
    return
  timed = [row for row in rows if row.ms is not None][::-1]
  figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(timed)), layout='constrained')
  names = [f'{row.problem} · {row.implementation}' for row in timed]
  axes.barh(range(len(timed)), [100 * (row.share_of_bandwidth or 0) for row in timed])
  axes.set_yticks(range(len(timed)), names, fontsize=6)
  axes.set_xlabel('% of measured copy bandwidth')
  figure.savefig(path)
  pyplot.close(figure)


def main(argv=None) -> int:
  """Measures, prints Markdown, writes `bench_kernels.json` and a plot."""
  parser = argparse.ArgumentParser(
    description='How near the kernels come to what the device can do.'
  )
  parser.add_argument('--only', default='', help='problems whose name contains this')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--out', type=pathlib.Path, help='folder for bench_kernels.json and .png')
  options = parser.parse_args(argv)
  ceilings = measure_ceilings()
  rows = []
  for problem in problems_for(jax.default_backend()):
    if options.only in problem.name:
      rows += measure(problem, ceilings, options.repeats)
  print(render(ceilings, rows))
  if options.out is not None:
    record = {'jax': jax.__version__, **ceilings._asdict(), 'rows': [r._asdict() for r in rows]}
    files.write_whole(options.out / 'bench_kernels.json', files.to_json(record))
    plot(rows, options.out / 'bench_kernels.png')
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

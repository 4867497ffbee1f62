"""Are the kernels right on this device, and how fast: one command for a machine that has one.

    make gpu-check
    python3 -m experiments.gpu_check --out results/gpu-check

Needs jax with its accelerator plugin, and nothing else of the project's packages; PyTorch is
compared with if it is installed. First every kernel is held against the XLA form on the device:
ragged rows, dead slots full of NaN, pages, windows, soft cap, splits, several head sizes. Then
`bench_kernels` measures. The exit status is 1 if a kernel is wrong, or cannot do what it should.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_kernels
from experiments.kernel_problems import Problem
from experiments.kernel_problems import commit_path
from experiments.kernel_problems import fill
from experiments.kernel_problems import unmask_block
from experiments.kernel_problems import verify_nodes
from experiments.ragged_attention import SCALE
from experiments.ragged_attention import Shape
from experiments.ragged_attention import make_problem
from experiments.ragged_attention import window_options
from pallas_kernels.block_attention import block_attention

_HALF = functools.partial(Shape, dtype=jnp.bfloat16, num_heads=32, num_kv_heads=8, head_dim=128)
_WHOLE = functools.partial(_HALF, dtype=jnp.float32)
_ATTENTION = {
  'one token': (_HALF(num_queries=1, num_slots=4096, lengths=(0, 1, 511, 4096)), {}),
  'a tree of 64': (_HALF(num_queries=64, num_slots=2048, lengths=(0, 1, 129, 2048)), {}),
  'a block of 256': (_HALF(num_queries=256, num_slots=1024, lengths=(0, 600, 1024)), {}),
  'pages': (_HALF(num_queries=16, num_slots=2048, page_size=128, lengths=(0, 1, 1999)), {}),
  'small pages': (_HALF(num_queries=5, num_slots=1024, page_size=64, lengths=(0, 65, 1000)), {}),
  'window': (_HALF(num_queries=16, num_slots=2048, lengths=(0, 1, 1999)), dict(window=300)),
  'soft cap': (_HALF(num_queries=16, num_slots=2048, lengths=(0, 1, 1999)), dict(soft_cap=5.0)),
  'head size 64': (_HALF(num_queries=16, head_dim=64, num_slots=1024, lengths=(0, 1000)), {}),
  'head size 80': (_HALF(num_queries=16, head_dim=80, num_slots=1024, lengths=(0, 1000)), {}),
  'head size 256': (
    _HALF(num_queries=16, num_heads=8, num_kv_heads=4, head_dim=256, lengths=(0, 250)), {},
  ),
  'int8, one token': (
    _HALF(num_queries=1, cache_dtype=jnp.int8, num_slots=4096, lengths=(0, 1, 511, 4096)), {},
  ),
  'int8, a tree of 64': (
    _HALF(num_queries=64, cache_dtype=jnp.int8, num_slots=2048, lengths=(0, 1, 129, 2048)), {},
  ),
  'int8, pages, window': (
    _HALF(
      num_queries=16, cache_dtype=jnp.int8, num_slots=2048, page_size=128, lengths=(0, 1, 1999),
    ),
    dict(window=300),
  ),
  'float8, a tree of 64': (
    _HALF(
      num_queries=64, cache_dtype=jnp.float8_e4m3fn, num_slots=2048, lengths=(0, 1, 129, 2048),
    ),
    {},
  ),
  'float8, pages, head size 80': (
    _HALF(
      num_queries=5, cache_dtype=jnp.float8_e4m3fn, head_dim=80, num_slots=1024, page_size=64,
      lengths=(0, 65, 1000),
    ),
    {},
  ),
  'float8, head size 256': (
    _HALF(
      num_queries=40, num_heads=8, num_kv_heads=4, head_dim=256, cache_dtype=jnp.float8_e5m2,
      lengths=(0, 250),
    ),
    {},
  ),
  'float32, one token': (
    _WHOLE(num_queries=1, num_slots=4096, lengths=(0, 1, 511, 4096)), {},
  ),
  'float32, a tree of 64, soft cap': (
    _WHOLE(num_queries=64, num_slots=1024, lengths=(0, 129, 1024)), dict(soft_cap=5.0),
  ),
  'float32, pages, window, head size 80': (
    _WHOLE(num_queries=5, head_dim=80, num_slots=1024, page_size=64, lengths=(0, 65, 1000)),
    dict(window=300),
  ),
  'float32, int8, head size 256': (
    _WHOLE(
      num_queries=16, num_heads=8, num_kv_heads=4, head_dim=256, cache_dtype=jnp.int8,
      lengths=(0, 250),
    ),
    {},
  ),
  'float32, float8': (
    _WHOLE(num_queries=16, cache_dtype=jnp.float8_e4m3fn, num_slots=1024, lengths=(0, 1000)), {},
  ),
  'multi-query': (_HALF(num_queries=16, num_kv_heads=1, num_slots=1024, lengths=(0, 1000)), {}),
}  # fmt: skip
_TOLERANCE = 0.02  # of bfloat16, absolute and relative
_FLOAT32_TOLERANCE = 1e-4


def check_attention(name: str, implementation: str) -> str:
  """Returns 'ok' or what is wrong."""
  shape, options = _ATTENTION[name]
  inputs, options = make_problem(shape), dict(options)
  if 'window' in options:
    options |= window_options(shape, options['window'])
  soft_cap = options.pop('soft_cap', None)

  def run(which):
    call = functools.partial(block_attention, scale=SCALE, soft_cap=soft_cap, implementation=which)
    # XLA would round what it multiplies in float32.
    with jax.default_matmul_precision('highest' if which == 'xla' else None):
      return np.asarray(jax.jit(call)(*inputs, **options), np.float32)

  tolerance = _FLOAT32_TOLERANCE if shape.dtype == jnp.float32 else _TOLERANCE
  return _compare(run(implementation), run('xla'), tolerance)


def check_problem(problem: Problem, implementation: str) -> str:
  """Returns 'ok' or what is wrong with another kernel."""
  args = fill(problem)
  found, expected = (
    jax.jit(functools.partial(problem.run, implementation=name))(*args)
    for name in (implementation, 'xla')
  )
  if problem.name.startswith('commit'):
    return _compare(found[:2], expected[:2], 0)
  verdicts = {}
  for name, ours, theirs in zip(found._fields, found, expected, strict=True):
    if ours is None:
      continue
    if ours.dtype == jnp.int32:  # a tie within rounding may fall either way
      wrong = float(np.mean(np.asarray(ours) != np.asarray(theirs)))
      verdicts[name] = 'ok' if wrong <= 0.01 else f'{wrong:.0%} differ'
    else:
      verdicts[name] = _compare(ours, theirs)
  bad = [f'{name}: {verdict}' for name, verdict in verdicts.items() if verdict != 'ok']
  return '; '.join(bad) or 'ok'


def _compare(ours, theirs, tolerance=_TOLERANCE):
  ours, theirs = (np.asarray(jnp.asarray(a, jnp.float32)) for a in (ours, theirs))
  close = np.isclose(ours, theirs, atol=tolerance, rtol=tolerance)
  if close.all():
    return 'ok'
  with np.errstate(invalid='ignore'):  # infinity less infinity
    worst = np.nanmax(np.abs(ours - theirs))
  return f'{1 - close.mean():.2%} of the numbers are wrong, by up to {worst:.3g}'


def main(argv=None) -> int:
  """Checks, prints a line each, then measures."""
  parser = argparse.ArgumentParser(
    description='Are the kernels right on this device, and how fast.'
  )
  parser.add_argument('--no-bench', action='store_true', help='check only')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('results/gpu-check'))
  options = parser.parse_args(argv)
  backend = jax.default_backend()
  if backend not in ('gpu', 'tpu'):
    print(f'This machine has no GPU that jax sees, only {backend!r}: nothing to check.')
    return 2
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  others = [
    commit_path(), commit_path(paged=True), verify_nodes(batch=2), verify_nodes(2, filtered=True),
    verify_nodes(2, laws=True), unmask_block(), unmask_block(hidden=4096),
  ]  # fmt: skip
  jobs = {f'attention: {n}': functools.partial(check_attention, n, backend) for n in _ATTENTION}
  jobs |= {problem.name: functools.partial(check_problem, problem, backend) for problem in others}
  failed = 0
  for name, job in jobs.items():
    try:
      verdict = job()
    except Exception as error:  # one kernel that does not run must not hide the others
      verdict = f'{type(error).__name__}: {" ".join(str(error).split())[:500]}'
    failed += verdict != 'ok'
    print(f'{name}: {verdict}', flush=True)
  print(f'{len(jobs) - failed} of {len(jobs)} kernels agree with XLA.')
  if not options.no_bench:
    bench_kernels.main(['--out', str(options.out)])
  return 1 if failed else 0


if __name__ == '__main__':
  raise SystemExit(main())

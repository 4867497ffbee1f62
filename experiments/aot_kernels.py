"""Compiles every kernel for TPUs and for an H200, on a machine that has neither.

    make aot
    python -m experiments.aot_kernels --targets v5e h200 --out results/aot
    python -m experiments.aot_kernels --targets v5p h200 --decode llama-8b

Each problem of `kernel_problems.compiled_problems` is compiled to machine code by the device's own
compiler (libtpu, ptxas), which rejects what does not fit into its memories, and the memory of the
compiled program is written down: arguments, outputs and what it needs besides. `make aot` installs
the compilers into an environment of their own. A kernel that says it cannot do a problem is
reported with its reason. With `--decode` a loop of whole decoding steps is compiled instead, with
the kernels and without: its memory shows whether the loop copies the cache. The exit status is 1 if
anything fails.
"""

import argparse
import functools
import os
import pathlib
import time
from typing import NamedTuple

_TPU_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'JAX_PLATFORMS': 'cpu',
}
os.environ.update(_TPU_ENVIRONMENT)  # before jax starts

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from experiments import files
from experiments.kernel_problems import Problem
from experiments.kernel_problems import compiled_problems
from pallas_kernels import default_implementation

_TPUS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
_H200 = pathlib.Path(__file__).parent / 'data' / 'h200.textproto'
TARGETS = (*_TPUS, 'h200')


class Compiled(NamedTuple):
  """One problem compiled for one target."""

  target: str
  problem: str
  outcome: str  # 'ok', why the kernel cannot do it, or the error
  seconds: float
  argument_bytes: int = 0
  output_bytes: int = 0
  temp_bytes: int = 0

  @property
  def failed(self) -> bool:
    """Returns whether it should have compiled and did not."""
    return self.outcome.startswith('error')


def mesh_for(target: str) -> Mesh:
  """Returns a mesh of one device of a target that need not be there."""
  if target == 'h200':
    topology = topologies.get_topology_desc(
      platform='cuda', topology_name='h200:1x1x1', topology='1x1x1',
      target_config=_H200.read_text(encoding='utf-8'),
    )  # fmt: skip
  else:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=_TPUS[target])
  return Mesh(np.array(topology.devices[:1]), ('x',))


def compile_problem(problem: Problem, target: str, mesh: Mesh) -> Compiled:
  """Returns what compiling a problem came to, with the kernel of the target."""
  name = 'gpu' if target == 'h200' else 'tpu'
  donated = 0 if problem.name.startswith('commit') else ()
  run = functools.partial(problem.run, implementation=name)
  return _compile(problem.name, run, problem.args, target, mesh, donated)


def compile_decoding(config: str, target: str, mesh: Mesh, implementation: str) -> Compiled:
  """Returns what compiling a loop of decoding steps came to: batch 8, prefix 8192, 16 tokens."""
  from flax import nnx

  from experiments.bench_decode import CONFIGS
  from experiments.bench_decode import make_step
  from models.adapter import as_model
  from models.transformer import Transformer

  make = functools.partial(Transformer, CONFIGS[config], param_dtype=jnp.bfloat16)
  abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
  model, params = as_model(abstract), nnx.state(abstract)
  cache = jax.eval_shape(lambda: model.init_cache(None, 8, 8320))
  step = make_step(model, 8192, 8, 16)

  def loop(params, carry):
    return jax.lax.fori_loop(0, 4, lambda _, carry: step(params, carry), carry)

  args = params, (cache, jax.ShapeDtypeStruct((8, 16), jnp.int32))
  with default_implementation(implementation):
    return _compile(f'{config}, {implementation}', loop, args, target, mesh, 1)


def _compile(name, run, args, target, mesh, donated):
  start = time.perf_counter()
  try:
    with jax.set_mesh(mesh):
      whole = NamedSharding(mesh, PartitionSpec())
      traced = jax.jit(run, in_shardings=whole, donate_argnums=donated).trace(*args)
      platform = 'cuda' if target == 'h200' else 'tpu'
      compiled = traced.lower(lowering_platforms=(platform,)).compile()
  except NotImplementedError as why:
    return Compiled(target, name, f'not done: {why}', time.perf_counter() - start)
  except Exception as error:  # the compilers raise what they like
    message = ' '.join(str(error).split())[:500]
    outcome = f'error: {type(error).__name__}: {message}'
    return Compiled(target, name, outcome, time.perf_counter() - start)
  memory = compiled.memory_analysis()
  assert memory is not None
  return Compiled(
    target, name, 'ok', time.perf_counter() - start,
    memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes,
  )  # fmt: skip


def render(results: list[Compiled]) -> str:
  """Returns a Markdown table: a row a problem, what each target needs besides arguments in MB."""
  targets = list(dict.fromkeys(result.target for result in results))
  lines = ['| problem | ' + ' | '.join(targets) + ' |', '|---' * (len(targets) + 1) + '|']
  by_key = {(r.problem, r.target): r for r in results}
  for name in dict.fromkeys(result.problem for result in results):
    cells = []
    for target in targets:
      result = by_key[name, target]
      ok = f'{result.temp_bytes / 1e6:.1f} MB'
      cells.append(ok if result.outcome == 'ok' else result.outcome.split(':')[0])
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  notes = dict.fromkeys(
    f'{r.target}, {r.problem}: {r.outcome}' for r in results if r.outcome != 'ok'
  )
  return '\n'.join([*lines, '', *notes])


def _compile_all(options, target, mesh):
  if options.decode:
    for name in ('gpu' if target == 'h200' else 'tpu', 'xla'):
      yield compile_decoding(options.decode, target, mesh, name)
    return
  for problem in compiled_problems():
    if options.only in problem.name:
      yield compile_problem(problem, target, mesh)


def main(argv=None) -> int:
  """Compiles, prints a table and writes `aot_kernels.json`."""
  parser = argparse.ArgumentParser(description='Compiles the kernels for TPUs and an H200.')
  parser.add_argument('--targets', nargs='+', choices=TARGETS, default=list(TARGETS))
  parser.add_argument('--only', default='', help='problems whose name contains this')
  parser.add_argument('--decode', help='compile decoding with this model of bench_decode instead')
  parser.add_argument('--out', type=pathlib.Path, help='folder for aot_kernels.json')
  options = parser.parse_args(argv)
  results = []
  for target in options.targets:
    mesh = mesh_for(target)
    for compiled in _compile_all(options, target, mesh):
      results.append(compiled)
      print(f'{target} {compiled.problem}: {compiled.outcome}', flush=True)
  print(render(results))
  if options.out is not None:
    record = {'jax': jax.__version__, 'results': [r._asdict() for r in results]}
    files.write_whole(options.out / 'aot_kernels.json', files.to_json(record))
  return 1 if any(result.failed for result in results) else 0


if __name__ == '__main__':
  raise SystemExit(main())

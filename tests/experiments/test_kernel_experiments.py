"""What the scripts about kernels compute from what they measure, and the problems they share."""

import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kernels
from experiments import estimate_kernels
from experiments import gpu_check
from experiments import tune_kernels
from experiments.kernel_problems import Attention
from experiments.kernel_problems import attention
from experiments.kernel_problems import commit_path
from experiments.kernel_problems import fill
from experiments.kernel_problems import verify_nodes
from experiments.timing import Ceilings
from experiments.timing import seconds_per_call

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_TINY = Attention(
  batch=2, num_queries=3, prefix=256, num_heads=4, num_kv_heads=2, head_dim=16, dtype=jnp.float32
)


@pytest.mark.parametrize(
  'problem',
  [
    attention(_TINY._replace(paged=True, windowed=True)),
    commit_path(batch=2, num_layers=2, num_slots=1024, path=3, nodes=5, paged=True),
    verify_nodes(batch=2, nodes=3, vocab_size=50, filtered=True, laws=True),
  ],
)
def test_a_problem_is_filled_with_what_it_declares(problem):
  filled = fill(problem)
  declared = jax.tree.map(lambda a: (a.shape, a.dtype), problem.args)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), filled) == declared


def test_bytes_and_operations_are_counted_by_hand():
  problem = attention(_TINY)
  cache, block = 2 * 2 * 2 * 256 * 16 * 4, 2 * 2 * 2 * 3 * 16 * 4
  assert problem.num_bytes == cache + block + 2 * (2 * 3 * 4 * 16 * 4)
  assert problem.num_flops == 4 * 2 * 4 * 3 * (256 + 3) * 16


def test_calls_follow_each_other():
  assert seconds_per_call(lambda x: x + 1, jnp.zeros(()), repeats=1) > 0


def test_rows_are_shares_of_what_the_device_can_do():
  ceilings = Ceilings('a device', copy_bytes_per_second=1e9, flops_per_second=1e12)
  rows = bench_kernels.measure(attention(_TINY), ceilings, repeats=1)
  assert [row.implementation for row in rows][-1] == 'jax.nn.dot_product_attention'
  assert all(row.ms is not None and row.share_of_bandwidth for row in rows), rows
  text = bench_kernels.render(ceilings, [*rows, bench_kernels.Row('p', 'x', None, why='no')])
  assert 'a copy moves 1 GB/s' in text and 'p, x: no' in text


def test_the_best_candidate_has_the_smallest_geometric_mean():
  times = [{1: 1.0, 2: 2.0, 3: math.inf}, {1: 3.0, 2: 1.0, 3: 1.0}]
  score = tune_kernels.score(times)
  assert min(score, key=score.__getitem__) == 2
  assert score[2] == pytest.approx(math.sqrt(2)) and score[1] == pytest.approx(math.sqrt(3))
  assert score[3] == math.inf


def test_an_estimate_is_never_faster_than_memory_allows():
  for name, device in estimate_kernels.DEVICES.items():
    for num_queries in (1, 64):
      shape = Attention(num_queries=num_queries, prefix=32768)
      found = estimate_kernels.estimate(name, shape)
      least = attention(shape).num_bytes / device.bytes_per_second
      assert found.ms / 1e3 > least and found.moved_over_least >= 1
      assert 0.1 < found.share_of_bandwidth < 1


@pytest.mark.parametrize(
  'options, bound', [(dict(cache_dtype=jnp.int8), 'memory'), (dict(dtype=jnp.float32), 'products')]
)
def test_estimates_know_other_numbers_than_bfloat16(options, bound):
  shape = Attention(num_queries=16, prefix=32768)
  plain = estimate_kernels.estimate('h200', shape)
  other = estimate_kernels.estimate('h200', shape._replace(**options))
  assert plain.bound == 'memory' and other.bound == bound
  assert (other.ms < plain.ms) == ('cache_dtype' in options)
  least = attention(shape._replace(**options)).num_bytes / 4800e9
  assert other.ms / 1e3 > least


def test_widening_can_be_what_an_8_bit_cache_costs():
  device = estimate_kernels.DEVICES['h200']
  few, many = (
    estimate_kernels._widening_seconds(device, Attention(num_queries=n, cache_dtype=jnp.int8))
    for n in (16, 64)
  )
  assert many == 4 * few  # two tiles of queries widen what one does, each with half the hands
  assert estimate_kernels._widening_seconds(device, Attention()) == 0


def test_a_wrong_kernel_is_told_from_a_right_one():
  right = jnp.asarray([1.0, -2.0, jnp.inf])
  assert gpu_check._compare(right, right * 1.001) == 'ok'
  assert 'are wrong' in gpu_check._compare(right, jnp.asarray([1.0, -1.0, jnp.inf]))
  assert 'are wrong' in gpu_check._compare(jnp.asarray([np.nan, 1.0, 1.0]), jnp.ones(3))


def test_without_a_device_the_check_says_so(capsys):
  assert gpu_check.main([]) == 2
  assert tune_kernels.main([]) == 2
  assert 'nothing to check' in capsys.readouterr().out


def test_the_gpu_check_starts_where_only_jax_is_installed():
  others = (
    'flax',
    'optax',
    'orbax',
    'chex',
    'huggingface_hub',
    'safetensors',
    'rich',
    'matplotlib',
  )
  code = (
    'import sys\n'
    f'sys.modules.update(dict.fromkeys({others!r}))\n'  # None: cannot be imported
    'from experiments import gpu_check\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=_ROOT, check=True, timeout=120)

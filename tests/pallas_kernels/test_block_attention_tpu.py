"""The TPU kernel of block attention, interpreted with all its checks on, against the XLA form."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import default_implementation
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention import tpu
from pallas_kernels.block_attention.block_sizes import TpuBlockSizes
from pallas_kernels.masks import pack_mask
from tests.pallas_kernels.problems import SCALE
from tests.pallas_kernels.problems import Shape
from tests.pallas_kernels.problems import make_problem
from tests.pallas_kernels.problems import window_options

_TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2e-2}
_CASES = {
  'one token, ragged': (Shape(num_queries=1, num_slots=640, lengths=(0, 1, 511, 512, 640)), {}),
  'a tree': (Shape(num_queries=40, num_heads=6), {}),
  'multi-query, head size 80': (Shape(num_kv_heads=1, head_dim=80), {}),
  'multi-head, head size 256': (Shape(num_kv_heads=4, head_dim=256), {}),
  'bfloat16, head size 128': (Shape(num_queries=7, head_dim=128, dtype=jnp.bfloat16), {}),
  'more tokens than queries': (Shape(num_queries=2, num_tokens=70), {}),
  'window': (Shape(num_queries=5), dict(window=60)),
  'soft cap': (Shape(), dict(soft_cap=5.0)),
  'splits': (
    Shape(num_slots=512, lengths=(0, 129, 300, 512)),
    dict(sizes=TpuBlockSizes(128, 1, num_splits=3)),
  ),
  'splits, window': (
    Shape(num_slots=512, lengths=(0, 129, 300, 512)),
    dict(sizes=TpuBlockSizes(128, 2, num_splits=2), window=60),
  ),
  'pages': (Shape(page_size=32, lengths=(0, 1, 32, 250)), dict(sizes=TpuBlockSizes(128, 2))),
  'pages, window, splits': (
    Shape(page_size=64, lengths=(0, 1, 128, 250)),
    dict(sizes=TpuBlockSizes(128, 2, num_splits=2), window=60),
  ),
  'int8': (Shape(cache_dtype=jnp.int8), {}),
  'float8, pages': (
    Shape(cache_dtype=jnp.float8_e4m3fn, page_size=32), dict(sizes=TpuBlockSizes(64, 2)),
  ),
}  # fmt: skip
_SLOW = [
  (Shape(
    num_queries=num_queries, num_heads=heads, num_kv_heads=kv, head_dim=head_dim, dtype=dtype,
    num_slots=640, lengths=(0, 1, 511, 512, 513, 640),
  ), {})
  for num_queries in (1, 4, 33, 256)
  for heads, kv in ((2, 2), (8, 2), (8, 1))
  for head_dim in (64, 80, 128, 256)
  for dtype in (jnp.float32, jnp.bfloat16)
]  # fmt: skip


def strict():
  """Returns the interpreter that looks for races, stray reads and what was never written."""
  return pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise'
  )


def _check(shape, options):
  inputs = make_problem(shape)
  options = dict(options)
  sizes = options.pop('sizes', None)
  if 'window' in options:
    options |= window_options(shape, options['window'])
  static = {'scale': SCALE, 'soft_cap': options.pop('soft_cap', None)}
  kernel = functools.partial(tpu.block_attention_tpu, sizes=sizes, interpret=strict(), **static)
  out = jax.jit(kernel)(*inputs, **options)
  expected = block_attention(*inputs, implementation='xla', **static, **options)
  assert out.dtype == shape.dtype
  np.testing.assert_allclose(
    np.asarray(out, np.float32),
    np.asarray(expected, np.float32),
    atol=_TOLERANCE[shape.dtype],
    rtol=2e-2 if shape.dtype == jnp.bfloat16 else 1e-5,
  )


@pytest.mark.parametrize('name', _CASES)
def test_the_kernel_equals_the_reference(name):
  _check(*_CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize('shape, options', _SLOW)
def test_the_kernel_equals_the_reference_everywhere(shape, options):
  _check(shape, options)

"""The float32 GPU kernel of block attention, interpreted, against the XLA form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ragged_attention import SCALE
from experiments.ragged_attention import Shape
from experiments.ragged_attention import make_problem
from experiments.ragged_attention import window_options
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention import block_sizes
from pallas_kernels.block_attention import gpu_float32
from pallas_kernels.block_attention.block_sizes import Float32BlockSizes
from tests.pallas_kernels.interpreter import compiled

_CASES = {
  'one token, multi-query': (Shape(num_queries=1, num_kv_heads=1, lengths=(0, 1, 32, 33)), {}),
  'a tree over two tiles, splits': (
    Shape(num_queries=20, num_heads=6, lengths=(0, 31, 129, 256)),
    dict(sizes=Float32BlockSizes(32, 32, 3, 8)),
  ),
  'pages, window, soft cap': (
    Shape(page_size=16, lengths=(0, 1, 16, 250)), dict(window=60, soft_cap=5.0),
  ),
  'int8, pages, window, splits': (
    Shape(num_queries=5, cache_dtype=jnp.int8, page_size=64, lengths=(0, 1, 128, 250)),
    dict(sizes=Float32BlockSizes(16, 64, 2, 4), window=60),
  ),
}  # fmt: skip
_MORE = {
  'one token, ragged': (Shape(num_queries=1, num_slots=640, lengths=(0, 1, 511, 512, 640)), {}),
  'multi-head': (Shape(num_kv_heads=4), {}),
  'head size 80': (Shape(num_queries=5, head_dim=80), {}),
  'head size 256': (Shape(head_dim=256), {}),
  'more tokens than queries': (Shape(num_queries=2, num_tokens=70), {}),
  'a block of 130': (Shape(num_queries=130, lengths=(0, 33)), {}),
  'window': (Shape(num_queries=5), dict(window=60)),
  'soft cap': (Shape(), dict(soft_cap=5.0)),
  'slots not whole tiles': (Shape(num_slots=200, lengths=(0, 199, 200)), {}),
  'float8': (Shape(cache_dtype=jnp.float8_e4m3fn), {}),
  'float8, the other, pages': (Shape(cache_dtype=jnp.float8_e5m2, page_size=32), {}),
}


def _check(shape, options):
  inputs, options = make_problem(shape), dict(options)
  sizes = options.pop('sizes', None)
  static = {'scale': SCALE, 'soft_cap': options.pop('soft_cap', None)}
  if 'window' in options:
    options |= window_options(shape, options['window'])
  kernel = functools.partial(
    gpu_float32.block_attention_float32, sizes=sizes, interpret=True, **static
  )
  out = compiled(kernel)(*inputs, **options)
  static['prefix_block_size'] = math.gcd(128, shape.num_slots)
  expected = compiled(functools.partial(block_attention, implementation='xla', **static))(
    *inputs, **options
  )
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize('name', _CASES)
def test_the_kernel_equals_the_reference(name):
  _check(*_CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', _MORE)
def test_the_kernel_equals_the_reference_with_each_option(name):
  _check(*_MORE[name])


def test_without_a_prefix():
  *inputs, _ = make_problem(Shape(num_queries=5))
  kernel = functools.partial(gpu_float32.block_attention_float32, scale=SCALE, interpret=True)
  expected = compiled(functools.partial(block_attention, scale=SCALE))(*inputs)
  np.testing.assert_allclose(compiled(kernel)(*inputs), expected, atol=3e-6)


@pytest.mark.parametrize(
  'shape, message',
  [
    (Shape(head_dim=264), 'at most 256 elements'),
    (Shape(cache_dtype=jnp.bfloat16), 'like the queries or has 8 bits'),
  ],
)
def test_what_the_kernel_cannot_do_it_says(shape, message):
  run = jax.jit(functools.partial(block_attention, scale=SCALE, implementation='gpu'))
  with pytest.raises(NotImplementedError, match=message):
    run(*make_problem(shape._replace(lengths=(5,))))


def test_sizes_fit_registers_and_fill_the_device():
  sizes = functools.partial(block_sizes.float32_block_sizes, '')
  assert sizes(128, 4, 64, 8192) == Float32BlockSizes(16, 32, 4, 4)
  assert sizes(128, 256, 64, 8192) == Float32BlockSizes(32, 32, 1, 8)
  assert sizes(256, 256, 64, 0) == Float32BlockSizes(16, 32, 1, 4)

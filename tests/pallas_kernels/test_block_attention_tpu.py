"""The TPU kernel of block attention, interpreted with all its checks on, against the XLA form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ragged_attention import SCALE
from experiments.ragged_attention import Shape
from experiments.ragged_attention import make_problem
from experiments.ragged_attention import window_options
from pallas_kernels import default_implementation
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention import block_sizes
from pallas_kernels.block_attention import tpu
from pallas_kernels.block_attention.block_sizes import TpuBlockSizes
from pallas_kernels.masks import pack_mask
from tests.pallas_kernels.interpreter import assert_no_races
from tests.pallas_kernels.interpreter import compiled
from tests.pallas_kernels.interpreter import strict

_TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2e-2}
_CASES = {
  'one token, ragged, more slots than whole blocks': (
    Shape(num_queries=1, num_slots=640, lengths=(0, 1, 511, 512, 640)), {},
  ),
  'a tree, bfloat16, splits, window': (
    Shape(
      num_queries=40, num_heads=6, head_dim=128, dtype=jnp.bfloat16, num_slots=512,
      lengths=(0, 129, 300, 512),
    ),
    dict(sizes=TpuBlockSizes(128, 1, num_splits=3), window=60),
  ),
  'pages, window, soft cap': (
    Shape(page_size=64, lengths=(0, 1, 128, 250)),
    dict(sizes=TpuBlockSizes(128, 2), window=60, soft_cap=5.0),
  ),
  'float8, pages': (
    Shape(cache_dtype=jnp.float8_e4m3fn, page_size=32, lengths=(0, 33, 250)),
    dict(sizes=TpuBlockSizes(64, 2)),
  ),
}  # fmt: skip
_MORE = {
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
  'pages': (Shape(page_size=32, lengths=(0, 1, 32, 250)), dict(sizes=TpuBlockSizes(128, 2))),
  'pages, window, splits': (
    Shape(page_size=64, lengths=(0, 1, 128, 250)),
    dict(sizes=TpuBlockSizes(128, 2, num_splits=2), window=60),
  ),
  'int8': (Shape(cache_dtype=jnp.int8), {}),
  'float8, the other': (Shape(cache_dtype=jnp.float8_e5m2), {}),
}
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


def _check(shape, options):
  inputs = make_problem(shape)
  options = dict(options)
  sizes = options.pop('sizes', None)
  if 'window' in options:
    options |= window_options(shape, options['window'])
  static = {'scale': SCALE, 'soft_cap': options.pop('soft_cap', None)}
  kernel = functools.partial(tpu.block_attention_tpu, sizes=sizes, interpret=strict(), **static)
  out = compiled(kernel)(*inputs, **options)
  expected = compiled(functools.partial(block_attention, implementation='xla', **static))(
    *inputs, **options
  )
  assert_no_races()
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
@pytest.mark.parametrize('name', _MORE)
def test_the_kernel_equals_the_reference_with_each_option(name):
  _check(*_MORE[name])


@pytest.mark.slow
@pytest.mark.parametrize('shape, options', _SLOW)
def test_the_kernel_equals_the_reference_everywhere(shape, options):
  _check(shape, options)


def test_a_packed_mask_says_the_same_and_dispatch_interprets():
  queries, keys, values, mask, prefix = make_problem(Shape(num_queries=35, lengths=(0, 200)))
  run = functools.partial(block_attention, scale=SCALE)
  expected = compiled(run)(queries, keys, values, mask, prefix)
  packed = pack_mask(mask)
  np.testing.assert_array_equal(compiled(run)(queries, keys, values, packed, prefix), expected)
  with default_implementation('interpret'):
    out = compiled(run)(queries, keys, values, packed, prefix)
  np.testing.assert_allclose(out, expected, atol=3e-6)


@pytest.mark.parametrize(
  'shape, message',
  [
    (Shape(num_queries=1100), 'at most 1024 tokens'),
    (Shape(num_queries=700, num_heads=64, num_kv_heads=1), 'rows of queries are too many'),
    (Shape(page_size=16), 'multiple of 32 slots'),
    (Shape(cache_dtype=jnp.bfloat16), 'like the queries or has 8 bits'),
    (Shape(dtype=jnp.float16), 'bfloat16 or float32'),
  ],
)
def test_what_the_kernel_cannot_do_it_says(shape, message):
  inputs = make_problem(shape._replace(lengths=(5,)))
  run = jax.jit(functools.partial(block_attention, scale=SCALE, implementation='tpu'))
  with pytest.raises(NotImplementedError, match=message):
    run(*inputs)


def test_block_sizes_fit_and_use_what_the_table_says(monkeypatch):
  problem = block_sizes.Problem(
    num_rows=256, num_tokens=64, num_kv_heads=8, head_dim=128, itemsize=2, cache_itemsize=2,
    num_slots=8192,
  )  # fmt: skip
  safe = block_sizes.tpu_block_sizes('unheard of', problem)
  assert safe == TpuBlockSizes(512, 8, 1)
  monkeypatch.setitem(block_sizes.TPU_TABLE, 'some TPU', (256, 2))
  assert block_sizes.tpu_block_sizes('some TPU', problem) == TpuBlockSizes(256, 8, 2)
  assert block_sizes.tpu_block_sizes('TPU v5', problem) == TpuBlockSizes(512, 4, 1)
  single = block_sizes.tpu_block_sizes('TPU v5', problem._replace(num_kv_heads=1))
  assert single is not None and single.num_splits == 2
  many = block_sizes.tpu_block_sizes('', problem._replace(num_rows=2048))
  assert many is not None and many.heads < 8
  paged = block_sizes.tpu_block_sizes('', problem._replace(page_size=48 * 2, num_slots=960))
  assert paged is not None and (paged.block_kv % 128 == 0 or paged.block_kv == 96)

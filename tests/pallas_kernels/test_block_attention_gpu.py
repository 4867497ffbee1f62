"""The Hopper kernel of block attention, interpreted with its threads, barriers and races.

The interpreter of Mosaic GPU knows transposed references from jax 0.11 on: with an older one these
tests are skipped, and the kernel is lowered (test_lowering.py) and compiled (make aot).
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ragged_attention import SCALE
from experiments.ragged_attention import Shape
from experiments.ragged_attention import make_problem
from experiments.ragged_attention import window_options
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention import block_sizes
from pallas_kernels.block_attention import gpu
from pallas_kernels.block_attention.block_sizes import GpuBlockSizes
from tests.pallas_kernels.interpreter import compiled

needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason='the interpreter of jax < 0.11 lacks what the kernel uses'
)
_HALF = functools.partial(Shape, dtype=jnp.bfloat16)
_CASES = {
  'one token': (_HALF(num_queries=1, head_dim=128, lengths=(0, 1, 128, 200)), {}),
  'a tree over two warpgroups': (_HALF(num_queries=40, lengths=(0, 129, 256)), {}),
  'splits': (
    _HALF(num_queries=5, num_slots=512, lengths=(0, 130, 512)), dict(sizes=GpuBlockSizes(64, 2, 3)),
  ),
  'pages': (
    _HALF(num_queries=5, page_size=64, lengths=(0, 130, 250)), dict(sizes=GpuBlockSizes(64, 2, 2)),
  ),
  'window': (
    _HALF(num_queries=5, lengths=(0, 130, 250)), dict(sizes=GpuBlockSizes(64, 2, 2), window=60),
  ),
  'head size 80, soft cap': (
    _HALF(num_queries=5, head_dim=80, lengths=(0, 130, 250)), dict(soft_cap=5.0),
  ),
  'head size 256': (_HALF(num_queries=3, head_dim=256, lengths=(0, 130)), {}),
  'int8, one token': (
    _HALF(num_queries=1, head_dim=128, cache_dtype=jnp.int8, lengths=(0, 1, 63, 64, 65, 256)), {},
  ),
  'int8, a tree over two warpgroups': (
    _HALF(num_queries=40, cache_dtype=jnp.int8, lengths=(0, 129, 256)), {},
  ),
  'int8, pages, splits, window': (
    _HALF(num_queries=5, page_size=64, cache_dtype=jnp.int8, lengths=(0, 130, 250)),
    dict(sizes=GpuBlockSizes(64, 2, 2, 1), window=60),
  ),
  'int8, multi-query, soft cap': (
    _HALF(num_queries=5, num_kv_heads=1, cache_dtype=jnp.int8, lengths=(0, 130)),
    dict(soft_cap=5.0),
  ),
  'float8, tiles of 128, head size 80': (
    _HALF(num_queries=5, head_dim=80, cache_dtype=jnp.float8_e4m3fn, lengths=(0, 1, 130, 256)),
    dict(sizes=GpuBlockSizes(128, 2, 1, 2)),
  ),
  'float8, pages, splits': (
    _HALF(
      num_queries=5, num_slots=512, page_size=128, cache_dtype=jnp.float8_e4m3fn,
      lengths=(0, 1, 130, 512),
    ),
    dict(sizes=GpuBlockSizes(64, 2, 3, 3)),
  ),
  'float8, a tree over two warpgroups, window': (
    _HALF(num_queries=40, cache_dtype=jnp.float8_e4m3fn, lengths=(0, 129)), dict(window=60),
  ),
  'float8, head size 256': (
    _HALF(num_queries=3, head_dim=256, cache_dtype=jnp.float8_e5m2, lengths=(0, 130)), {},
  ),
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize('name', _CASES)
def test_the_kernel_equals_the_reference(name):
  shape, options = _CASES[name]
  options = dict(options)
  inputs, sizes = make_problem(shape), options.pop('sizes', None)
  static = {'scale': SCALE, 'soft_cap': options.pop('soft_cap', None)}
  if 'window' in options:
    options |= window_options(shape, options['window'])
  interpret = plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore
  kernel = functools.partial(gpu.block_attention_gpu, sizes=sizes, interpret=interpret, **static)
  out = jax.jit(kernel)(*inputs, **options)
  expected = compiled(functools.partial(block_attention, **static))(*inputs, **options)
  np.testing.assert_allclose(
    np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.02, rtol=0.02
  )
  _assert_no_races()


def _assert_no_races():
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize(
  'shape, message',
  [
    (_HALF(head_dim=72), 'multiple of 16 elements'),
    (_HALF(cache_dtype=jnp.float16), 'like the queries or'),
    (Shape(dtype=jnp.float16, cache_dtype=jnp.int8), 'of bfloat16 queries, has 8 bits'),
    (_HALF(page_size=32), 'a page must hold a multiple of 64 slots'),
  ],
)
def test_what_the_kernel_cannot_do_it_says(shape, message):
  run = jax.jit(functools.partial(block_attention, scale=SCALE, implementation='gpu'))
  with pytest.raises(NotImplementedError, match=message):
    run(*make_problem(shape))


def test_queries_and_block_must_be_alike():
  queries, keys, *_ = make_problem(_HALF(lengths=(5,)))
  assert gpu.why_not(queries, keys, None) is None
  assert 'bfloat16 or float16' in str(gpu.why_not(queries, keys.astype(jnp.float32), None))


def test_splits_fill_the_device_and_tiles_its_memory(monkeypatch):
  few = block_sizes.gpu_block_sizes('', 128, 8, 32768, None)
  assert few == GpuBlockSizes(128, 2, 15)
  assert block_sizes.gpu_block_sizes('', 128, 1000, 32768, None).num_splits == 1
  assert block_sizes.gpu_block_sizes('', 128, 8, 1024, 64) == GpuBlockSizes(64, 4, 2)
  assert block_sizes.gpu_block_sizes('', 256, 8, 0, None).num_splits == 1
  narrow = functools.partial(block_sizes.gpu_block_sizes, '', narrow=True)
  assert narrow(128, 8, 32768, None) == GpuBlockSizes(64, 2, 15, 4)
  assert narrow(256, 8, 1024, 64) == GpuBlockSizes(64, 1, 2, 2)
  monkeypatch.setitem(block_sizes.GPU_TABLE, 'some GPU', 2)
  assert block_sizes.gpu_block_sizes('some GPU', 128, 8, 32768, None).num_splits == 29

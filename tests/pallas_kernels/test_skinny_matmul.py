"""The CPU kernel agrees with XLA, row by row to the bit, and says why it cannot run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skinny_matmul import cpu
from pallas_kernels.skinny_matmul import skinny_matmul

needs_kernel = pytest.mark.skipif(cpu.prepare() is not None, reason=str(cpu.prepare()))


@functools.cache
def _problem(rows, size, width, num=3):
  rng = np.random.default_rng((rows, size, width))
  x = jnp.asarray(rng.normal(size=(rows, size)), jnp.float32)
  matrices = [jnp.asarray(rng.normal(size=(size, width)), jnp.float32) for _ in range(num)]
  return x, matrices


@needs_kernel
@pytest.mark.parametrize('rows', [1, 2, 3, 4, 5, 6, 7, 8, 9, cpu.MAX_ROWS])
@pytest.mark.parametrize('size, width', [(64, 256), (1, 1), (7, 15), (37, 3001), (130, 33)])
def test_agrees_with_the_reference(rows, size, width):
  x, matrices = _problem(rows, size, width)
  run = jax.jit(skinny_matmul, static_argnames='implementation')
  for layer in range(3):
    ours = run(x, matrices, layer, implementation='cpu')
    wanted = np.asarray(x, np.float64) @ np.asarray(matrices[layer], np.float64)
    np.testing.assert_allclose(ours, wanted, atol=2e-6 * size, rtol=1e-5)


@needs_kernel
def test_a_row_gives_the_same_bits_alone_and_in_a_block():
  x, matrices = _problem(cpu.MAX_ROWS, 576, 1000)
  run = jax.jit(functools.partial(skinny_matmul, implementation='cpu'))
  block = run(x, matrices, 1)
  for rows in range(1, cpu.MAX_ROWS + 1):
    for first in range(cpu.MAX_ROWS + 1 - rows):
      np.testing.assert_array_equal(
        run(x[first : first + rows], matrices, 1), block[first : first + rows]
      )


@needs_kernel
def test_reads_its_own_matrix_and_row_only():
  x, matrices = _problem(4, 33, 70)
  wanted = skinny_matmul(x, matrices, 1, implementation='cpu')
  nan = jnp.full_like(matrices[0], jnp.nan)
  found = skinny_matmul(x.at[2].set(jnp.nan), [nan, matrices[1], nan], 1, implementation='cpu')
  np.testing.assert_array_equal(found[jnp.array([0, 1, 3])], wanted[jnp.array([0, 1, 3])])
  assert np.isnan(found[2]).all()


@needs_kernel
def test_has_the_gradient_of_the_reference():
  x, matrices = _problem(3, 20, 24)

  def value(implementation, x, matrices):
    return jnp.sin(skinny_matmul(x, matrices, 2, implementation=implementation)).sum()

  ours = jax.grad(functools.partial(value, 'cpu'), (0, 1))(x, matrices)
  wanted = jax.grad(functools.partial(value, 'xla'), (0, 1))(x, matrices)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@needs_kernel
def test_is_what_none_means_on_a_cpu():
  x, matrices = _problem(5, 64, 128)
  assert 'custom_call' in jax.jit(skinny_matmul).lower(x, matrices, 0).as_text()
  with jax.ensure_compile_time_eval():
    wide = jnp.concatenate([x] * 3)
  assert 'custom_call' not in jax.jit(skinny_matmul).lower(wide, matrices, 0).as_text()


@pytest.mark.parametrize(
  'x, matrices, message',
  [
    (jnp.ones((2, 3, 4)), [jnp.ones((4, 5))], r'takes x\[M, K\]'),
    (jnp.ones((2, 4)), [jnp.ones((4, 5)), jnp.ones((4, 6))], 'of one shape'),
    (jnp.ones((2, 3)), [jnp.ones((4, 5))], 'x has 3 columns, the matrices have 4 rows'),
  ],
)
def test_shapes_are_checked(x, matrices, message):
  with pytest.raises(ValueError, match=message):
    skinny_matmul(x, matrices)


@pytest.mark.parametrize(
  'rows, dtype, message',
  [(2, jnp.bfloat16, 'float32 only'), (cpu.MAX_ROWS + 1, jnp.float32, 'rows only: 13 were given')],
)
def test_what_the_kernel_cannot_do_it_says(rows, dtype, message):
  x, matrices = jnp.ones((rows, 8), dtype), [jnp.ones((8, 8), dtype)]
  with pytest.raises(NotImplementedError, match=message):
    skinny_matmul(x, matrices, implementation='cpu')
  np.testing.assert_array_equal(skinny_matmul(x, matrices), jnp.full((rows, 8), 8, dtype))


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
  monkeypatch.setenv('DECODAX_CACHE', str(tmp_path))
  monkeypatch.setenv('CXX', 'no-such-compiler')
  assert 'there is no C++ compiler' in str(cpu.prepare.__wrapped__())


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
  monkeypatch.setenv('DECODAX_CACHE', str(tmp_path))
  monkeypatch.setenv('CXX', 'false')
  assert 'could not compile the kernel' in str(cpu.prepare.__wrapped__())
  assert not list(tmp_path.rglob('*.so'))


@needs_kernel
def test_a_damaged_library_is_made_anew(monkeypatch, tmp_path):
  monkeypatch.setenv('DECODAX_CACHE', str(tmp_path))
  (tmp_path / 'kernels').mkdir()
  path = tmp_path / 'kernels' / f'skinny_matmul-{cpu._fingerprint()}.so'
  path.write_bytes(b'not a library')
  assert hasattr(cpu._library(), cpu._SYMBOL)

"""The factor of k-SEQ: found on device, at any number of drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import theory
from decodax.verifiers.kseq import factor


def _laws(rng, rows, vocab_size, spread):
  base = 3 * rng.standard_normal((rows, vocab_size))
  p, q = (base + spread * rng.standard_normal((rows, vocab_size)) for _ in range(2))
  return jax.nn.softmax(jnp.asarray(p)), jax.nn.softmax(jnp.asarray(q))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('num_drafts', [1, 2, 3, 8, 64])
def test_the_factor_is_that_of_theory(num_drafts):
  rng = np.random.default_rng(num_drafts)
  for spread in (0.01, 0.5, 2.0):
    p, q = _laws(rng, 8, 50, spread)
    rho, beta = jax.jit(factor)(p, q, jnp.full((8,), num_drafts))
    if num_drafts <= 3:  # with many drafts the equation holds for a range of factors, to rounding
      np.testing.assert_allclose(rho, theory.kseq_factor(p, q, num_drafts), rtol=1e-9)
    accepted = 1 - (1 - beta) ** num_drafts
    np.testing.assert_allclose(accepted, theory.kseq_acceptance(p, q, num_drafts), atol=1e-10)


@pytest.mark.usefixtures('float64')
def test_awkward_laws():
  p = jnp.asarray([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5], [0, 1, 0], [0.1, 0.2, 0.7]])
  q = jnp.asarray([[1.0, 0, 0], [0, 0, 1.0], [0.2, 0.3, 0.5], [0.9, 0.1, 0], [0, 0, 0]])
  rho, beta = factor(p, q, jnp.full((5,), 4))
  assert np.all((rho >= 1) & (rho <= 4) & (beta >= 0) & (beta <= 1))
  np.testing.assert_allclose(beta[jnp.asarray([0, 1, 2, 4])], [1, 0, 1, 0], atol=1e-12)


def test_single_precision_is_enough_for_a_large_vocabulary():
  p, q = _laws(np.random.default_rng(0), 4, 100_000, 1.0)
  assert p.dtype == jnp.float32
  k = jnp.asarray([1, 2, 4, 8])
  rho, beta = jax.jit(factor)(p, q, k)
  gap = 1 - (1 - beta) ** k.astype(jnp.float32) - rho * beta
  np.testing.assert_allclose(gap, 0, atol=1e-5)

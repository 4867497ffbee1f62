"""Fixtures for the verification rules."""

import jax
import pytest


@pytest.fixture
def float64():
  """Enumeration is exact to 1e-12 only in double precision."""
  with jax.enable_x64(True):
    yield

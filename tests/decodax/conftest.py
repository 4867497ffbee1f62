"""Fixtures of the loop's tests. What is compiled is shared: compiling is most of their time."""

import pytest

from tests.decodax.zoo import Zoo


@pytest.fixture(scope='session')
def zoo():
  """Returns a small model, the drafters by name, and what has been compiled of them."""
  return Zoo()

"""Decoding with interpreted kernels gives what decoding without them gives, token for token."""

import functools

import jax
import numpy as np
import pytest

import decodax
from decodax import verifiers
from decodax.types import Params
from pallas_kernels import default_implementation
from tests.decodax import zoo as zoo_lib

_ROWS = (1, 3, 6)  # of the ragged batch: another prompt, other stop ids, other sampling each

# Of one width, unlike the zoo's: a kernel is traced for each.
_TREE = zoo_lib.random_tree(num_nodes=6, max_depth=3)


def _decode(zoo, drafter, verifier, implementation):
  request = zoo_lib.take_rows(zoo_lib.make_request(), _ROWS)
  rng = np.random.default_rng(0)
  text = rng.integers(0, zoo_lib.VOCAB_SIZE, (len(_ROWS), zoo_lib.CAPACITY))
  params = Params(zoo.params, zoo_lib.make_script(text))
  run = functools.partial(
    decodax.decode,
    model=zoo.model,
    drafter=_TREE if drafter == 'tree' else zoo.drafters[drafter],
    verifier=verifiers.BY_NAME[verifier],
    prefill_chunk=16,
  )
  with default_implementation(implementation):
    compiled = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})
    return jax.device_get(compiled(params, request))


@pytest.mark.parametrize(
  'drafter, verifier',
  [('tree', 'coupled'), pytest.param('early_exit', 'speculative', marks=pytest.mark.slow)],
)
def test_kernels_do_not_change_what_is_decoded(zoo, drafter, verifier):
  """Attention, commit and thresholds are kernels here; the batch is ragged, greedy and sampled."""
  with_kernels = _decode(zoo, drafter, verifier, 'interpret')
  without = _decode(zoo, drafter, verifier, 'xla')
  zoo_lib.assert_same_output(with_kernels, without)
  for name in without.stats._fields:
    np.testing.assert_array_equal(getattr(with_kernels.stats, name), getattr(without.stats, name))

"""The price of writing together: closed forms against enumeration and against the loop itself."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import diffusion
from decodax.diffusion import limits
from decodax.diffusion import policies
from decodax.types import Model
from decodax.types import ModelOutput

LENGTHS = (1, 2, 3, 4, 5)


def permutations(length):
  return list(itertools.permutations(range(length)))


def replacements(length):
  return [tuple('x' if i == at else i for i in range(length)) for at in range(length)]


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('size', [1, 2, 3, 5])
def test_closed_forms_are_the_enumeration(length, size):
  groups = limits.left_to_right(length, size)
  found = limits.accuracy_of_groups(permutations(length), groups)
  assert found == pytest.approx(limits.shuffle_accuracy(length, size))
  found = limits.accuracy_of_groups(replacements(length), groups)
  assert found == pytest.approx(limits.replace_accuracy(length, size))
  if size == 1:
    assert found == pytest.approx(1)


def test_one_step_has_the_known_chances():
  assert limits.shuffle_accuracy(6, 6) == pytest.approx(math.factorial(6) / 6**6)
  assert limits.replace_accuracy(6, 6) == pytest.approx((5 / 6) ** 5)
  assert limits.accuracy_of_groups([(1, 2, 3)], [range(3)]) == 1


def test_total_correlation_is_what_is_lost():
  assert limits.total_correlation([(1, 2), (3, 4)]) == pytest.approx(math.log(2))
  assert limits.total_correlation([(1, 2, 3)]) == 0
  grid = list(itertools.product(range(3), range(2)))
  assert limits.total_correlation(grid) == pytest.approx(0, abs=1e-12)
  assert limits.total_correlation(permutations(4)) == pytest.approx(4 * math.log(4) - math.log(24))


def worlds_model(worlds: np.ndarray, mask_id: int) -> Model:
  """Returns a network that knows every law exactly: `worlds` i64[N, W] are equally likely.

  The canvas starts at position 1.
  """
  table = jnp.asarray(worlds)

  def init_cache(params, batch_size, capacity):
    del params, capacity
    return jnp.zeros((batch_size,), jnp.int32)

  def extend(params, cache, tokens, positions, mask, *, scratch=None, offset=0):
    del params, cache, positions, mask, scratch, offset
    canvas = tokens[:, 1:]
    agrees = (canvas[:, None] == table[None]) | (canvas == mask_id)[:, None]
    possible = agrees.all(-1)  # bool[B, N]
    one_hot = jax.nn.one_hot(table, mask_id + 1)
    law = jnp.einsum('bn,nwv->bwv', possible.astype(jnp.float32), one_hot)
    law = jnp.pad(law, ((0, 0), (1, 0), (0, 0)))
    return ModelOutput(law), tokens

  def unembed(params, hidden):
    del params
    return jnp.log(hidden)

  return Model(init_cache, extend, lambda cache, *_: cache, unembed, mask_id + 1)


@pytest.mark.parametrize('size', [1, 2, 4])
def test_a_network_that_knows_all_laws_reaches_the_limit_in_the_loop(size):
  # 3000 answers of 4 slots, `size` at a time from left to right; within five standard errors.
  length, rows = 4, 3000
  worlds = np.array(permutations(length))
  net = diffusion.MaskedModel(worlds_model(worlds, length), length)
  request = decodax.make_request(
    np.zeros((rows, 1), int), max_new_tokens=length, vocab_size=length + 1, temperature=1.0,
    capacity=1 + length,
  )  # fmt: skip
  policy = policies.llada(length // size, 'left_to_right')
  run = jax.jit(
    lambda p, r: diffusion.denoise(
      p, r, net=net, policy=policy, blocks=diffusion.fixed_blocks(length)
    ),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  result = jax.device_get(run(diffusion.Params(()), request))
  # A step that wrote what no world has leaves a canvas that the network knows nothing about.
  canvas = np.sort(result.tokens[:, 1:], axis=1)
  ended = result.result == decodax.Result.LENGTH
  right = np.mean(ended & (canvas == np.arange(length)).all(1))
  wanted = limits.shuffle_accuracy(length, size)
  assert abs(right - wanted) < 5 * math.sqrt(max(wanted * (1 - wanted), 1e-9) / rows) + 1e-9
  np.testing.assert_array_equal(result.stats.num_calls[ended], length // size)

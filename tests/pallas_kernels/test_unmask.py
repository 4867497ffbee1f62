"""Unmask against NumPy in float64: the XLA form and the kernels, with and without the head.

Axes: `B` batch, `T` positions, `D` hidden size, `V` vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.unmask import Certainty
from pallas_kernels.unmask import gpu
from pallas_kernels.unmask import tpu
from pallas_kernels.unmask import unmask
from pallas_kernels.unmask.online import State
from pallas_kernels.unmask.online import merge
from pallas_kernels.unmask.online import update
from tests.pallas_kernels.interpreter import assert_no_races
from tests.pallas_kernels.interpreter import compiled
from tests.pallas_kernels.interpreter import strict

_B, _T, _D, _V = 2, 5, 64, 1500


def _logits(seed=0):
  """Returns f32[B, T, V] with -inf here and there, a tie, and one position that is certain."""
  rng = np.random.default_rng(seed)
  logits = (rng.standard_normal((_B, _T, _V)) * 3).astype(np.float32)
  logits[rng.random(logits.shape) < 0.1] = -np.inf
  logits[0, 0, 700] = logits[0, 0, 90] = 20.0
  logits[1, 2] = -np.inf
  logits[1, 2, 1499] = 3.0
  return jnp.asarray(logits)


def _exact(logits):
  logits = np.asarray(logits, np.float64)
  top = np.sort(logits, -1)[..., ::-1]
  log_normalizer = np.log(np.exp(logits - top[..., :1]).sum(-1)) + top[..., 0]
  law = np.exp(logits - log_normalizer[..., None])
  surprise = np.where(law > 0, -law * np.log(np.where(law > 0, law, 1)), 0)
  first, second = (np.exp(top[..., k] - log_normalizer) for k in range(2))
  margin, entropy = first - second, surprise.sum(-1)
  return Certainty(logits.argmax(-1), first, second, margin, entropy, log_normalizer)


def _assert_close(found, expected, tolerance=1e-5):
  assert found.token.dtype == jnp.int32
  for name, ours, exact in zip(Certainty._fields, found, expected, strict=True):
    np.testing.assert_allclose(ours, exact, rtol=tolerance, atol=tolerance, err_msg=name)


_KERNELS = {
  'xla': functools.partial(unmask, implementation='xla'),
  'tpu': functools.partial(tpu.unmask_tpu, interpret=strict()),
  'gpu': functools.partial(gpu.unmask_gpu, interpret=True),
}


@pytest.mark.parametrize('name', _KERNELS)
def test_certainty_of_logits(name):
  logits = _logits()
  _assert_close(compiled(_KERNELS[name])(logits), _exact(logits))
  if name == 'tpu':
    assert_no_races()


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('name', _KERNELS)
def test_certainty_of_hidden_states_under_a_head(name, transposed):
  rng = np.random.default_rng(1)
  hidden = jnp.asarray(rng.standard_normal((_B, _T, _D)), jnp.float32)
  head = jnp.asarray(rng.standard_normal((_D, _V)) / 3, jnp.float32)
  run = functools.partial(_KERNELS[name], transposed=transposed)
  found = compiled(run)(hidden, head.T if transposed else head)
  _assert_close(found, _exact(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)), 1e-4)


def test_bfloat16_logits_are_summed_in_float32():
  logits = _logits().astype(jnp.bfloat16)
  found = compiled(functools.partial(unmask, implementation='interpret'))(logits)
  _assert_close(found, _exact(logits.astype(jnp.float32)))


def test_parts_of_a_vocabulary_merge_to_the_whole():
  logits = _logits().reshape(-1, _V)
  ids = jnp.broadcast_to(jnp.arange(_V), logits.shape)

  def part(start, stop):
    return update(State.empty((_B * _T, 1)), logits[:, start:stop], ids[:, start:stop])

  parts = [part(*ends) for ends in ((0, 89), (89, 600), (600, 701), (701, _V))]
  stacked = jax.tree.map(lambda *a: jnp.stack(a)[..., 0], *parts)
  for name, ours, whole in zip(State._fields, merge(stacked), part(0, _V), strict=True):
    np.testing.assert_allclose(ours, whole[:, 0], rtol=1e-5, atol=1e-5, err_msg=name)


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match=r'f\[B, T, V\] or f\[B, T, D\]'):
    unmask(jnp.zeros((3, 4)))
  with pytest.raises(ValueError, match=r'head must be f\[D, V\]'):
    unmask(jnp.zeros((1, 3, 4)), jnp.zeros((5, 4)))
  with pytest.raises(NotImplementedError, match='bfloat16 and float32'):
    unmask(jnp.zeros((1, 3, 4), jnp.float16), implementation='tpu')

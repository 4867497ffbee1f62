"""Sampling rules: parity with transformers, and a sort in NumPy as the reference.

Axes: `B` rows, `N` nodes, `V` vocabulary, `C` golden cases.
"""

import contextlib
import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import sampling as sampling_lib
from decodax.types import Sampling
from tests.decodax import make_sampling_golden as golden

_V, _B, _N = 7, 3, 2
_NAMES = ('temperature', 'top_k', 'top_p', 'min_p')


@functools.cache
def _warp():
  return jax.jit(sampling_lib.warp)


def _sampling(rows):
  """Returns the `Sampling` of a list of values by name, one per row."""
  columns = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
  dtypes = {name: np.int32 if name == 'top_k' else np.float32 for name in columns}
  return Sampling(**{name: jnp.asarray(a, dtypes[name]) for name, a in columns.items()})


def _assert_same_law(actual, expected, rtol=1e-5):
  """Asserts equal support, and equal logits on it."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
  np.testing.assert_allclose(actual, expected, rtol=rtol)


# --- Parity with transformers --------------------------------------------------------------------


def _warp_golden_cases(logits, tokens):
  sampling = _sampling(golden.cases())
  seen = jnp.zeros(logits.shape, bool)
  seen = sampling_lib.mark_seen(seen, jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool))
  penalised = sampling_lib.penalize(jnp.asarray(logits), seen, sampling.repetition_penalty)
  return _warp()(penalised, sampling)


def test_laws_are_those_of_transformers():
  stored = np.load(golden.GOLDEN)
  logits, tokens = golden.inputs()
  np.testing.assert_array_equal(stored['logits'], logits)
  np.testing.assert_array_equal(stored['tokens'], tokens)
  _assert_same_law(_warp_golden_cases(logits, tokens), stored['warped'])
  # Every rule leaves something to compare, and alone takes something away.
  kept = np.isfinite(stored['warped']).sum(-1)
  assert kept.min() >= 1
  for name in ('top_k', 'top_p', 'min_p'):
    alone = [{**golden.OFF, name: value} for value in golden.VALUES[name]]
    assert any(kept[golden.cases().index(case)] < golden.VOCAB_SIZE - 3 for case in alone), name


@pytest.mark.interop
def test_golden_file_is_what_transformers_gives_now():
  pytest.importorskip('transformers')
  warped = golden.warp_with_transformers()
  _assert_same_law(np.load(golden.GOLDEN)['warped'], warped, rtol=1e-6)
  _assert_same_law(_warp_golden_cases(*golden.inputs()), warped)


# --- Against a sort ------------------------------------------------------------------------------


def _reference(logits, *, temperature, top_k, top_p, min_p):
  """Returns (warped f64[V], is a rounding error enough to change what is kept?)."""
  if temperature == 0:
    return np.where(np.arange(len(logits)) == np.argmax(logits), 0, -np.inf), False
  warped, close = logits / temperature, False
  if top_k > 0:
    warped = np.where(warped >= np.sort(warped)[::-1][min(top_k, len(warped)) - 1], warped, -np.inf)
  if top_p < 1:
    law = _softmax(warped)
    levels = np.unique(law)[::-1]  # tokens that tie are kept together
    mass = np.asarray([law[law >= level].sum() for level in levels])
    enough = np.flatnonzero(mass >= top_p)
    floor = levels[enough[0]] if len(enough) else 0
    close |= bool(np.any(np.abs(mass - top_p) < 1e-5))
    warped = np.where(law >= floor, warped, -np.inf)
  if min_p > 0:
    ratio = np.exp(warped - warped.max())
    close |= bool(np.any(np.abs(ratio - min_p) < 1e-5))
    warped = np.where(ratio >= min_p, warped, -np.inf)
  return warped, close


def _softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


# Few values, so that ties are common.
_LOGITS = st.lists(
  st.sampled_from([-np.inf, -30.0, -2.5, -0.5, -0.0, 0.0, 0.5, 1.0, 1.25, 3.0, 80.0]),
  min_size=_V,
  max_size=_V,
).filter(lambda row: max(row) > -np.inf)
_VALUES = st.fixed_dictionaries(
  dict(
    temperature=st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, _V, _V + 100]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.35, 0.6, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.3, 1.0]),
  )
)
_ROWS = st.lists(_VALUES, min_size=_B, max_size=_B)
_MANY = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@_MANY
@hypothesis.given(logits=st.lists(_LOGITS, min_size=_B, max_size=_B), rows=_ROWS)
def test_warp_equals_a_sort(dtype, logits, rows):
  with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
    warped = np.asarray(_warp()(jnp.asarray(logits, dtype), _sampling(rows)))
  assert warped.dtype == dtype
  for row in range(_B):
    values = {name: float(np.float32(rows[row][name])) for name in _NAMES[2:]}
    values |= {name: rows[row][name] for name in _NAMES[:2]}
    expected, close = _reference(np.asarray(logits[row], np.float64), **values)
    if close:  # a sum falls on the threshold: either side is right
      continue
    _assert_same_law(warped[row], expected, rtol=1e-6)


@_MANY
@hypothesis.given(
  logits=st.lists(st.lists(_LOGITS, min_size=_N, max_size=_N), min_size=_B, max_size=_B),
  rows=_ROWS,
)
def test_nodes_are_warped_one_by_one(logits, rows):
  logits, sampling = jnp.asarray(logits, jnp.float32), _sampling(rows)
  together = _warp()(logits, sampling)
  for node in range(_N):
    np.testing.assert_array_equal(together[:, node], _warp()(logits[:, node], sampling))


@_MANY
@hypothesis.given(logits=st.lists(_LOGITS, min_size=_B, max_size=_B), rows=_ROWS)
def test_something_is_always_left_and_the_best_is_in_it(logits, rows):
  warped = np.asarray(_warp()(jnp.asarray(logits, jnp.float32), _sampling(rows)))
  best = np.argmax(logits, axis=-1)
  assert np.all(np.isfinite(warped[np.arange(_B), best]))
  np.testing.assert_array_equal(np.argmax(warped, axis=-1), best)
  assert np.all(warped[np.isneginf(np.asarray(logits))] == -np.inf)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_warp_on_a_large_vocabulary(dtype):
  """As real logits are: no ties, a long tail; and values that leave many tokens."""
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal((6, 5000))
  rows = [
    dict(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in (
      (1.0, 0, 0.9, 0.0), (0.7, 0, 0.95, 0.001), (1.0, 1000, 1.0, 0.0), (1.3, 40, 0.5, 0.0),
      (1.0, 0, 1.0, 1e-3), (0.0, 5, 0.5, 0.5),
    )
  ]  # fmt: skip
  with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
    warped = np.asarray(_warp()(jnp.asarray(logits, dtype), _sampling(rows)))
  for row, values in enumerate(rows):
    values = {**values, 'top_p': np.float32(values['top_p']), 'min_p': np.float32(values['min_p'])}
    temperature = np.float32(values.pop('temperature')).astype(np.float64)
    expected, _ = _reference(logits[row].astype(dtype), temperature=temperature, **values)
    kept = np.isfinite(warped[row])
    # In float32 the last token kept by top-p may differ by one.
    assert np.sum(kept != np.isfinite(expected)) <= (dtype == np.float32)
    both = kept & np.isfinite(expected)
    np.testing.assert_allclose(warped[row][both], expected[both], rtol=1e-5)


# --- Single rules --------------------------------------------------------------------------------


def test_temperature_0_takes_the_first_of_equal_tokens():
  logits = jnp.asarray([[1.0, 5.0, 5.0, 2.0], [-jnp.inf, -jnp.inf, -7.0, -7.0], [0.0, 0, 0, 0]])
  warped = sampling_lib.warp(logits, Sampling(jnp.zeros((3,))))
  np.testing.assert_array_equal(jax.nn.softmax(warped), np.eye(4)[[1, 2, 0]])


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('start', [1.0, -3.0, 1e-30, 1e30])
def test_neighbouring_floats_are_told_apart(dtype, start):
  row = [np.asarray(start, dtype)]
  while len(row) < 40:
    row.append(np.nextafter(row[-1], np.asarray(np.inf, dtype)))
  logits = np.tile(np.random.default_rng(0).permutation(row), (40, 1))
  top_k = np.arange(1, 41, dtype=np.int32)
  with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
    sampling = Sampling(jnp.ones((40,)), jnp.asarray(top_k))
    kept = np.isfinite(_warp()(jnp.asarray(logits), sampling))
  np.testing.assert_array_equal(kept, logits >= np.sort(row)[::-1][:, None])


def test_rules_that_are_none_and_rules_that_are_off_agree():
  logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9)), jnp.float32)
  temperature = jnp.asarray([1.0, 0.5])
  off = Sampling(temperature, jnp.zeros((2,), jnp.int32), jnp.ones((2,)), jnp.zeros((2,)))
  expected = logits / temperature[:, None]
  np.testing.assert_array_equal(sampling_lib.warp(logits, off), expected)
  np.testing.assert_array_equal(sampling_lib.warp(logits, Sampling(temperature)), expected)


def test_the_smallest_temperature_is_nearly_greedy():
  # make_request admits 1e-6: logits must not overflow.
  logits = jnp.asarray([[-300.0, 500.0, 499.0, 1.0]])
  warped = sampling_lib.warp(logits, Sampling(jnp.asarray([1e-6])))
  np.testing.assert_array_equal(jax.nn.softmax(warped), [[0.0, 1.0, 0.0, 0.0]])


def test_penalty_divides_positive_and_multiplies_negative_logits():
  logits = jnp.asarray([[2.0, -2.0, 3.0, -3.0], [2.0, -2.0, 3.0, -3.0]])
  seen = jnp.asarray([[True, True, False, False]] * 2)
  penalised = sampling_lib.penalize(logits, seen, jnp.asarray([2.0, 1.0]))
  np.testing.assert_array_equal(penalised, [[1.0, -4.0, 3.0, -3.0], [2.0, -2.0, 3.0, -3.0]])
  nodes = sampling_lib.penalize(logits[:, None], seen[:, None], jnp.asarray([2.0, 1.0]))
  np.testing.assert_array_equal(nodes[:, 0], penalised)
  assert sampling_lib.penalize(logits, seen, None) is logits


def test_seen_tokens_are_added_and_dead_ones_are_not():
  seen = jnp.zeros((2, 5), bool).at[1, 0].set(True)
  tokens = jnp.asarray([[1, 3, 4], [2, 2, 4]])
  valid = jnp.asarray([[True, True, False], [True, True, False]])
  marked = sampling_lib.mark_seen(seen, tokens, valid)
  np.testing.assert_array_equal(marked, [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]])


def test_only_live_rows_count_as_sampled():
  sampling = Sampling(jnp.asarray([0.0, 1.0]))
  assert sampling_lib.any_sampled(sampling, jnp.asarray([False, True]))
  assert not sampling_lib.any_sampled(sampling, jnp.asarray([True, False]))


@pytest.mark.parametrize('size', [5, 3000, 4096, 4097])
@pytest.mark.parametrize('k', [1, 4])
def test_top_k_is_that_of_jax(size, k):
  """Also where values tie, in one block or in several, and where few are finite."""
  rng = np.random.default_rng(size + k)
  values = rng.integers(0, 4, (6, 2, size)).astype(np.float32)
  values[0] = rng.normal(size=(2, size))
  values[1] = -np.inf
  values[2] = np.where(rng.random((2, size)) < 2 / size, values[2], -np.inf)
  values[3, :, [0, -1]] = 9
  expected = jax.lax.top_k(values, k)
  found = jax.jit(sampling_lib.top_k, static_argnums=1)(values, k)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])

"""Commit against lists of Python: the XLA form and the kernels, contiguous and paged.

Axes: `L` layers, `B` batch, `Hkv` heads, `S` slots, `N` nodes, `K` path, `Dh` head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.commit import commit
from pallas_kernels.commit import gpu
from pallas_kernels.commit import tpu
from tests.pallas_kernels.interpreter import assert_no_races
from tests.pallas_kernels.interpreter import compiled
from tests.pallas_kernels.interpreter import strict

_L, _HKV, _DH, _S, _N, _K = 2, 3, 20, 96, 7, 9
_LENGTHS, _COUNTS = (0, 7, 30, 31, 87, 50), (9, 0, 5, 2, 9, 9)
_B = len(_LENGTHS)


class Problem(NamedTuple):
  """Arguments of a commit, and what must come out of it."""

  slots: jax.Array
  nodes: jax.Array
  path: jax.Array
  length: jax.Array
  count: jax.Array
  page_table: jax.Array | None
  scale: jax.Array | None
  expected: np.ndarray  # f[L, B, Hkv, S, Dh] rows in order, dead slots as they were


def _make(dtype=jnp.float32, page=None, seed=0):
  rng = np.random.default_rng(seed)
  scale = None
  nodes = jnp.asarray(rng.standard_normal((_L, _B, _HKV, _N, _DH)), jnp.float32)
  rows = jnp.asarray(rng.standard_normal((_L, _B, _HKV, _S, _DH)) * 9).astype(dtype)
  if rows.dtype.itemsize == 1:
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (_L, _HKV)), jnp.float32)
    stored = np.asarray(nodes) / np.asarray(scale)[:, None, :, None, None]
    info = jnp.iinfo(dtype) if dtype == jnp.int8 else jnp.finfo(dtype)
    stored = np.clip(np.round(stored) if dtype == jnp.int8 else stored, info.min, info.max)
    stored = jnp.asarray(stored).astype(dtype)
  else:
    nodes = stored = nodes.astype(dtype)
  path = rng.integers(0, _N, (_B, _K))
  expected = np.asarray(rows).copy()
  for row, (length, count) in enumerate(zip(_LENGTHS, _COUNTS, strict=True)):
    for index in range(count):
      expected[:, row, :, length + index] = np.asarray(stored)[:, row, :, path[row, index]]
  slots, table = rows, None
  if page is not None:
    order = rng.permutation(_B * _S // page)
    pages = rows.reshape(_L, _B, _HKV, _S // page, page, _DH).transpose(0, 1, 3, 2, 4, 5)
    pages = pages.reshape(_L, -1, _HKV, page, _DH)
    slots = jnp.zeros_like(pages).at[:, order].set(pages)
    table = jnp.asarray(order.reshape(_B, -1), jnp.int32)
  return Problem(
    slots, nodes, jnp.asarray(path, jnp.int32), jnp.asarray(_LENGTHS, jnp.int32),
    jnp.asarray(_COUNTS, jnp.int32), table, scale, expected,
  )  # fmt: skip


def _rows(out, problem):
  """Returns f[L, B, Hkv, S, Dh], the slots of each row in order."""
  if problem.page_table is None:
    return np.asarray(out)
  pages = np.asarray(out)[:, np.asarray(problem.page_table)]  # [L, B, pages, Hkv, page, Dh]
  return pages.transpose(0, 1, 3, 2, 4, 5).reshape(problem.expected.shape)


def _check(run, problem, *, all_slots=True):
  more = dict(page_table=problem.page_table, scale=problem.scale)
  rows = _rows(compiled(run)(*problem[:5], **more), problem)
  assert rows.dtype == problem.expected.dtype
  if not all_slots:  # dead slots may hold anything
    live = np.arange(_S)[None] < np.add(_LENGTHS, _COUNTS)[:, None]
    live = live[None, :, None, :, None]
    rows = np.where(live, rows, problem.expected)
  np.testing.assert_array_equal(rows, problem.expected)


@pytest.mark.parametrize('page', [None, 16])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.int8])
def test_the_reference_appends(dtype, page):
  run = functools.partial(commit, implementation='xla')
  _check(run, _make(dtype, page), all_slots=page is not None)


@pytest.mark.parametrize(
  'dtype, page', [(jnp.bfloat16, None), (jnp.float32, 16), (jnp.float8_e4m3fn, 32)]
)
def test_the_tpu_kernel_appends_and_touches_nothing_else(dtype, page):
  _check(functools.partial(tpu.commit_tpu, interpret=strict()), _make(dtype, page))
  assert_no_races()


@pytest.mark.parametrize('dtype, page', [(jnp.bfloat16, None), (jnp.int8, 16)])
def test_the_gpu_kernel_appends_and_touches_nothing_else(dtype, page):
  _check(functools.partial(gpu.commit_gpu, interpret=True), _make(dtype, page))


def test_nothing_to_commit_changes_nothing():
  problem = _make()
  nothing = jnp.zeros((_B,), jnp.int32)
  out = tpu.commit_tpu(*problem[:4], nothing, interpret=True)
  np.testing.assert_array_equal(out, problem.slots)


def test_nan_in_a_rejected_node_stays_out():
  problem = _make()
  used = np.zeros((_B, _N), bool)
  for row, count in enumerate(_COUNTS):
    used[row, np.asarray(problem.path)[row, :count]] = True
  nodes = jnp.where(used[None, :, None, :, None], problem.nodes, jnp.nan)
  run = functools.partial(commit, implementation='interpret')
  _check(run, problem._replace(nodes=nodes))


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(path=jnp.zeros((2, _K), jnp.int32)), r'path must be i32\[B, K\]'),
    (dict(count=jnp.zeros((2,), jnp.int32)), r'count must be i32\[B\]'),
    (dict(nodes=jnp.zeros((_L, _B, 5, _N, _DH))), r'nodes \[L, B, Hkv, N, Dh\]'),
    (dict(scale=jnp.ones((_L, _HKV))), 'needs a scale'),
    (dict(path=jnp.zeros((_B, _S + 1), jnp.int32)), 'needs as many slots'),
  ],
)
def test_shapes_that_disagree_are_refused(change, message):
  problem = _make()._replace(**change)
  with pytest.raises(ValueError, match=message):
    commit(*problem[:5], page_table=problem.page_table, scale=problem.scale)


def test_what_the_kernel_cannot_do_it_says():
  problem = _make(jnp.bfloat16, 24)
  with pytest.raises(NotImplementedError, match='multiple of 16'):
    commit(*problem[:5], page_table=problem.page_table, implementation='tpu')

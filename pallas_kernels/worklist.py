"""Lists of work items: what a ragged batch needs done, and nothing else, as a kernel's grid.

A grid over (row, block of slots) would visit every block of the capacity. Here the blocks that are
needed are compacted into a list, the list's length is the (dynamic) extent of the grid, and a step
looks up in scalar memory which block it is for. Axes: `R` rows, `K` blocks, `Z` splits, `M = R K`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class WorkList(NamedTuple):
  """Items in row order, `row * K + block` each; a negative item ~x belongs to a row without work.

  Every row has at least one item in every split, so that its output is written.
  """

  items: jax.Array  # i32[Z, M]; past `count` the last item repeated, so that nothing is fetched
  count: jax.Array  # i32[Z]


def make_work_list(wanted: jax.Array, num_splits: int = 1) -> WorkList:
  """Returns the list of the wanted blocks, bool[R, K], each row's shared out over the splits."""
  num_rows, num_blocks = wanted.shape
  rank = jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - 1
  share = jnp.maximum(-(-wanted.sum(1, dtype=jnp.int32) // num_splits), 1)
  split = rank // share[:, None]
  chosen = wanted[None] & (split[None] == jnp.arange(num_splits)[:, None, None])
  idle = ~chosen.any(-1)
  first = (jnp.arange(num_blocks) == 0)[None, None]
  code = jnp.arange(num_rows * num_blocks, dtype=jnp.int32).reshape(1, num_rows, num_blocks)
  code = jnp.where(idle[..., None], ~code, code).reshape(num_splits, -1)
  chosen = (chosen | (idle[..., None] & first)).reshape(num_splits, -1)
  return compact(code, chosen)


def compact(code: jax.Array, chosen: jax.Array) -> WorkList:
  """Returns the items of code i32[Z, M] that are chosen, bool[Z, M], in order; at least one is."""
  size = code.shape[1]
  place = jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1
  count = chosen.sum(1, dtype=jnp.int32)
  rows = jnp.arange(code.shape[0])[:, None]
  items = jnp.zeros_like(code).at[rows, jnp.where(chosen, place, size)].set(code, mode='drop')
  last = jnp.take_along_axis(items, jnp.maximum(count[:, None] - 1, 0), axis=1)
  return WorkList(jnp.where(jnp.arange(size)[None] < count[:, None], items, last), count)

"""How a kernel gets what belongs to the rows of logits, and gives back what it gathered.

Axes: `B` batch, `N` nodes, `M = B N` rows, `K` tokens asked for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.verify import core
from pallas_kernels.verify.reference import Ingredients


class Request(NamedTuple):
  """What is asked of each row, as columns [M, 1]."""

  warp: core.Warp
  tokens: tuple[jax.Array, ...]  # K of i32
  residual: jax.Array | None  # i32
  keys: tuple[jax.Array, jax.Array] | None  # two words of i32


def make_request(tokens, num_nodes, temperature, top_k, top_p, min_p, residual, keys) -> Request:
  """Returns the columns of a problem as `verify` takes it."""

  def column(values):
    return values.reshape(-1, 1)

  def of_row(values):
    return column(jnp.repeat(values, num_nodes))

  def rule(values):
    return None if values is None else of_row(values)

  words = None
  if keys is not None:
    data = jax.lax.bitcast_convert_type(jax.random.key_data(keys), jnp.int32)
    words = (column(data[..., 0]), column(data[..., 1]))
  return Request(
    warp=core.Warp(of_row(temperature), rule(top_k), rule(top_p), rule(min_p)),
    tokens=tuple(column(tokens[..., k]) for k in range(tokens.shape[2])),
    residual=None if residual is None else column(residual).astype(jnp.int32),
    keys=words,
  )


def gathered_shapes(request: Request, has_laws: bool, num_rows: int) -> core.Gathered:
  """Returns the shapes of `core.Gathered` for a request."""

  def column(dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct((num_rows, 1), dtype)

  num_tokens = len(request.tokens)
  draft = has_laws or request.residual is not None
  return core.Gathered(
    argmax=column(jnp.int32),
    floor=column(),
    log_normalizer=column(),
    log_probs=(column(),) * num_tokens,
    draft_log_probs=(column(),) * num_tokens if has_laws else None,
    excess=column() if draft else None,
    sample=column(jnp.int32) if request.keys is not None else None,
  )


def ingredients(gathered: core.Gathered, batch: int, num_nodes: int) -> Ingredients:
  """Returns what `verify` returns from columns [M, 1]."""

  def plain(column):
    return column.reshape(batch, num_nodes)

  def stacked(columns):
    return jnp.stack([plain(column) for column in columns], axis=-1)

  return Ingredients(
    argmax=plain(gathered.argmax),
    floor=plain(gathered.floor),
    log_normalizer=plain(gathered.log_normalizer),
    log_probs=stacked(gathered.log_probs),
    draft_log_probs=_if_any(stacked, gathered.draft_log_probs),
    excess=_if_any(plain, gathered.excess),
    sample=_if_any(plain, gathered.sample),
  )


def _if_any(function, value):
  return None if value is None else function(value)

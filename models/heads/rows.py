"""What heads carry from round to round: the newest feature, or a cache with a row for each token.

The target reads a token once, and shows its hidden state and taps. A head that attends keeps one
row of keys and values for each such token, computed from what the target showed and never from its
own guesses: what it drafted in a round is thrown away, and the accepted tokens are read anew.

Axes: `B` batch, `T` tokens, `D` width, `S` slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax import trees
from decodax.kv_cache import KVBlock
from decodax.kv_cache import KVCache
from decodax.kv_cache import commit_kv
from decodax.kv_cache import init_kv_cache
from decodax.types import DecodeState
from decodax.types import ModelOutput
from decodax.types import Observation
from models.config import TransformerConfig
from models.transformer import attention_site


class Rows(NamedTuple):
  """What a head of one attention layer carries."""

  cache: KVCache
  last: jax.Array  # f[B, 1, D] its output at the newest row; zeros before there is one


class Read(NamedTuple):
  """Tokens that the target has read and the head has not."""

  output: ModelOutput  # the target's, [B, T, ...]
  tokens: jax.Array  # i32[B, T] the token after each
  positions: jax.Array  # i32[B, T] of what the target read
  count: jax.Array  # i32[B] how many of a row are there


def init_rows(config: TransformerConfig, batch_size: int, capacity: int, dtype) -> Rows:
  """Returns no rows, with room for `capacity`."""
  return Rows(
    cache=init_kv_cache(1, batch_size, config.num_kv_heads, capacity, config.head_dim, dtype),
    last=jnp.zeros((batch_size, 1, config.hidden_size), dtype),
  )


def read_rows(
  config: TransformerConfig,
  rows: Rows,
  layer_fn: Callable[..., tuple[jax.Array, tuple]],
  positions: jax.Array,
  count: jax.Array,
) -> Rows:
  """Returns the rows with the first count i32[B] of T new ones appended.

  Args:
    config: of the head's layer.
    rows: those before.
    layer_fn: (site) -> the head's output f[B, T, D], the layer's keys and values.
    positions: i32[B, T].
    count: i32[B].
  """
  batch_size, width = positions.shape
  causal = jnp.tril(jnp.ones((width, width), bool))
  mask = jnp.broadcast_to(causal, (batch_size, width, width))
  y, (keys, values) = layer_fn(attention_site(config, positions, mask, cache=rows.cache))
  path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), positions.shape)
  block = KVBlock(keys[None], values[None], positions)
  return Rows(commit_kv(rows.cache, block, path, count), newest(y, count, rows.last))


def newest(y: jax.Array, count: jax.Array, before: jax.Array) -> jax.Array:
  """Returns f[B, 1, D], entry count - 1 of y f[B, T, D]; `before` in rows without any."""
  index = jnp.maximum(count - 1, 0)[:, None, None]
  last = jnp.take_along_axis(y, index, axis=1)
  return jnp.where((count > 0)[:, None, None], last, before)


def accepted(observation: Observation, state: DecodeState) -> Read:
  """Returns what the target read of a round's path: the root and the accepted drafts."""
  path = observation.verdict.path
  output = jax.tree.map(
    lambda a: jnp.take_along_axis(a, path[:, :, None], axis=1), observation.output
  )
  first = state.length - observation.num_emitted - 1
  positions = first[:, None] + jnp.arange(path.shape[1], dtype=jnp.int32)[None]
  tokens = trees.path_tokens(observation.proposal, observation.verdict)
  return Read(output, tokens, positions, observation.num_emitted)

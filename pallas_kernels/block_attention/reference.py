"""The XLA form of block attention: one online softmax over the block and the cached prefix.

Axes: `B` batch, `T` queries, `N` block tokens, `S` cache slots, `L` layers, `H` query heads,
`Hkv` key/value heads, `G = H / Hkv`, `Dh` head size.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with nothing to attend to gives no NaN


class Prefix(NamedTuple):
  """A committed cache as attention reads it: all layers, and which one."""

  keys: jax.Array  # f[L, B, Hkv, S, Dh]
  values: jax.Array  # f[L, B, Hkv, S, Dh]
  positions: jax.Array  # i32[B, S] position of the token in each slot
  length: jax.Array  # i32[B] slots that are valid
  layer: jax.Array  # i32[] the layer to read


def block_attention_reference(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  prefix: Prefix | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
  window: jax.Array | None = None,
  query_positions: jax.Array | None = None,
  key_positions: jax.Array | None = None,
  prefix_block_size: int = 128,
) -> jax.Array:
  """Returns f[B, T, H, Dh], softmax attention over the prefix and the block.

  A row reads its prefix in blocks up to the longest row of the batch, never the whole capacity;
  slots beyond a row's length weigh exactly nothing, whatever they hold, so that a row's result
  is the same to the bit beside any neighbour and at any capacity.

  Args:
    queries: f[B, T, H, Dh].
    keys: f[B, Hkv, N, Dh], the block's own keys.
    values: f[B, Hkv, N, Dh].
    mask: bool[B, T, N], what each query may see of the block.
    prefix: the committed cache, or None if there is none. Every query sees all of it, up to
      `prefix.length` and the window.
    scale: factor on the scores.
    soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
    window: i32[], a query sees positions greater than its own minus this. None: no limit.
    query_positions: i32[B, T], needed with `window`.
    key_positions: i32[B, N], needed with `window`.
    prefix_block_size: slots read at a time; must divide S.

  Raises:
    ValueError: if shapes disagree, or `window` comes without positions.

  Source: online softmax, arXiv:1805.02867; split over prefix blocks as in arXiv:2205.14135.
  """
  _check(queries, keys, values, mask, prefix, window, query_positions, key_positions)
  batch, num_queries, num_heads, head_dim = queries.shape
  num_kv_heads = keys.shape[1]
  group = num_heads // num_kv_heads

  # Rows of one matmul: the G query heads of a key/value head, each with its T queries.
  grouped = queries.reshape(batch, num_queries, num_kv_heads, group, head_dim)
  grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim) * scale

  def visible(ok, positions):  # bool[B, 1 or T, n] -> bool[B, 1, G * T, n]
    if window is not None and query_positions is not None:
      ok = ok & (positions[:, None, :] > query_positions[:, :, None] - window)
    ok = jnp.broadcast_to(ok, (batch, num_queries, ok.shape[-1]))[:, None, None]
    ok = jnp.broadcast_to(ok, (batch, 1, group, *ok.shape[-2:]))
    return ok.reshape(batch, 1, -1, ok.shape[-1])

  def scores_of(some_keys, ok):
    scores = jnp.einsum('bkqd,bknd->bkqn', grouped, some_keys, preferred_element_type=jnp.float32)
    if soft_cap is not None:
      scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(ok, scores, _MASKED)

  def weighted(weights, some_values):
    return jnp.einsum(
      'bkqn,bknd->bkqd',
      weights.astype(some_values.dtype),
      some_values,
      preferred_element_type=jnp.float32,
    )

  scores = scores_of(keys, visible(mask, key_positions))
  peak = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - peak)
  carry = (peak, weights.sum(-1, keepdims=True), weighted(weights, values))

  def read_block(prefix, index, carry):
    peak, total, mixed = carry
    start = index * prefix_block_size
    size = (1, batch, num_kv_heads, prefix_block_size, head_dim)
    where = (prefix.layer, 0, 0, start, 0)
    valid = start + jnp.arange(prefix_block_size)[None] < prefix.length[:, None]  # bool[B, n]
    some_keys = lax.dynamic_slice(prefix.keys, where, size)[0]
    some_values = lax.dynamic_slice(prefix.values, where, size)[0]
    some_values = jnp.where(valid[:, None, :, None], some_values, 0)  # dead slots may hold NaN
    positions = lax.dynamic_slice(prefix.positions, (0, start), (batch, prefix_block_size))
    scores = scores_of(some_keys, visible(valid[:, None], positions))
    new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
    shrink, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak)
    total = total * shrink + weights.sum(-1, keepdims=True)
    return new_peak, total, mixed * shrink + weighted(weights, some_values)

  if prefix is not None:
    num_blocks = -(-jnp.max(prefix.length) // prefix_block_size)
    carry = lax.fori_loop(0, num_blocks, functools.partial(read_block, prefix), carry)

  _, total, mixed = carry
  out = (mixed / total).astype(queries.dtype)
  out = out.reshape(batch, num_kv_heads, group, num_queries, head_dim).transpose(0, 3, 1, 2, 4)
  return out.reshape(queries.shape)


def _check(queries, keys, values, mask, prefix, window, query_positions, key_positions):
  batch, num_queries, num_heads, head_dim = queries.shape
  if keys.shape != values.shape or keys.ndim != 4:
    raise ValueError(f'keys and values must be [B, Hkv, N, Dh]: {keys.shape=}, {values.shape=}')
  if (keys.shape[0], keys.shape[3]) != (batch, head_dim) or num_heads % keys.shape[1]:
    raise ValueError(f'keys do not fit the queries [B, T, H, Dh]: {queries.shape=}, {keys.shape=}')
  if mask.shape != (batch, num_queries, keys.shape[2]):
    raise ValueError(
      f'mask must be bool[B, T, N]: {mask.shape=}, expected {(batch, num_queries, keys.shape[2])}'
    )
  if window is not None and (query_positions is None or key_positions is None):
    raise ValueError('a window needs query_positions and key_positions')
  if prefix is not None and prefix.keys.shape[1:3] != keys.shape[:2]:
    raise ValueError(f'prefix must be [L, B, Hkv, S, Dh]: {prefix.keys.shape=}, {keys.shape=}')

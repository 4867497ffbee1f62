"""The XLA form of verify: what verifiers decide by, from the logits of all nodes.

Axes: `B` batch, `N` nodes, `V` vocabulary, `K` tokens asked for at a node.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class Ingredients(NamedTuple):
  """What a verdict is made of. p is the target's warped law, q the drafter's; entries in nats."""

  argmax: jax.Array  # i32[B, N] the first largest logit
  floor: jax.Array  # f32[B, N] logits / temperature below this are excluded; -inf: none
  log_normalizer: jax.Array  # f32[B, N] logsumexp of the warped logits; 0 in greedy rows
  log_probs: jax.Array  # f32[B, N, K] log p of the tokens; -inf if impossible or not a token
  draft_log_probs: jax.Array | None = None  # f32[B, N, K] log q of the tokens
  excess: jax.Array | None = None  # f32[B, N] sum of max(p - q, 0)
  sample: jax.Array | None = None  # i32[B, N] a token from p, or from what p has more than q


def verify_reference(
  logits: jax.Array,
  tokens: jax.Array,
  *,
  temperature: jax.Array,
  top_k: jax.Array | None = None,
  top_p: jax.Array | None = None,
  min_p: jax.Array | None = None,
  laws: jax.Array | None = None,
  residual: jax.Array | None = None,
  keys: jax.Array | None = None,
) -> Ingredients:
  """Returns the ingredients of every node; see `verify` for arguments and errors."""
  logits = logits.astype(jnp.float32)
  index = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
  argmax = lax.argmax(logits, 2, jnp.int32)
  greedy = (temperature == 0)[:, None, None]
  scaled = logits / jnp.where(greedy, 1, temperature[:, None, None])
  floor = _floor(scaled, temperature, top_k, top_p, min_p)
  warped = jnp.where(scaled >= floor, scaled, -jnp.inf)
  one_hot = jnp.where(index == argmax[..., None], 0.0, -jnp.inf)
  warped = jnp.where(greedy, one_hot, warped)
  log_law = jax.nn.log_softmax(warped, -1)
  parts = dict(
    argmax=argmax,
    floor=floor[..., 0],
    log_normalizer=jax.nn.logsumexp(warped, -1),
    log_probs=_log_probs_of(log_law, tokens),
  )
  draft = None
  if laws is not None:
    log_draft = jax.nn.log_softmax(laws.astype(jnp.float32), -1)
    parts['draft_log_probs'] = _log_probs_of(log_draft, tokens)
    draft = jnp.exp(log_draft)
  elif residual is not None:
    draft = jnp.where(index == tokens[:, :, :1], 1.0, 0.0)
  left = None
  if draft is not None:
    left = jnp.maximum(jnp.exp(log_law) - draft, 0)
    parts['excess'] = left.sum(-1)
  if keys is not None:
    if residual is not None and left is not None:
      some = residual[..., None] & (left.sum(-1, keepdims=True) > 0)
      warped = jnp.where(some, jnp.log(left), warped)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[2:])))(keys)
    parts['sample'] = lax.argmax(warped + noise, 2, jnp.int32)
  return Ingredients(**parts)


def _log_probs_of(log_law, tokens):
  known = (tokens >= 0) & (tokens < log_law.shape[-1])
  found = jnp.take_along_axis(log_law, jnp.where(known, tokens, 0), axis=-1)
  return jnp.where(known, found, -jnp.inf)


def _floor(scaled, temperature, top_k, top_p, min_p):
  """Returns f32[B, N, 1], the scaled logit below which tokens are excluded."""
  sampled, top = (temperature > 0)[:, None, None], scaled.max(-1, keepdims=True)
  floor = jnp.full_like(top, -jnp.inf)
  ascending = jnp.sort(scaled, -1)
  if top_k is not None:
    vocab_size = scaled.shape[-1]
    rank = jnp.clip(vocab_size - top_k, 0, vocab_size - 1)[:, None, None]
    kth = jnp.take_along_axis(ascending, jnp.broadcast_to(rank, top.shape), axis=-1)
    floor = jnp.where(sampled & (top_k > 0)[:, None, None], kth, floor)
  if top_p is not None:
    kept = jax.nn.softmax(jnp.where(ascending >= floor, ascending, -jnp.inf), -1)
    gathered = jnp.cumsum(kept[..., ::-1], -1)[..., ::-1]  # of this token and all above
    enough = gathered >= top_p[:, None, None]
    least = jnp.where(enough, ascending, -jnp.inf).max(-1, keepdims=True)
    floor = jnp.where(sampled & (top_p < 1)[:, None, None], jnp.maximum(floor, least), floor)
  if min_p is not None:
    lowest = top + jnp.log(min_p)[:, None, None]
    floor = jnp.where((min_p > 0)[:, None, None], jnp.maximum(floor, lowest), floor)
  return floor


def check_arguments(logits, tokens, temperature, top_k, top_p, min_p, laws, residual, keys):
  """Checks shapes and dtypes, as `verify` says.

  Raises:
    ValueError: if they do not fit.
  """
  if logits.ndim != 3 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f'logits must be f[B, N, V]: {logits.shape=}, {logits.dtype=}')
  if tokens.ndim != 3 or tokens.shape[:2] != logits.shape[:2] or not tokens.shape[2]:
    raise ValueError(f'tokens must be i32[B, N, K], K > 0: {tokens.shape=}, {logits.shape=}')
  rows = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  for name, values in rows.items():
    if values is not None and values.shape != logits.shape[:1]:
      raise ValueError(f'{name} must have shape [B]: {values.shape}, {logits.shape=}')
  if laws is not None and laws.shape != logits.shape:
    raise ValueError(f'laws must be like the logits: {laws.shape=}, {logits.shape=}')
  for name, values in dict(residual=residual, keys=keys).items():
    if values is not None and values.shape != logits.shape[:2]:
      raise ValueError(f'{name} must have shape [B, N]: {values.shape}, {logits.shape=}')
  if keys is not None and not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    raise ValueError(f'keys must be typed keys, as jax.random.key makes them: {keys.dtype=}')

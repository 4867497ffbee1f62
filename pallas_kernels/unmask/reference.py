"""The XLA form of unmask: how sure a masked-diffusion model is of each position.

Axes: `B` batch, `T` positions, `D` hidden size, `V` vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Certainty(NamedTuple):
  """What unmasking policies rank positions by; all of softmax(logits), in nats."""

  token: jax.Array  # i32[B, T] the first largest logit
  confidence: jax.Array  # f32[B, T] its probability
  margin: jax.Array  # f32[B, T] its probability less that of the second largest
  entropy: jax.Array  # f32[B, T] at least 0
  log_normalizer: jax.Array  # f32[B, T] logsumexp of the logits


def unmask_reference(
  logits: jax.Array, head: jax.Array | None = None, *, transposed: bool = False
) -> Certainty:
  """Returns the certainty of every position; see `unmask` for arguments and errors."""
  if head is not None:
    layout = '...d,vd->...v' if transposed else '...d,dv->...v'
    logits = jnp.einsum(
      layout, logits, head.astype(logits.dtype), preferred_element_type=jnp.float32
    )
  logits = logits.astype(jnp.float32)
  peak = logits.max(-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  token = jnp.where(logits == peak, index, logits.shape[-1] - 1).min(-1)
  second = jnp.where(index == token[..., None], -jnp.inf, logits).max(-1)
  weights = jnp.exp(logits - peak)
  total = weights.sum(-1)
  mean = jnp.where(weights > 0, weights * (logits - peak), 0).sum(-1) / total
  return certainty(token, peak[..., 0], second, total, mean)


def certainty(token, peak, second, total, mean) -> Certainty:
  """Returns the record from what one pass gathers, f32[...] but the token.

  Args:
    token: i32[...].
    peak: the largest logit.
    second: the second largest.
    total: sum of exp(logits - peak).
    mean: mean of logits - peak under the law.
  """
  return Certainty(
    token=token,
    confidence=1 / total,
    margin=(1 - jnp.exp(second - peak)) / total,
    entropy=jnp.maximum(jnp.log(total) - mean, 0),
    log_normalizer=peak + jnp.log(total),
  )


def check_arguments(logits, head, transposed):
  """Checks shapes and dtypes, as `unmask` says.

  Raises:
    ValueError: if they do not fit.
  """
  if logits.ndim != 3 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f'what is given must be f[B, T, V] or f[B, T, D]: {logits.shape=}')
  if head is not None:
    size = head.shape[1 if transposed else 0] if head.ndim == 2 else None
    if size != logits.shape[-1]:
      form = '[V, D]' if transposed else '[D, V]'
      raise ValueError(
        f'head must be f{form} for hidden f[B, T, D]: {head.shape=}, {logits.shape=}'
      )

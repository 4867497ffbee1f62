"""How often one draft is kept.

Axes: `B` any leading axes, `V` vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from decodax.theory.common import as_laws
from decodax.theory.common import normalize
from decodax.theory.common import sorted_by_ratio


def overlap(p: ArrayLike, q: ArrayLike) -> jax.Array:
  """Returns f[B], the overlap of two laws: the best acceptance that a single draft can have.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.

  Raises:
    ValueError: the shapes differ.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, theorem 3.5.
  """
  p, q = as_laws(p, q)
  return jnp.sum(jnp.minimum(p, q), axis=-1)


def total_variation(p: ArrayLike, q: ArrayLike) -> jax.Array:
  """Returns f[B], half the L1 distance of two laws f[B, V]: 1 minus their overlap.

  Raises:
    ValueError: the shapes differ.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, definition 3.2.
  """
  p, q = as_laws(p, q)
  return jnp.sum(jnp.abs(p - q), axis=-1) / 2


def coupled_acceptance(p: ArrayLike, q: ArrayLike) -> jax.Array:
  """Returns f[B], how often argmax(log p + g) and argmax(log q + g) agree on shared Gumbel noise g.

  This is the acceptance of coupled verification. It lies between (1 - TV) / (1 + TV) and 1 - TV.
  One sort by p / q turns the double sum of the definition into two cumulative sums.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.

  Raises:
    ValueError: the shapes differ.

  Source: Coupling without Communication and Drafter-Invariant Speculative Decoding, 2408.07978,
  section on Gumbel sampling.
  """
  p, q = sorted_by_ratio(*as_laws(p, q))  # q / p falls
  # Token v wins both races with odds p_v : sum of p over the tokens that p favours at least as
  # much as v; and likewise for q.
  p_favoured = jnp.cumsum(p[..., ::-1], axis=-1)[..., ::-1]
  q_favoured = jnp.cumsum(q, axis=-1) - q
  both = p * q
  odds = q * p_favoured + p * q_favoured
  return jnp.sum(jnp.where(both > 0, both / jnp.where(both > 0, odds, 1), 0), axis=-1)


class LenientOutput(NamedTuple):
  """What lenient verification does, exactly."""

  law: jax.Array  # f[B, V] the law of the emitted token
  acceptance: jax.Array  # f[B]
  total_variation: jax.Array  # f[B] distance of `law` from the target's law


def lenient_output(p: ArrayLike, q: ArrayLike, leniency: ArrayLike) -> LenientOutput:
  """Returns the law that lenient verification emits, its acceptance and its distance from p.

  A draft x is kept with probability min(1, p(x) / (leniency * q(x))), and a rejection is replaced
  by a draw from the normalised positive part of p - leniency * q. No token becomes more likely
  than p / leniency.

  Args:
    p: f[B, V], the target's law.
    q: f[B, V], the draft's law.
    leniency: f[] or f[B] in (0, 1]; 1 is lossless. Values outside give meaningless results.

  Raises:
    ValueError: the shapes of p and q differ.

  Source: Fast Inference from Transformers via Speculative Decoding, 2211.17192, appendix on
  lenience; the closed form of the output is our own.
  """
  p, q = as_laws(p, q)
  leniency = jnp.asarray(leniency, p.dtype)
  leniency = leniency[..., None] if leniency.ndim else leniency
  kept = jnp.minimum(q, p / leniency)
  acceptance = jnp.sum(kept, axis=-1)
  law = kept + (1 - acceptance)[..., None] * normalize(jnp.maximum(p - leniency * q, 0))
  return LenientOutput(law, acceptance, total_variation(p, law))

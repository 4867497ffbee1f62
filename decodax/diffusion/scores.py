"""How sure the network is of each slot, and how to pick by it.

Axes: `B` batch, `W` window slots, `V` vocabulary. Everything is per row: a pick never looks at
neighbours in the batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from decodax.diffusion.keys import Purpose
from decodax.diffusion.types import Summary
from decodax.diffusion.types import View
from pallas_kernels.unmask import unmask


def summarize(logits: jax.Array) -> Summary:
  """Returns best token, its probability, the runner-up's, entropy and normalizer, each [...].

  One pass over logits f32[..., V], by the kernel `pallas_kernels.unmask` where there is one. Of
  equal logits the first is the best. A NaN anywhere gives NaN.
  """
  shape = logits.shape[:-1]
  found = unmask(logits.reshape(1, -1, logits.shape[-1]))
  found = jax.tree.map(lambda a: a.reshape(shape), found)
  return Summary(
    best=found.token,
    top=found.confidence,
    second=found.second,
    entropy=found.entropy,
    log_normalizer=found.log_normalizer,
  )


def probability_of(logits: jax.Array, summary: Summary, tokens: jax.Array) -> jax.Array:
  """Returns f32[...], the probability of tokens i32[...] under logits f32[..., V]."""
  logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return jnp.exp(logit - summary.log_normalizer)


# --- Scores: the larger, the sooner ---------------------------------------------------------------


def _random(view: View) -> jax.Array:
  return view.keys.uniform(view.tokens.shape[1:], Purpose.ORDER)


SCORES: dict[str, Callable[[View], jax.Array]] = {
  'confidence': lambda view: view.confidence,
  'margin': lambda view: view.summary.top - view.summary.second,
  'entropy': lambda view: -view.summary.entropy,
  'random': _random,
  'left_to_right': lambda view: -view.positions.astype(jnp.float32),
}
"""name -> (view) -> f32[B, W]. Their scales differ: a threshold on one means nothing to another.

Source: `confidence` MaskGIT, arXiv:2202.04200, and LLaDA, arXiv:2502.09992; `margin` Train for the
Worst, Plan for the Best, arXiv:2502.06768; `entropy` Dream 7B, arXiv:2508.15487.
"""


def score_fn(name: str) -> Callable[[View], jax.Array]:
  """Returns the score of that name.

  Raises:
    ValueError: if there is none.
  """
  if name not in SCORES:
    raise ValueError(f'score must be one of {", ".join(SCORES)}: {name!r}')
  return SCORES[name]


# --- Picking --------------------------------------------------------------------------------------


def ranks(score: jax.Array, eligible: jax.Array) -> jax.Array:
  """Returns i32[B, W], 0 at the best eligible slot; ties go to the left, the ineligible come last.

  By counting: W is small, and a sort of it is slow.
  """
  index = jnp.arange(score.shape[1])
  mine, other = score[:, :, None], score[:, None, :]
  earlier = (index[None, :] < index[:, None])[None]
  ahead = eligible[:, None, :] & ((other > mine) | ((other == mine) & earlier))
  rest = eligible.sum(-1, keepdims=True) + jnp.cumsum(~eligible, axis=1) - 1
  return jnp.where(eligible, ahead.sum(-1), rest).astype(jnp.int32)


def top(score: jax.Array, eligible: jax.Array, count: jax.Array | int) -> jax.Array:
  """Returns bool[B, W], each row's `count` i32[B] best eligible slots; all if there are fewer."""
  count = jnp.broadcast_to(jnp.asarray(count), eligible.shape[:1])
  return eligible & (ranks(score, eligible) < count[:, None])


def by_rank(values: jax.Array, rank: jax.Array) -> jax.Array:
  """Returns values[B, W] in the order of rank i32[B, W], which is a permutation in every row."""
  order = jnp.argmax(rank[:, None, :] == jnp.arange(rank.shape[1])[None, :, None], axis=-1)
  return jnp.take_along_axis(values, order, axis=1)


def or_best(commit: jax.Array, score: jax.Array, eligible: jax.Array) -> jax.Array:
  """Returns commit bool[B, W]; in rows where it is empty, the best eligible slot."""
  commit = commit & eligible
  return commit | (top(score, eligible, 1) & ~commit.any(-1, keepdims=True))


def longest_prefix(ok: jax.Array) -> jax.Array:
  """Returns i32[B], the number of leading True in ok bool[B, W]."""
  return jnp.cumprod(ok, axis=-1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)

"""How a language model drafts a chain: token by token, into a scratch block.

Axes: `B` batch, `D` drafts, `V` vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import sampling as sampling_lib
from decodax.decode import round_keys
from decodax.types import DecodeState
from decodax.types import Model
from decodax.types import PyTree
from decodax.types import Result


class Draft(NamedTuple):
  """One drafted token."""

  token: jax.Array  # i32[B]
  law: jax.Array | None  # f32[B, V] logits of the law it was drawn from, if wanted
  seen: jax.Array | None  # bool[B, V] tokens of the row with this one, if there is a penalty


def draw(
  state: DecodeState,
  logits: jax.Array,
  seen: jax.Array | None,
  depth: jax.Array,
  *,
  noise_fn: Callable,
  with_laws: bool,
) -> Draft:
  """Returns the token at `depth` drawn from the drafter's logits f32[B, V], warped as the target's.

  Args:
    state: for keys and sampling values.
    logits: f32[B, V], raw.
    seen: bool[B, V], tokens before this one; None without a repetition penalty.
    depth: i32[], 1 for the child of the root.
    noise_fn: the verifier's `draft_noise`.
    with_laws: return the law too.
  """
  if seen is not None:
    logits = sampling_lib.penalize(logits, seen, state.sampling.repetition_penalty)

  def sample():
    law = sampling_lib.warp(logits, state.sampling)
    gumbel = noise_fn(round_keys(state), logits.shape[-1], depth)
    return jnp.argmax(law + gumbel, axis=-1), law if with_laws else None

  def take_best():
    return jnp.argmax(logits, axis=-1), logits if with_laws else None

  live = state.result == Result.RUNNING
  token, law = lax.cond(sampling_lib.any_sampled(state.sampling, live), sample, take_best)
  token = token.astype(jnp.int32)
  if seen is not None:
    seen = sampling_lib.mark_seen(seen, token[:, None], jnp.ones_like(token, bool)[:, None])
  return Draft(token, law, seen)


def extend_chain(
  params: PyTree,
  state: DecodeState,
  first: Draft,
  scratch: PyTree,
  *,
  model: Model,
  cache: PyTree,
  num_drafts: int,
  num_nodes: int,
  offset: int,
  noise_fn: Callable,
  with_laws: bool,
) -> tuple[jax.Array, jax.Array | None, PyTree]:
  """Returns (i32[B, D] drafts, f32[B, D, V] laws or None, the scratch with their entries).

  Args:
    params: the drafting model's.
    state: the decode state.
    first: the first draft; the rest follow it.
    scratch: a block of num_nodes >= offset + num_drafts - 1, the first `offset` of them filled.
    model: the drafting model.
    cache: what is committed for it; with the filled nodes it ends at the root.
    num_drafts: D.
    num_nodes: size of the scratch.
    offset: node of the scratch to write the first draft to.
    noise_fn: see `draw`.
    with_laws: see `draw`.
  """
  batch_size = first.token.shape[0]

  def step(carry, index):
    draft, scratch = carry
    node = offset + index
    positions = state.length[:, None] + index
    mask = jnp.broadcast_to(jnp.arange(num_nodes) <= node, (batch_size, 1, num_nodes))
    output, scratch = model.extend(
      params, cache, draft.token[:, None], positions, mask, scratch=scratch, offset=node
    )
    logits = model.unembed(params, output.hidden)[:, 0]
    following = draw(state, logits, draft.seen, index + 2, noise_fn=noise_fn, with_laws=with_laws)
    return (following, scratch), (following.token, following.law)

  steps = jnp.arange(num_drafts - 1)
  (_, scratch), (tokens, laws) = lax.scan(step, (first, scratch), steps)
  tokens = jnp.concatenate([first.token[None], tokens]).swapaxes(0, 1)
  if first.law is not None:
    laws = jnp.concatenate([first.law[None], laws]).swapaxes(0, 1)
  return tokens, laws, scratch

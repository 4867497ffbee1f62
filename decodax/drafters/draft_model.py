"""An independent draft model that proposes a chain.

Axes: `B` batch, `D` drafts, `C` prompt chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.decode import root_tokens
from decodax.drafters.chain import draw
from decodax.drafters.chain import extend_chain
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Model
from decodax.types import PyTree

_MAX_LAG = 2  # tokens the draft cache may be behind: the root, and the last draft if accepted


class DraftModelState(NamedTuple):
  """What the draft model carries from round to round."""

  cache: PyTree  # its own cache
  length: jax.Array  # i32[B] tokens in it
  scratch: PyTree  # entries of this round's drafts but the last, which it never reads


def draft_model(model: Model, *, num_drafts: int = 4) -> Drafter:
  """Returns a drafter that samples a chain from another language model.

  Its parameters are `Params.drafter`; its vocabulary must be the target's.

  Args:
    model: the draft model.
    num_drafts: D, tokens drafted a round.

  Raises:
    ValueError: if num_drafts < 1, or the model has no scratch blocks.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  init_scratch = model.init_scratch
  if init_scratch is None:
    raise ValueError('draft_model needs a model with init_scratch, to draft without committing')

  scratch_nodes = max(num_drafts - 1, 1)  # the last draft is never read

  def init(params, request, capacity):
    batch_size = request.tokens.shape[0]
    return DraftModelState(
      cache=model.init_cache(params.drafter, batch_size, capacity),
      length=jnp.zeros((batch_size,), jnp.int32),
      scratch=init_scratch(params.drafter, batch_size, scratch_nodes),
    )

  def prefill(params, drafter_state, tokens, positions, count, output):
    del output
    return _read(params, drafter_state, tokens, positions, count)[1]

  def _read(params, drafter_state, tokens, positions, count):
    """Returns (hidden f[B, C, D], the state with each row's first `count` tokens committed)."""
    batch_size, width = tokens.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (batch_size, width, width))
    output, block = model.extend(params.drafter, drafter_state.cache, tokens, positions, mask)
    path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    return output.hidden, drafter_state._replace(
      cache=model.commit(drafter_state.cache, block, path, count),
      length=drafter_state.length + count,
    )

  def propose(params, state, *, noise_fn, with_laws):
    behind = state.length - state.drafter.length  # 1, or 2 after a fully accepted draft
    positions = state.drafter.length[:, None] + jnp.arange(_MAX_LAG)[None]
    tokens = jnp.take_along_axis(state.tokens, positions, axis=1, mode='clip')
    hidden, drafter_state = _read(params, state.drafter, tokens, positions, behind)
    last = jnp.maximum(behind - 1, 0)[:, None, None]
    logits = model.unembed(params.drafter, jnp.take_along_axis(hidden, last, axis=1))[:, 0]
    options = dict(noise_fn=noise_fn, with_laws=with_laws)
    first = draw(state, logits, state.seen, jnp.int32(1), **options)
    drafts, laws, scratch = extend_chain(
      params.drafter, state, first, drafter_state.scratch,
      model=model, cache=drafter_state.cache, num_drafts=num_drafts,
      num_nodes=scratch_nodes, offset=0, **options,
    )  # fmt: skip
    root = root_tokens(state)
    proposal = chain_proposal(root, drafts, jnp.full_like(root, num_drafts), laws)
    return proposal, drafter_state._replace(scratch=scratch)

  def observe(params, drafter_state, observation, state):
    del params, state
    count = jnp.minimum(observation.verdict.num_accepted, num_drafts - 1)
    path = jnp.arange(scratch_nodes, dtype=jnp.int32)
    path = jnp.broadcast_to(path, (count.shape[0], scratch_nodes))
    return drafter_state._replace(
      cache=model.commit(drafter_state.cache, drafter_state.scratch, path, count),
      length=drafter_state.length + count,
    )

  return Drafter(
    shape=DraftShape(num_nodes=num_drafts + 1, max_depth=num_drafts, candidates=Candidates.SAMPLED),
    init=init,
    prefill=prefill,
    propose=propose,
    observe=observe,
  )

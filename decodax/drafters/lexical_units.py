"""Lexical-unit decoding: ask for several tokens at once behind padding, keep the confident ones.

Axes: `B` batch, `D` tokens of a unit after its first, `N = D + 1` nodes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax import sampling
from decodax.decode import root_tokens
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import ExtraNodes
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import longest_prefix


class UnitState(NamedTuple):
  """The rest of a unit whose first token has been emitted."""

  drafts: jax.Array  # i32[B, D]
  num_drafts: jax.Array  # i32[B]


def lexical_units(
  *, pad_id: int, num_drafts: int = 3, confidence: float | jax.Array = 0.9
) -> Drafter:
  """Returns the drafter that asks the target for what stands behind D padding tokens.

  The paddings are read beside the drafts, behind the last of them. The likeliest tokens there, as
  long as each is at least `confidence` likely, are the rest of the unit that starts with the next
  emitted token. They are the next round's drafts, all of them trusted.

  With `trusting` verification they are emitted as they are, which is lexical-unit decoding: lossy
  (nothing is verified), meant for a target trained to answer paddings. With `greedy`, `coupled` or
  `sample_and_match` verification: lossless.

  Args:
    pad_id: the padding token.
    num_drafts: D, so a unit has D + 1 tokens at most.
    confidence: f[] or f[B] >= 0; above 1 there are no drafts; may be traced.

  Raises:
    ValueError: if num_drafts < 1 or confidence < 0.

  Source: Lexical Unit Decoding, arXiv:2405.15208, section 3.3.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  check_knob('confidence', confidence, 0, float('inf'))
  num_nodes = num_drafts + 1

  def init(params, request, capacity):
    del params, capacity
    drafts = jnp.zeros((request.tokens.shape[0], num_drafts), jnp.int32)
    return UnitState(drafts, drafts[:, 0])

  def propose(params, state, *, noise_fn, with_laws):
    del params, noise_fn, with_laws
    own: UnitState = state.drafter
    proposal = chain_proposal(root_tokens(state), own.drafts, own.num_drafts)
    return proposal._replace(trusted=proposal.valid, extra=_paddings(proposal, pad_id)), own

  def observe(params, drafter_state, observation, state):
    del params, state
    logits = observation.extra_logits
    likelihood = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
    bar = jnp.reshape(jnp.asarray(confidence, logits.dtype), (-1, 1))
    # The paddings stood behind all drafts: they say nothing of a text without some of these.
    as_read = observation.num_emitted == drafter_state.num_drafts + 1
    count = jnp.where(as_read, longest_prefix(likelihood >= bar), 0)
    return UnitState(sampling.argmax(logits), count)

  return Drafter(
    shape=DraftShape(
      num_nodes=num_nodes,
      max_depth=num_drafts,
      candidates=Candidates.DETERMINISTIC,
      widths=(1, num_nodes),
    ),
    init=init,
    prefill=stateless_prefill,
    propose=propose,
    observe=observe,
  )


def _paddings(proposal, pad_id):
  """Returns the extra nodes: as many paddings as drafts could be, behind the last valid draft."""
  batch_size, num_nodes = proposal.tokens.shape
  num_pads = num_nodes - 1
  pads = jnp.arange(num_pads, dtype=jnp.int32)[None]
  behind = proposal.valid.sum(-1, dtype=jnp.int32)[:, None]
  causal = jnp.tril(jnp.ones((num_pads, num_pads), bool))
  to_text = jnp.broadcast_to(proposal.valid[:, None], (batch_size, num_pads, num_nodes))
  to_pads = jnp.broadcast_to(causal, (batch_size, num_pads, num_pads))
  return ExtraNodes(
    tokens=jnp.full((batch_size, num_pads), pad_id, jnp.int32),
    depths=behind + pads,
    mask=jnp.concatenate([to_text, to_pads], axis=2),
    opinions=jnp.broadcast_to(pads, (batch_size, num_pads)),
  )

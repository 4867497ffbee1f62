"""Reflective verification: let the target read its draft once more, and mix both opinions.

Axes: `B` batch, `N` nodes of the proposal, `R` tokens of the reflection prompt, `M = R + N - 1`
extra nodes, `V` vocabulary.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.sampling import warp
from decodax.types import Evidence
from decodax.types import ExtraNodes
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import log_law
from decodax.verifiers.laws import per_row


def reflection_nodes(proposal: Proposal, prompt: jax.Array) -> ExtraNodes:
  """Returns nodes for `prompt` i32[R] after the whole draft, and for a copy of the draft after it.

  The copy continues the sequence: its positions follow the prompt's, and it sees the draft, the
  prompt and itself. The law after a token of the copy is the second opinion on the law after the
  same token of the draft; that of the root is taken after the prompt.
  """
  batch_size, num_nodes = proposal.tokens.shape
  num_prompt, num_copies = prompt.shape[0], num_nodes - 1
  num_drafts = proposal.valid.sum(-1, dtype=jnp.int32) - 1
  num_extra = num_prompt + num_copies
  index = jnp.arange(num_extra)
  before = jnp.broadcast_to(index[None, :] <= index[:, None], (batch_size, num_extra, num_extra))
  draft = jnp.broadcast_to(proposal.valid[:, None], (batch_size, num_extra, num_nodes))
  prompt_tokens = jnp.broadcast_to(prompt, (batch_size, num_prompt)).astype(jnp.int32)
  last_prompt = num_prompt - 1 + jnp.arange(num_nodes, dtype=jnp.int32)
  return ExtraNodes(
    tokens=jnp.concatenate([prompt_tokens, proposal.tokens[:, 1:]], axis=1),
    depths=num_drafts[:, None] + 1 + index.astype(jnp.int32)[None],
    mask=jnp.concatenate([draft, before], axis=2),
    opinions=jnp.broadcast_to(last_prompt, (batch_size, num_nodes)),
  )


def _mix_laws(first, second, weight):
  mixed = jnp.logaddexp(log_law(first) + jnp.log1p(-weight), log_law(second) + jnp.log(weight))
  return jnp.where(weight > 0, mixed, first)


def _mix_logits(first, second, weight):
  return jnp.where(weight > 0, (1 - weight) * first + weight * second, first)


MIXTURES: dict[str, Callable] = {'laws': _mix_laws, 'logits': _mix_logits}


def reflective(
  base: Verifier,
  prompt: Sequence[int] | jax.Array,
  weight: float | jax.Array = 0.3,
  *,
  mixture: str = 'laws',
) -> Verifier:
  """Returns `base` applied to a mixture of the target's law and its law on a second reading.

  One forward pass reads the draft, a reflection prompt, and the draft again. At every node the laws
  after both readings are mixed, `(1 - weight) p + weight p'` or the same on logits, then warped
  by the row's sampling values, and given to the base rule. Prompt and copy are never committed.

  Lossy (the law that is emitted has read the draft). With weight 0 it is the base rule, at the
  price of a wider block: 2 N - 1 + R nodes.

  Args:
    base: any rule that takes chains.
    prompt: the tokens of the reflection prompt, at least one.
    weight: f[] or f[B] in [0, 1], of the second reading; may be traced.
    mixture: 'laws' or 'logits'.

  Raises:
    ValueError: for an empty prompt, a weight outside [0, 1] or an unknown mixture.

  Source: Think Before You Accept: Semantic Reflective Verification for Faster Speculative Decoding,
  arXiv:2505.18629. Its constants are not given here: choose the weight on data.
  """
  tokens = jnp.asarray(prompt, jnp.int32)
  if tokens.ndim != 1 or not tokens.size:
    raise ValueError(f'prompt must be a flat sequence of at least one token: {tokens.shape=}')
  check_knob('weight', weight, 0, 1)
  if mixture not in MIXTURES:
    raise ValueError(f'mixture must be one of {sorted(MIXTURES)}: {mixture=}')

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    del target_logits
    logits = evidence.logits
    mixed = MIXTURES[mixture](logits, evidence.opinions, per_row(weight, logits))
    warped = warp(mixed, evidence.sampling)
    options = {'evidence': evidence._replace(logits=mixed)} if base.needs_evidence else {}
    return base.verify(keys, proposal, warped, max_depth=max_depth, **options)

  return base._replace(
    name=f'reflective_{base.name}',
    exactness='lossy: emits a law that has read the draft',
    verify=verify,
    chains_only=True,
    needs_evidence=True,
    extra_nodes=lambda proposal: reflection_nodes(proposal, tokens),
  )

"""Speculative sampling of a chain: accept by ratio, correct from the residual.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier


def accept_probabilities(proposal: Proposal, target_logits: jax.Array) -> jax.Array:
  """Returns float[B, D], min(1, p(x) / q(x)) of each draft x, 0 where there is none."""
  assert proposal.laws is not None
  drafts = proposal.tokens[:, 1:, None]
  p = _probability_of(target_logits[:, :-1], drafts)
  q = _probability_of(proposal.laws[:, :-1], drafts)
  ratio = jnp.minimum(p, q) / jnp.where(q > 0, q, 1)
  return jnp.where(proposal.valid[:, 1:], ratio, 0)


def residual_law(
  proposal: Proposal, target_logits: jax.Array, num_accepted: jax.Array
) -> jax.Array:
  """Returns float[B, V], the law of the token after num_accepted i32[B] drafts.

  That is norm(max(p - q, 0)) where a draft was rejected and p where there was none. If p and q are
  equal up to rounding, a rejection can only come from rounding; then the law is p.
  """
  p = _law_at(target_logits, num_accepted)
  rejected = jnp.take_along_axis(
    jnp.pad(proposal.valid[:, 1:], ((0, 0), (0, 1))), num_accepted[:, None], axis=1
  )
  q = jnp.where(rejected, _law_at(proposal.laws, num_accepted), 0)
  excess = jnp.maximum(p - q, 0)
  mass = excess.sum(-1, keepdims=True)
  return jnp.where(mass > 1e-9, excess / jnp.where(mass > 1e-9, mass, 1), p)


def verify_speculative(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the longest prefix of accepted drafts, and a token from the residual or bonus law.

  Draft x is accepted with probability min(1, p(x) / q(x)).

  Lossless (law-identical): the output has the target's law if every draft was drawn from its law in
  `proposal.laws`. The expected acceptance is the sum of min(p, q), the most a single draft allows.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, algorithm 1;
  Accelerating LLM Decoding with Speculative Sampling, arXiv:2302.01318, algorithm 2.
  """
  chance = accept_probabilities(proposal, target_logits)
  num_accepted, going = jnp.zeros_like(proposal.tokens[:, 0]), True
  for depth in range(max_depth):
    going &= keys.accepts(chance[:, depth], depth + 1)
    num_accepted += going
  law = residual_law(proposal, target_logits, num_accepted)
  next_token = keys.pick(law, num_accepted + 1)
  path = jnp.broadcast_to(jnp.arange(max_depth + 1, dtype=jnp.int32), proposal.tokens.shape)
  return Verdict(path, num_accepted, next_token)


def _probability_of(logits, tokens):  # float[B, D, V], i32[B, D, 1] -> float[B, D]
  picked = jnp.take_along_axis(logits, tokens, axis=-1)[..., 0]
  return jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))


def _law_at(logits, index):  # float[B, N, V], i32[B] -> float[B, V]
  return jax.nn.softmax(jnp.take_along_axis(logits, index[:, None, None], axis=1)[:, 0], axis=-1)


speculative = Verifier(
  name='speculative',
  exactness='law-identical',
  verify=verify_speculative,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SAMPLED}),
  needs_laws=True,
  chains_only=True,
)

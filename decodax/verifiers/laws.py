"""What the rules for chains are made of: probabilities, residuals, and the walk to a verdict.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary. Laws are given as logits; nothing
here keeps probabilities for all nodes at once.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.sampling import argmax
from decodax.types import Candidates
from decodax.types import Evidence
from decodax.types import Proposal
from decodax.types import Verdict

ONE_DRAFT = frozenset({Candidates.SAMPLED, Candidates.DETERMINISTIC})
"""Chains whose drafts either were drawn from `Proposal.laws` or are certain."""


def log_law(logits: jax.Array) -> jax.Array:
  """Returns the logarithms of the laws of logits float[..., V]; cheap to recompute in a sum."""
  return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def law_at(logits: jax.Array, node: jax.Array) -> jax.Array:
  """Returns float[B, V], the law after each row's node i32[B], from logits float[B, N, V]."""
  return jax.nn.softmax(jnp.take_along_axis(logits, node[:, None, None], axis=1)[:, 0], axis=-1)


def probability_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns float[B, K], the probabilities of tokens i32[B, K] after the first K of N nodes.

  It is 0 for ids outside the vocabulary. Normalizers are computed for all nodes of the logits
  float[B, N, V]: a slice would be a copy.
  """
  nodes = jnp.arange(tokens.shape[1])[None]
  normalizers = jax.nn.logsumexp(logits, axis=-1)
  return jnp.exp(logit_of(logits, tokens, nodes) - normalizers[:, : tokens.shape[1]])


def logit_of(logits: jax.Array, tokens: jax.Array, nodes: jax.Array) -> jax.Array:
  """Returns float[B, K], the logit of each token i32[B, K] after its node i32[B, K].

  It is -inf for ids outside the vocabulary.
  """
  rows = jnp.arange(tokens.shape[0])[:, None]
  known = (tokens >= 0) & (tokens < logits.shape[-1])
  return jnp.where(known, logits[rows, nodes, jnp.where(known, tokens, 0)], -jnp.inf)


def draft_probabilities(
  proposal: Proposal, target_logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns (p, q), each float[B, D]: what target and drafter give to each draft of a chain.

  A draft without a law is certain: its q is 1.
  """
  drafts = proposal.tokens[:, 1:]
  p = probability_of(target_logits, drafts)
  return p, jnp.ones_like(p) if proposal.laws is None else probability_of(proposal.laws, drafts)


def accept_probabilities(proposal: Proposal, target_logits: jax.Array) -> jax.Array:
  """Returns float[B, D], min(1, p(x) / q(x)) of each draft x of a chain, 0 where there is none."""
  return capped_ratio(*draft_probabilities(proposal, target_logits), proposal)


def capped_ratio(p: jax.Array, q: jax.Array, proposal: Proposal) -> jax.Array:
  """Returns float[B, D], min(1, p / q) for p and q float[B, D]; 0 where a chain has no draft."""
  ratio = jnp.minimum(p, q) / jnp.where(q > 0, q, 1)
  return jnp.where(proposal.valid[:, 1:], ratio, 0)


def has_draft(proposal: Proposal, node: jax.Array) -> jax.Array:
  """Returns bool[B]: does the chain go on after each row's node i32[B]?"""
  followed = jnp.pad(proposal.valid[:, 1:], ((0, 0), (0, 1)))
  return jnp.take_along_axis(followed, node[:, None], axis=1)[:, 0]


def draft_law_at(proposal: Proposal, node: jax.Array, like: jax.Array) -> jax.Array:
  """Returns float[B, V] like `like`: the law of the draft after each row's node i32[B].

  All zeros where a chain has none; a point mass if the proposal holds no laws.
  """
  if proposal.laws is None:
    child = jnp.minimum(node + 1, proposal.tokens.shape[1] - 1)
    token = jnp.take_along_axis(proposal.tokens, child[:, None], axis=1)[:, 0]
    law = jax.nn.one_hot(token, like.shape[-1], dtype=like.dtype)
  else:
    law = law_at(proposal.laws, node)
  return jnp.where(has_draft(proposal, node)[:, None], law, 0)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns float[B, V], norm(max(p - q, 0)), for p and q float[B, V] of any mass.

  With q = 0 that is norm(p). It is norm(p) too where nothing is left of p: then only rounding can
  have led here.
  """
  excess = jnp.maximum(p - q, 0)
  excess = jnp.where(jnp.any(excess > 0, axis=-1, keepdims=True), excess, p)
  return excess / excess.sum(-1, keepdims=True)


def residual_law(
  proposal: Proposal, target_logits: jax.Array, num_accepted: jax.Array
) -> jax.Array:
  """Returns float[B, V], the law of the token after num_accepted i32[B] drafts of a chain.

  That is norm(max(p - q, 0)) where a draft was rejected and p where there was none.
  """
  p = law_at(target_logits, num_accepted)
  return residual(p, draft_law_at(proposal, num_accepted, p))


def accept_prefix(keys: RoundKeys, chance: jax.Array) -> jax.Array:
  """Returns i32[B], how many drafts are accepted, one after the other, before the first that fails.

  Args:
    keys: decides.
    chance: float[B, D], the probability of accepting each draft if all before it were.
  """
  num_accepted = jnp.zeros(chance.shape[:1], jnp.int32)
  for depth in range(chance.shape[1]):
    tested = jnp.where(num_accepted == depth, chance[:, depth], 0)
    num_accepted += keys.accepts(tested, depth + 1)
  return num_accepted


def longest_prefix(accepted: jax.Array) -> jax.Array:
  """Returns i32[B], the number of leading True in accepted bool[B, D]."""
  return jnp.cumprod(accepted, axis=-1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)


def chain_verdict(num_accepted: jax.Array, next_token: jax.Array, max_depth: int) -> Verdict:
  """Returns the verdict that keeps the first num_accepted i32[B] drafts of a chain."""
  path = jnp.arange(max_depth + 1, dtype=jnp.int32)
  path = jnp.broadcast_to(path, (num_accepted.shape[0], max_depth + 1))
  return Verdict(path, num_accepted, next_token)


def only_best(logits: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns logits float[B, V] with all but the first largest at -inf, in rows bool[B]."""
  index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.where(rows[:, None] & (index != argmax(logits)[:, None]), -jnp.inf, logits)


def compared_logits(node: jax.Array, target_logits: jax.Array, evidence: Evidence) -> jax.Array:
  """Returns float[B, V], the law after node i32[] of float[B, N, V] to hold against the draft's.

  It is the law tokens are drawn from; in rows at temperature 0, where that is a point mass, the law
  at temperature 1.
  """
  greedy = evidence.sampling.temperature == 0
  return jnp.where(greedy[:, None], evidence.logits[:, node], target_logits[:, node])


def bend_nodes(
  bend_fn: Callable[[jax.Array, jax.Array], jax.Array],
  proposal: Proposal,
  target_logits: jax.Array,
  evidence: Evidence,
) -> jax.Array:
  """Returns float[B, N, V], the target's logits with bent ones after every node that has a draft.

  One node is bent after the other, so that what it takes stays small. Rows at temperature 0 are
  bent at temperature 1 and left with their argmax.

  Args:
    bend_fn: (logits of p, logits of q), each float[B, V], to the bent logits.
    proposal: a chain with laws.
    target_logits: float[B, N, V], warped.
    evidence: with the target's logits before that.
  """
  greedy, laws = evidence.sampling.temperature == 0, proposal.laws
  assert laws is not None

  def bend(node, logits):
    compared = compared_logits(node, target_logits, evidence)
    bent = only_best(bend_fn(compared, laws[:, node]), greedy)
    drafted = proposal.valid[:, node + 1]
    return logits.at[:, node].set(jnp.where(drafted[:, None], bent, logits[:, node]))

  return lax.fori_loop(0, proposal.tokens.shape[1] - 1, bend, target_logits)


def per_row(knob, like: jax.Array) -> jax.Array:
  """Returns a knob, float[] or float[B], with the dtype of like[B, ...] and ready to combine."""
  return jnp.asarray(knob, like.dtype).reshape((-1,) + (1,) * (like.ndim - 1))


def check_knob(name: str, value, low: float, high: float) -> None:
  """Checks low <= value <= high, where the value is known; a traced one is the caller's affair.

  Raises:
    ValueError: if it is not.
  """
  if isinstance(value, (int, float)) and not low <= value <= high:
    raise ValueError(f'{name} must be in [{low}, {high}]: {value!r}')

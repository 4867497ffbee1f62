"""k-SEQ: accept independent drafts by one common ratio, damped just enough to stay lossless.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.trees import children_of
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import law_at
from decodax.verifiers.laws import residual
from decodax.verifiers.siblings import SiblingRule
from decodax.verifiers.siblings import divide
from decodax.verifiers.siblings import draft_law_at
from decodax.verifiers.siblings import of_tokens
from decodax.verifiers.siblings import select_rows
from decodax.verifiers.siblings import walk_siblings

_MAX_STEPS = 60  # Newton takes about six; bisection alone would need as many as a float has bits


class _Node(NamedTuple):
  p: jax.Array  # float[B, V]
  q: jax.Array  # float[B, V]
  rho: jax.Array  # float[B] the factor
  damping: jax.Array  # float[B] acceptance of the node over that of one draft; 0 without children


class _Search(NamedTuple):
  low: jax.Array  # float[B]
  high: jax.Array  # float[B]
  trial: jax.Array  # float[B] what to look at next
  rho: jax.Array  # float[B] what was looked at last
  beta: jax.Array  # float[B] there
  found: jax.Array  # bool[B]


def factor(p: jax.Array, q: jax.Array, num_drafts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns float[B] and float[B]: the factor rho of k-SEQ, and one draft's acceptance beta.

  rho in [1, k] solves 1 - (1 - beta)^k = rho beta, where beta = sum of min(q, p / rho). The left
  side minus the right falls in rho, so Newton's steps are kept inside a shrinking bracket; each
  costs one pass over the vocabulary.

  Args:
    p: float[B, V], the target's law.
    q: float[B, V], the draft's law.
    num_drafts: i32[B], k, at least 1.

  Source: SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv:2310.15141, the equation
  that fixes the factor of k-SEQ.
  """
  k = num_drafts.astype(p.dtype)
  precision = jnp.finfo(p.dtype).eps

  def narrow(search: _Search) -> _Search:
    rho = search.trial
    fits = rho[:, None] * q <= p
    certain = jnp.where(fits, q, 0).sum(-1)
    covered = jnp.where(fits, 0, p).sum(-1)
    beta = jnp.minimum(certain + covered / rho, 1)
    others_refused = (1 - beta) ** (k - 1)
    gap = 1 - (1 - beta) * others_refused - rho * beta
    low = jnp.where(gap > 0, rho, search.low)
    high = jnp.where(gap > 0, search.high, rho)
    newton = rho + divide(gap, certain + k * others_refused * covered / rho**2)
    inside = (newton > low) & (newton < high)
    # A gap of this size is what rounding makes of zero.
    found = (jnp.abs(gap) <= 32 * precision * k) | (high - low <= precision * high)
    trial = jnp.where(inside, newton, (low + high) / 2)
    return select_rows(search.found, search, _Search(low, high, trial, rho, beta, found))

  def searching(carry):
    step, search = carry
    return (step < _MAX_STEPS) & ~jnp.all(search.found)

  ones = jnp.ones_like(k)
  start = _Search(ones, k, ones, ones, ones, jnp.zeros(k.shape, bool))
  _, end = lax.while_loop(searching, lambda c: (c[0] + 1, narrow(c[1])), (jnp.int32(0), start))
  return end.rho, end.beta


def verify_kseq(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path of accepted children and the token that ends it.

  Each of the k children of a node is accepted with probability min(1, p(x) / (rho q(x))), rho
  being that of `factor`. If all are refused, the token is drawn from
  norm(p - min(q, p / rho) (1 - (1 - beta)^k) / beta).

  Lossless (law-identical): the output has the target's law if all children of a node were drawn
  independently from its law in `proposal.laws`, f[B, N, V] logits, and their number was settled
  before the first was drawn. Acceptance is 1 - (1 - beta)^k, at least 1 - 1/e of the optimum.

  Source: SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv:2310.15141, k-SEQ.
  """
  laws = proposal.laws
  assert laws is not None

  def enter(node):
    num_drafts = children_of(proposal, node).sum(-1)
    p, q = law_at(target_logits, node), draft_law_at(laws, node)
    k = jnp.maximum(num_drafts, 1)
    rho, beta = factor(p, q, k)
    accepted = 1 - (1 - beta) ** k.astype(p.dtype)
    # The limit of the quotient where beta is so small that rounding takes all of `accepted`.
    damping = jnp.minimum(jnp.where(beta > 0, divide(accepted, beta), 0), rho)
    return _Node(p, q, rho, jnp.where(num_drafts > 0, damping, 0))

  def weigh(state, child, token):
    del child
    chance = divide(of_tokens(state.p, token), state.rho * of_tokens(state.q, token))
    return jnp.minimum(chance, 1), state

  def law(state):
    used = jnp.minimum(state.q, state.p / state.rho[:, None])
    return residual(state.p, state.damping[:, None] * used)

  rule = SiblingRule(enter, weigh, reject=lambda state, token, rejected: state, law=law)
  return walk_siblings(rule, keys, proposal, max_depth=max_depth)


kseq = Verifier(
  name='kseq',
  exactness='law-identical',
  verify=verify_kseq,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SAMPLED, Candidates.IID}),
  needs_laws=True,
)

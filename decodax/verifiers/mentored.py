"""Mentored decoding: the law closest to the draft's within a budget of divergence from the target.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

import jax
from jax import lax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Evidence
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import bend_nodes
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import log_law
from decodax.verifiers.laws import per_row
from decodax.verifiers.speculative import verify_speculative

_MAX_SETTLE_STEPS = 60


def mentored_logits(
  target_logits: jax.Array, draft_logits: jax.Array, budget: jax.Array
) -> jax.Array:
  """Returns float[..., V], logits of the law r with most overlap with q and KL(p || r) <= budget.

  That law is `r = clip(q, a p, b p)` with 0 <= a <= 1 <= b; tokens that p excludes stay excluded.
  For every b there is one a for which r sums to 1, and the divergence grows with b. So t = 1 / b is
  bisected in [0, 1], and for each t the factor a falls to its value in a few steps. Where the
  budget exceeds KL(p || q), r is q.

  Args:
    target_logits: float[..., V] of p.
    draft_logits: float[..., V] of q.
    budget: float[...] in nats.
  """
  log_p, log_q = log_law(target_logits), log_law(draft_logits)
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  cost = jnp.where(p > 0, p * (log_p - log_q), 0)  # of emitting q as it is

  def try_bound(t, bracket):
    low, high, a = bracket  # a is the lower factor at `high`, so above the one at t
    lower = _settle(p, _below(p, q, t), a)
    fits = _divergence(p, q, cost, lower, t) <= budget
    return jnp.where(fits, low, t), jnp.where(fits, t, high), jnp.where(fits, lower, a)

  def halve(_, bracket):
    return try_bound((bracket[0] + bracket[1]) / 2, bracket)

  zeros, ones = jnp.zeros_like(budget), jnp.ones_like(budget)
  bracket = try_bound(zeros, (zeros, ones, ones))
  _, t, a = lax.fori_loop(0, jnp.finfo(p.dtype).nmant, halve, bracket)
  return jnp.log(jnp.maximum(_below(p, q, t), a[..., None] * p))


def _below(p, q, t):
  """Returns min(q, p / t), float[..., V]; t = 0 lifts the bound where p > 0."""
  t = t[..., None]
  bound = jnp.where(t > 0, p / jnp.where(t > 0, t, 1), jnp.inf)
  return jnp.where(p > 0, jnp.minimum(q, bound), 0)


def _settle(p, free, a):
  """Returns float[...], the largest a with sum(max(free, a p)) = 1, coming down from a above it.

  Every step solves the sum for a with the set of tokens at a p held fixed. The sum is convex in a,
  so this is Newton's method from the right: it never overshoots and ends exactly.
  """

  def step(carry):
    index, a, falling = carry
    at_bound = free <= a[..., None] * p
    bound_mass = jnp.sum(jnp.where(at_bound, p, 0), axis=-1)
    free_mass = jnp.sum(jnp.where(at_bound, 0, free), axis=-1)
    lower = jnp.maximum(1 - free_mass, 0) / jnp.where(bound_mass > 0, bound_mass, 1)
    falling = falling & (bound_mass > 0) & (lower < a)
    return index + 1, jnp.where(falling, lower, a), falling

  def unsettled(carry):
    return (carry[0] < _MAX_SETTLE_STEPS) & jnp.any(carry[-1])

  start = (jnp.int32(0), a, jnp.ones(a.shape, bool))
  return lax.while_loop(unsettled, step, start)[1]


def _divergence(p, q, cost, a, t):
  """Returns float[...], KL(p || r): each token costs at its lower bound, its upper one, or as q."""
  lower, upper = a[..., None] * p, p / jnp.where(t > 0, t, 1)[..., None]
  at_lower = _below(p, q, t) <= lower
  at_upper = (q > upper) & (t > 0)[..., None]
  lower_mass = jnp.sum(jnp.where(at_lower, p, 0), axis=-1)
  upper_mass = jnp.sum(jnp.where(at_upper & ~at_lower, p, 0), axis=-1)
  between = jnp.sum(jnp.where(at_lower | at_upper, 0, cost), axis=-1)
  lower_cost = jnp.where(lower_mass > 0, -lower_mass * jnp.log(a), 0)
  return lower_cost + between + upper_mass * jnp.log(jnp.where(t > 0, t, 1))


def mentored(budget: float | jax.Array = 0.1) -> Verifier:
  """Returns the verifier of speculative sampling towards r, the target's law bent to the draft's.

  At every position with a draft the output follows the law r with the largest overlap with q, hence
  the largest acceptance, of all laws for which KL(p || r) is at most the budget and that emit no
  token that p excludes: see `mentored_logits`. In rows at temperature 0 r is computed at
  temperature 1, and its argmax is the token.

  Lossy (each position may stray by the budget from the target). With budget 0 r is p: lossless.

  Args:
    budget: f[] or f[B], nats per drafted token; may be traced.

  Raises:
    ValueError: if it is negative.

  Source: Vivien Tran-Thien, An optimal lossy variant of speculative decoding (2023), with the
  divergence taken as KL(p || r); the closed form of r is our own.
  """
  check_knob('budget', budget, 0, float('inf'))

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    def bend(p, q):
      return mentored_logits(p, q, jnp.broadcast_to(per_row(budget, p[:, 0]), p.shape[:1]))

    bent = bend_nodes(bend, proposal, target_logits, evidence)
    return verify_speculative(keys, proposal, bent, max_depth=max_depth)

  return Verifier(
    name='mentored',
    exactness='lossy: emits a law within a KL budget of the target',
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=frozenset({Candidates.SAMPLED}),
    needs_laws=True,
    chains_only=True,
    needs_evidence=True,
  )

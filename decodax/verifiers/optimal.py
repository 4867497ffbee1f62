"""The most that independent drafts allow: choose one of them so that as much as can be is kept.

A choice among the k drafts of a node, made by their tokens, turns the law q of a single draft into
another law s, and the chosen draft is then verified against s as if it were the only one. The
acceptance is the sum of min(p, s), and choices exist for which it is the optimum.

Let tokens lie on [0, 1] in rising order of p / q, each on a stretch of length q. To choose the
draft that is furthest right gives s on the stretch from a to b the mass b^k - a^k, and every choice
leaves to [0, t] at least t^k. The best s is p, raised at the left and lowered at the right just
enough that its mass on [0, t] is never less. It is reached by giving drafts random places: tokens
that get too little change places, now and then, with tokens that get too much.

Tokens are sorted into G bins by p / (p + q), and all of a bin share one s / q. That costs at most
about (k + 1) / (2 G) of the acceptance, and nothing of the exactness.

Axes: `B` batch, `N` nodes, `V` vocabulary, `G` bins.
"""

import functools
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
from decodax.verifiers.siblings import divide
from decodax.verifiers.siblings import draft_law_at
from decodax.verifiers.siblings import share_rule
from decodax.verifiers.siblings import walk_siblings


class Plan(NamedTuple):
  """How to choose among k drafts, by the bins of their tokens in rising order of p / q."""

  q_mass: jax.Array  # float[B, G]
  slope: jax.Array  # float[B, G] s / q of the bin's place, were the furthest right chosen
  ratio: jax.Array  # float[B, G] s / q of the bin's tokens
  gives: jax.Array  # float[B, G] cumulative: what bins that get too much have to give, in s
  takes: jax.Array  # float[B, G] cumulative: what bins that get too little have to take


def plan_choice(p_mass: jax.Array, q_mass: jax.Array, num_drafts: jax.Array) -> Plan:
  """Returns the plan whose chosen draft has the law s of largest overlap with p.

  Args:
    p_mass: float[B, G], the target's law summed over bins, in rising order of p / q.
    q_mass: float[B, G], likewise the law of each draft.
    num_drafts: i32[B], k, at least 1.

  Source: the optimum is that of Towards Optimal Multi-draft Speculative Decoding,
  arXiv:2502.18779; to choose and then verify is Multi-Draft Speculative Sampling: Canonical
  Decomposition and Theoretical Limits, arXiv:2410.18234. The plan is our own.
  """
  k = num_drafts[:, None].astype(q_mass.dtype)
  q_right = jnp.minimum(jnp.cumsum(q_mass, axis=-1), 1)
  q_left = jnp.maximum(q_right - q_mass, 0)
  p_right = jnp.cumsum(p_mass, axis=-1)
  furthest = q_mass * _power_slope(q_left, q_right, k)
  # What the tokens up to here must get beyond p: raised going right, lowered going left.
  short = jnp.maximum(q_right**k - p_right, 0).at[:, -1].set(0)
  raised = jnp.minimum(lax.cummax(short, axis=1), lax.cummax(short, axis=1, reverse=True))
  chosen = jnp.clip(p_mass + jnp.diff(raised, prepend=0, axis=-1), 0, k * q_mass)
  # Between two places where no more can be had, rounding must not make bins exchange anything.
  tight = ((raised == short) & (short > 0)).at[:, -1].set(True)
  tight_before = jnp.concatenate([jnp.ones_like(tight[:, :1]), tight[:, :-1]], axis=1)
  chosen = jnp.where(tight & tight_before, furthest, chosen)
  return Plan(
    q_mass=q_mass,
    slope=divide(furthest, q_mass),
    ratio=divide(chosen, q_mass),
    gives=jnp.cumsum(jnp.maximum(furthest - chosen, 0), axis=-1),
    takes=jnp.cumsum(jnp.maximum(chosen - furthest, 0), axis=-1),
  )


def choice_probabilities(plan: Plan, bins: jax.Array, drafts: jax.Array) -> jax.Array:
  """Returns float[B, N], the probability that each draft is chosen, 0 for what is none.

  Args:
    plan: see `plan_choice`.
    bins: i32[B, N], the bin of each node's token.
    drafts: bool[B, N], which nodes are the drafts.
  """
  place = _place_laws(plan, bins)  # [B, N, G]
  upto = jnp.where(drafts[:, :, None], jnp.cumsum(place, axis=-1), 1)
  below = jnp.where(drafts[:, :, None], upto - place, 1)
  # Of drafts at the same place the first is chosen.
  first = jnp.cumprod(below, axis=1)
  later = lax.cumprod(upto, axis=1, reverse=True)
  ahead = jnp.concatenate([jnp.ones_like(first[:, :1]), first[:, :-1]], axis=1)
  behind = jnp.concatenate([later[:, 1:], jnp.ones_like(later[:, :1])], axis=1)
  return jnp.where(drafts, (place * ahead * behind).sum(-1), 0)


def _power_slope(left, right, k):
  """Returns (right^k - left^k) / (right - left), without cancellation."""
  step = divide(right - left, right)
  safe = jnp.minimum(step, 1 - jnp.finfo(step.dtype).epsneg)
  grown = jnp.where(step < 1, -jnp.expm1(k * jnp.log1p(-safe)), 1)
  return divide(right**k * grown, right - left)


def _place_laws(plan: Plan, bins: jax.Array) -> jax.Array:
  """Returns float[B, N, G], where drafts with tokens of these bins i32[B, N] are placed.

  Bins that take are served by bins that give, in order. A bin a that takes x of s from a bin b
  changes places with it for x / (slope_b - slope_a) of their mass; since slopes and ratios rise, no
  bin is asked for more than it has, and every place keeps its mass.
  """

  def of_bins(values):  # [B, G] -> [B, N, 1]
    return jnp.take_along_axis(values, bins, axis=1)[:, :, None]

  def served(ends, others):  # what each node's bin has in common with each bin
    starts, other_starts = _shift(ends), _shift(others)
    right = jnp.minimum(of_bins(ends), others[:, None, :])
    left = jnp.maximum(of_bins(starts), other_starts[:, None, :])
    return jnp.maximum(right - left, 0)

  exchanged = served(plan.takes, plan.gives) + served(plan.gives, plan.takes)
  distance = jnp.abs(plan.slope[:, None, :] - of_bins(plan.slope))
  moved = divide(exchanged, distance * of_bins(plan.q_mass))
  total = moved.sum(-1, keepdims=True)
  moved = moved / jnp.maximum(total, 1)  # against rounding
  own = jax.nn.one_hot(bins, plan.slope.shape[1], dtype=moved.dtype)
  return moved + own * jnp.maximum(1 - total, 0)


def _shift(ends):
  return jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)


def _bin_of(p: jax.Array, q: jax.Array, num_bins: int) -> jax.Array:
  """Returns i32[B, V], the bin of each token."""
  share = divide(p, p + q)
  return jnp.minimum((share * num_bins).astype(jnp.int32), num_bins - 1)


def optimal(*, num_bins: int = 512) -> Verifier:
  """Returns the rule with the highest acceptance that independent drafts allow.

  At each node one of its children is chosen, and the chosen child x is kept with probability
  min(1, p(x) / s(x)), where s is the law of the choice; else the token is drawn from
  norm(max(p - s, 0)), which may be another child. The children are tried by their shares of the
  law that this makes of the drafts at hand, so neither choice nor places are ever drawn.

  Lossless (law-identical): the output has the target's law if all children of a node were drawn
  independently from its law in `Proposal.laws`, f[B, N, V] logits, and their number was settled
  before the first was drawn. The acceptance of k children is within about (k + 1) / (2 num_bins)
  of the optimum, 1 + min over sets H of p(H) - q(H)^k, and as a rule far closer.

  Args:
    num_bins: G. A visited node takes O(V + N G) time; bins hold O(N G) numbers a row.

  Raises:
    ValueError: if num_bins < 1.

  Source: the optimum is that of Towards Optimal Multi-draft Speculative Decoding,
  arXiv:2502.18779; to choose and then verify is Multi-Draft Speculative Sampling: Canonical
  Decomposition and Theoretical Limits, arXiv:2410.18234. How to choose is our own.
  """
  if num_bins < 1:
    raise ValueError(f'num_bins must be at least 1: {num_bins=}')

  def verify(
    keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
  ) -> Verdict:
    rule = share_rule(functools.partial(_settle, proposal, target_logits, num_bins))
    return walk_siblings(rule, keys, proposal, max_depth=max_depth)

  return Verifier(
    name='optimal',
    exactness='law-identical',
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=frozenset({Candidates.SAMPLED, Candidates.IID}),
    needs_laws=True,
  )


def _settle(proposal: Proposal, target_logits: jax.Array, num_bins: int, node: jax.Array):
  """Returns float[B, V], the law of the token after node i32[B], given the drafts there."""
  assert proposal.laws is not None
  rows, tokens = jnp.arange(node.shape[0])[:, None], proposal.tokens
  drafts = children_of(proposal, node)
  p, q = law_at(target_logits, node), draft_law_at(proposal.laws, node)
  plan, bins, chosen = _choose(p, q, jnp.maximum(drafts.sum(-1), 1), num_bins)
  chosen = jnp.where(drafts.any(-1, keepdims=True), chosen, 0)
  chance = jnp.minimum(divide(p[rows, tokens], chosen[rows, tokens]), 1)
  kept = choice_probabilities(plan, bins[rows, tokens], drafts) * chance
  rest = jnp.maximum(1 - kept.sum(-1, keepdims=True), 0)
  return (rest * residual(p, chosen)).at[rows, tokens].add(kept)


def _choose(p, q, num_drafts, num_bins):
  """Returns (the plan, bin of each token i32[B, V], law of the chosen draft float[B, V])."""
  bins = _bin_of(p, q, num_bins)
  place = (
    bins + jnp.arange(p.shape[0])[:, None] * num_bins
  )  # one index gathers twice as fast as two
  empty = jnp.zeros((p.shape[0] * num_bins,), p.dtype)
  p_mass, q_mass = (empty.at[place].add(law).reshape(-1, num_bins) for law in (p, q))
  plan = plan_choice(p_mass, q_mass, num_drafts)
  return plan, bins, q * plan.ratio.reshape(-1)[place]


def optimal_acceptance(
  p: jax.Array, q: jax.Array, num_drafts: int, *, num_bins: int = 512
) -> jax.Array:
  """Returns float[B], how often `optimal` keeps one of k independent drafts.

  Args:
    p: float[B, V], the target's law.
    q: float[B, V], the law of each draft.
    num_drafts: k, at least 1.
    num_bins: as given to `optimal`.
  """
  _, _, chosen = _choose(p, q, jnp.full(p.shape[:1], num_drafts), num_bins)
  return jnp.minimum(p, chosen).sum(-1)

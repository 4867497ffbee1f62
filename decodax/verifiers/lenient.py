"""Lenient speculative sampling: accept more than the ratio allows, within a bound.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.types import Evidence
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import ONE_DRAFT
from decodax.verifiers.laws import accept_prefix
from decodax.verifiers.laws import capped_ratio
from decodax.verifiers.laws import chain_verdict
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import draft_law_at
from decodax.verifiers.laws import draft_probabilities
from decodax.verifiers.laws import law_at
from decodax.verifiers.laws import per_row
from decodax.verifiers.laws import probability_of
from decodax.verifiers.laws import residual


class LenienceFunction(NamedTuple):
  """How the target's probability is raised before it is compared with the draft's."""

  raised: Callable[[jax.Array, jax.Array], jax.Array]  # (p, leniency) -> at least p
  lowered: Callable[[jax.Array, jax.Array], jax.Array]  # its inverse: (q, leniency) -> at most q


FUNCTIONS = {
  'linear': LenienceFunction(lambda p, e: p / e, lambda q, e: q * e),
  'squared': LenienceFunction(lambda p, e: p / e**2, lambda q, e: q * e**2),
  'exponential': LenienceFunction(lambda p, e: p**e, lambda q, e: q ** (1 / e)),
}


def lenient(leniency: float | jax.Array = 0.8, *, function: str = 'linear') -> Verifier:
  """Returns the verifier that accepts draft x with probability min(1, f(p(x)) / q(x)).

  f raises p: p / leniency ('linear'), p / leniency^2 ('squared') or p^leniency ('exponential').
  After a rejection the token is drawn from norm(max(p - g(q), 0)), where g undoes f. A position
  with a draft then emits `min(q, f(p)) + (1 - sum min(q, f(p))) norm(max(p - g(q), 0))`;
  `decodax.theory.lenient_output` gives that law and its distance from p for the linear function,
  which makes no token more likely than p / leniency.

  At temperature 0 the law of the next token is a point mass, and no ratio to it can be lenient.
  Leniency is then measured on the model's own law, at temperature 1 and without top-k and the like:
  a draft passes if it is the argmax or if f(p(x)) > max p, and the argmax follows a rejection.

  Lossy (sampling strays from the target by the law above, greedy decoding emits near-best tokens).
  With leniency 1 it is speculative sampling, or greedy verification: lossless.

  Args:
    leniency: f[] or f[B] in (0, 1]; may be traced.
    function: 'linear', 'squared' or 'exponential'.

  Raises:
    ValueError: for a leniency outside (0, 1], or an unknown function.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, appendix A.5;
  DistillSpec, arXiv:2310.08461, lenience functions (what follows a rejection under the non-linear
  ones, and the rule at temperature 0, are our own).
  """
  check_knob('leniency', leniency, 1e-6, 1)
  if function not in FUNCTIONS:
    raise ValueError(f'function must be one of {sorted(FUNCTIONS)}: {function=}')
  raised, lowered = FUNCTIONS[function]

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    p, q = draft_probabilities(proposal, target_logits)
    chance = capped_ratio(raised(p, per_row(leniency, p)), q, proposal)
    own, best = _own_probabilities(proposal, evidence.logits)
    passes = (p > 0) | (raised(own, per_row(leniency, own)) > best)  # p is 1 at the argmax, else 0
    greedy_chance = jnp.where(passes & proposal.valid[:, 1:], 1, 0)
    greedy = evidence.sampling.temperature[:, None] == 0
    num_accepted = accept_prefix(keys, jnp.where(greedy, greedy_chance, chance))
    p = law_at(target_logits, num_accepted)
    q = draft_law_at(proposal, num_accepted, p)
    law = residual(p, lowered(q, per_row(leniency, q)))
    return chain_verdict(num_accepted, keys.pick(law, num_accepted + 1), max_depth)

  return Verifier(
    name='lenient' if function == 'linear' else f'lenient_{function}',
    exactness='lossy: keeps drafts beyond their ratio; at temperature 0, near-best ones',
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=ONE_DRAFT,
    needs_laws=True,
    chains_only=True,
    needs_evidence=True,
  )


def _own_probabilities(proposal, logits):
  """Returns float[B, D] twice: the probability of each draft, and the largest one in its place."""
  largest = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
  return probability_of(logits, proposal.tokens[:, 1:]), largest[:, :-1]

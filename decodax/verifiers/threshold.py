"""Candidates that are certain, accepted by their share of p, with thresholds that accept more.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import law_at
from decodax.verifiers.siblings import share_rule
from decodax.verifiers.siblings import walk_siblings


def threshold(
  *, threshold_single: jax.Array | float = 1.0, threshold_total: jax.Array | float = 1.0
) -> Verifier:
  """Returns the rule that accepts a child where one coin falls into its share of the law.

  The shares p(x) of a node's children lie side by side; the coin is uniform in [0, 1). Shares are
  stretched by 1 / threshold_total, and a child with p(x) >= threshold_single is accepted whatever
  the coin. If no child is accepted, the next token is drawn from p without them.

  Lossy (law-identical only with both thresholds at 1): children are emitted more often than p has
  it, up to p(x) / threshold_total below the first threshold. Exact use of certain candidates at
  the same acceptance is `coupled`.

  Args:
    threshold_single: f[] in [0, 1], may be traced.
    threshold_total: f[] in (0, 1], may be traced.

  Raises:
    ValueError: if a threshold is out of range.

  Source: SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based
  Speculative Inference and Verification, arXiv:2305.09781, for trees of certain candidates; the
  thresholds are those of the tree sampling in the SGLang serving engine.
  """
  check_knob('threshold_single', threshold_single, 0, 1)
  check_knob('threshold_total', threshold_total, 1e-6, 1)

  def verify(
    keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
  ) -> Verdict:
    rule = share_rule(
      lambda node: law_at(target_logits, node),
      threshold_single=threshold_single,
      threshold_total=threshold_total,
    )
    return walk_siblings(rule, keys, proposal, max_depth=max_depth)

  return Verifier(
    name='threshold',
    exactness='lossy: likely children are emitted more often, up to p / threshold_total',
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=frozenset({Candidates.NONE, Candidates.DETERMINISTIC}),
  )

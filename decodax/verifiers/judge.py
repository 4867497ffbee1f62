"""Judged verification: a draft that a judge finds good enough is kept, matching or not.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Evidence
from decodax.types import Proposal
from decodax.types import PyTree
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.divergence import chain_divergences
from decodax.verifiers.laws import ONE_DRAFT
from decodax.verifiers.laws import accept_prefix
from decodax.verifiers.laws import accept_probabilities
from decodax.verifiers.laws import chain_verdict
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row
from decodax.verifiers.laws import residual_law

ScoreFn = Callable[[PyTree, Evidence, Proposal, jax.Array], jax.Array]
"""(judge_params, evidence, proposal, target_logits f[B, N, V]) -> f[B, N], how acceptable the token
of each node is. `evidence.output` has what the target made of it: hidden states and features."""


def linear_score(
  judge_params: tuple[jax.Array, jax.Array],
  evidence: Evidence,
  proposal: Proposal,
  target_logits: jax.Array,
) -> jax.Array:
  """Returns f[B, N], sigmoid(hidden . weight + bias) of the target's state after each token.

  Args:
    judge_params: (weight f[hidden], bias f[]).
    evidence: what the target saw.
    proposal: the draft.
    target_logits: not used.

  Source: Judge Decoding, arXiv:2501.19309, section 3.
  """
  del proposal, target_logits
  weight, bias = judge_params
  return jax.nn.sigmoid(evidence.output.hidden @ weight + bias)


def judge(
  score_fn: ScoreFn = linear_score, threshold: float | jax.Array = 0.5, *, name: str = 'judge'
) -> Verifier:
  """Returns the verifier that keeps a draft if speculative sampling does, or if the judge likes it.

  Draft x passes surely if its score is above the threshold, else with probability
  min(1, p(x) / q(x)), which is greedy verification at temperature 0. The token after the first
  rejection is drawn from norm(max(p - q, 0)), at temperature 0 the argmax of p.

  Lossy (what the judge likes is emitted whether or not the target would have drawn it). With a
  threshold at or above the largest score it is speculative sampling: lossless.

  Args:
    score_fn: the judge; its parameters are `Params.verifier`. It sees every draft's own position,
      so the state the target reaches after reading the draft.
    threshold: f[] or f[B], on the scale of the scores; may be traced.
    name: of the verifier.

  Source: Judge Decoding, arXiv:2501.19309, section 3; AutoJudge, arXiv:2504.20039. Both decode
  greedily; the rule above temperature 0 is our own.
  """

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    score = score_fn(evidence.params.verifier, evidence, proposal, target_logits)
    if score.shape != proposal.tokens.shape:
      raise ValueError(f'score_fn must return [B, N] = {proposal.tokens.shape}: {score.shape=}')
    liked = (score > per_row(threshold, score))[:, 1:] & proposal.valid[:, 1:]
    chance = accept_probabilities(proposal, target_logits)
    num_accepted = accept_prefix(keys, jnp.where(liked, 1, chance))
    law = residual_law(proposal, target_logits, num_accepted)
    return chain_verdict(num_accepted, keys.pick(law, num_accepted + 1), max_depth)

  return Verifier(
    name=name,
    exactness='lossy: keeps what the judge likes, whatever the target would have drawn',
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=ONE_DRAFT,
    needs_laws=True,
    chains_only=True,
    needs_evidence=True,
  )


def divergence_judge(threshold: float | jax.Array = 0.1, *, metric: str = 'kl') -> Verifier:
  """Returns a judge that needs no training: it likes drafts whose laws p and q are close.

  A draft passes if the divergence is below the threshold, else as in speculative sampling. `fuzzy`
  compares the same laws, and rejects all other drafts.

  Lossy (where the laws are close the draft's is emitted). With threshold 0 it is speculative
  sampling: lossless.

  Args:
    threshold: f[] or f[B], in nats; may be traced.
    metric: see `decodax.verifiers.divergence`.

  Raises:
    ValueError: for a negative threshold.

  Source: Revisiting Judge Decoding from First Principles via Training-Free Distributional
  Divergence, arXiv:2601.04766.
  """
  check_knob('threshold', threshold, 0, float('inf'))

  def closeness(judge_params, evidence, proposal, target_logits):
    del judge_params
    distance = chain_divergences(proposal, target_logits, evidence, metric)
    return -jnp.pad(distance, ((0, 0), (1, 0)))  # the law at a node judges its child

  rule = judge(closeness, -threshold, name='divergence_judge')
  return rule._replace(supports=frozenset({Candidates.SAMPLED}))

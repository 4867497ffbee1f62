"""Enriched target: move the target's law a step towards a draft that knows more.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

import jax
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


def enriched_logits(
  target_logits: jax.Array, draft_logits: jax.Array, step: jax.Array, plausibility: jax.Array
) -> jax.Array:
  """Returns float[B, V], z - step m (p - q), m = 1 where q >= plausibility max(q), else 0.

  This is one step of gradient descent on KL(q || softmax(z)) over the logits z of p, kept to tokens
  that the draft finds plausible.

  Args:
    target_logits: float[B, V], z.
    draft_logits: float[B, V] of q.
    step: float[] or float[B].
    plausibility: float[] or float[B] in [0, 1].
  """
  log_p, log_q = log_law(target_logits), log_law(draft_logits)
  bar = log_q.max(-1, keepdims=True) + jnp.log(per_row(plausibility, log_q))
  shift = jnp.where(log_q >= bar, jnp.exp(log_p) - jnp.exp(log_q), 0)
  return target_logits - per_row(step, log_p) * shift


def enriched(step: float | jax.Array = 0.1, plausibility: float | jax.Array = 0.1) -> Verifier:
  """Returns the verifier of speculative sampling towards the enriched law.

  For drafters that see more than the target does, such as retrieved passages of a long context. At
  every position with a draft the output follows `softmax(enriched_logits)`, elsewhere p. In rows at
  temperature 0 the logits are enriched at temperature 1, and their argmax is the token.

  Lossy (the output follows the enriched law). With step 0 that is p: lossless.

  Args:
    step: f[] or f[B] >= 0, how far to move; may be traced.
    plausibility: f[] or f[B] in [0, 1], which tokens to move; may be traced.

  Raises:
    ValueError: if a knob is out of range.

  Source: RAPID, Long-Context Inference with Retrieval-Augmented Speculative Decoding,
  arXiv:2502.20330. The published code corrects rejections from another residual, whose output
  follows neither law; here it is that of speculative sampling.
  """
  check_knob('step', step, 0, float('inf'))
  check_knob('plausibility', plausibility, 0, 1)

  def verify(
    keys: RoundKeys,
    proposal: Proposal,
    target_logits: jax.Array,
    *,
    max_depth: int,
    evidence: Evidence,
  ) -> Verdict:
    def bend(p, q):
      return enriched_logits(p, q, jnp.asarray(step), jnp.asarray(plausibility))

    bent = bend_nodes(bend, proposal, target_logits, evidence)
    return verify_speculative(keys, proposal, bent, max_depth=max_depth)

  return Verifier(
    name='enriched',
    exactness="lossy: emits a law between the target's and the draft's",
    verify=verify,
    draft_noise=RoundKeys.draft_gumbel,
    supports=frozenset({Candidates.SAMPLED}),
    needs_laws=True,
    chains_only=True,
    needs_evidence=True,
  )

"""Speculative sampling of a chain: accept by ratio, correct from the residual.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

import jax

from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Proposal
from decodax.types import Verdict
from decodax.types import Verifier
from decodax.verifiers.laws import accept_prefix
from decodax.verifiers.laws import accept_probabilities
from decodax.verifiers.laws import chain_verdict
from decodax.verifiers.laws import residual_law


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
  num_accepted = accept_prefix(keys, accept_probabilities(proposal, target_logits))
  law = residual_law(proposal, target_logits, num_accepted)
  return chain_verdict(num_accepted, keys.pick(law, num_accepted + 1), max_depth)


speculative = Verifier(
  name='speculative',
  exactness='law-identical',
  verify=verify_speculative,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SAMPLED, Candidates.CARRIED}),
  needs_laws=True,
  chains_only=True,
)

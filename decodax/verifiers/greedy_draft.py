"""Verification of greedy draft sets: the likeliest tokens, and one that is drawn from the rest.

Axes: `B` batch, `N` nodes, `V` vocabulary.
"""

import jax
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
from decodax.verifiers.siblings import of_tokens
from decodax.verifiers.siblings import share_rule
from decodax.verifiers.siblings import walk_siblings
from decodax.verifiers.siblings import without_tokens


def verify_greedy_draft(
  keys: RoundKeys, proposal: Proposal, target_logits: jax.Array, *, max_depth: int
) -> Verdict:
  """Returns the path of accepted children and the token that ends it.

  At each node only its last child x is random, drawn from q', the draft's law without the other
  children. The token is x with probability a = min(1, p(x) / q'(x)), else one drawn from
  norm(max(p - q', 0)), which may be another child. The children are tried by their shares of
  that law, a mixture of the two.

  Lossless (law-identical): the output has the target's law if the last child of every node was
  drawn from its law in `proposal.laws`, f[B, N, V] logits, and the others were not drawn at all;
  their own probabilities there are ignored. Acceptance is p(others) + sum of min(p, q') over the
  rest, the most such drafts allow.

  Source: Towards Optimal Multi-draft Speculative Decoding, arXiv:2502.18779, greedy draft
  sampling; the verification is our own.
  """
  laws = proposal.laws
  assert laws is not None
  index = jnp.arange(proposal.tokens.shape[1])[None]

  def settle(node):
    rows = jnp.arange(node.shape[0])
    children = children_of(proposal, node)
    last = jnp.max(jnp.where(children, index, -1), axis=-1)
    token = proposal.tokens[rows, last]
    others = children & (index != last[:, None])
    p = law_at(target_logits, node)
    q = without_tokens(draft_law_at(laws, node), proposal.tokens, others)
    # A last child that the law cannot have given is certain, too: nothing was drawn.
    drawn = (last >= 0) & (of_tokens(q, token) > 0)
    q = q * jnp.where(drawn, divide(jnp.ones_like(q[:, 0]), q.sum(-1)), 0)[:, None]
    chance = jnp.minimum(divide(of_tokens(p, token), of_tokens(q, token)), 1)
    return ((1 - chance)[:, None] * residual(p, q)).at[rows, token].add(chance)

  return walk_siblings(share_rule(settle), keys, proposal, max_depth=max_depth)


greedy_draft = Verifier(
  name='greedy_draft',
  exactness='law-identical',
  verify=verify_greedy_draft,
  draft_noise=RoundKeys.draft_gumbel,
  supports=frozenset({Candidates.SAMPLED, Candidates.TOP_AND_ONE}),
  needs_laws=True,
)

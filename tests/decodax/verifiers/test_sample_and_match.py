"""Sample and match: exact for any tree, with any noise.

Chains are covered, with the other lossless rules, in test_lossless_chains.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.types import Proposal
from decodax.verifiers import sample_and_match
from tests.decodax.verifiers.chains import log
from tests.decodax.verifiers.chains import outcome_of
from tests.enumeration import expected_accepted
from tests.enumeration import output_law
from tests.table_model import random_table
from tests.table_model import sequence_law

V = 3
CONTEXT = (0, 2)
PARENTS = (-1, 0, 0, 1, 1, 2, 3)  # depth 3, with two, two and one children


def _trees(table, draft_tokens):
  """Returns (proposal, logits) of trees with the given tokens i[R, N - 1] below the root."""
  draft_tokens = np.asarray(draft_tokens)
  shape = (len(draft_tokens), len(PARENTS))
  tokens = np.concatenate([np.full((shape[0], 1), CONTEXT[1]), draft_tokens], axis=1)
  parents = np.broadcast_to(PARENTS, shape)
  before = np.take_along_axis(tokens, np.maximum(parents, 0), axis=1)
  before = np.where(parents < 0, CONTEXT[0], before)
  proposal = Proposal(
    jnp.asarray(tokens, jnp.int32), jnp.asarray(parents, jnp.int32), jnp.ones(shape, bool)
  )
  return proposal, log(table[before, tokens])


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('zero', [False, True])
def test_any_tree_is_exact(zero):
  table = random_table(3, V)
  if zero:
    table = table * (np.arange(V) != 1)
    table = table / table.sum(-1, keepdims=True)
  rng = np.random.default_rng(0)
  draft_tokens = rng.integers(0, V, (3, len(PARENTS) - 1))  # siblings may repeat each other
  draft_tokens[0] = [0, 1, 0, 1, 0, 2]
  proposal, logits = _trees(table, draft_tokens)
  outcome = outcome_of(sample_and_match, proposal, logits, max_depth=3)
  expected = sequence_law(table, CONTEXT, 4)
  for row in range(len(draft_tokens)):
    weight = np.eye(len(draft_tokens))[row]
    law = output_law(outcome, weight, table, CONTEXT, 4)
    np.testing.assert_allclose(law, expected, atol=1e-12)


@pytest.mark.usefixtures('float64')
def test_accepts_what_the_target_gives_to_the_drafts():
  table = random_table(4, V)
  proposal, logits = _trees(table, [[0, 1, 0, 1, 0, 2]])

  def p(*tokens):  # of the last token after the two before
    return float(table[(*CONTEXT, *tokens)[-3:]])

  both, first = p(0) + p(1), p(0) * (p(0, 0) + p(0, 1))
  expected = both + first + p(1) * p(1, 0) + p(0) * p(0, 0) * p(0, 0, 2)
  outcome = outcome_of(sample_and_match, proposal, logits, max_depth=3)
  assert abs(expected_accepted(outcome, np.ones(1)) - expected) < 1e-12

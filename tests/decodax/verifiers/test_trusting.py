"""Trusting verification: trusted drafts come for certain, and all else with the target's law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.trees import chain_proposal
from decodax.types import Proposal
from decodax.verifiers import near_best
from decodax.verifiers import trusting
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import V
from tests.enumeration import enumerate_verdicts
from tests.enumeration import output_law
from tests.table_model import sequence_law

pytestmark = pytest.mark.usefixtures('float64')


def _proposals(num_drafts):
  """Every chain after CONTEXT, its tokens i32[R, 2 + G] with the context."""
  drafts = np.asarray(list(itertools.product(range(V), repeat=num_drafts)))
  root = jnp.full(len(drafts), CONTEXT[-1], jnp.int32)
  count = jnp.full(len(drafts), num_drafts, jnp.int32)
  proposal = chain_proposal(root, jnp.asarray(drafts, jnp.int32), count)
  return proposal, np.concatenate([np.tile(CONTEXT, (len(drafts), 1)), drafts], axis=1)


def _logits(p, tokens):
  with np.errstate(divide='ignore'):
    return jnp.log(jnp.asarray(p[tokens[:, :-1], tokens[:, 1:]]))


def _row(proposal, row) -> Proposal:
  return jax.tree.map(lambda a: a[row : row + 1], proposal)


def _law_of(rule, proposal, logits, row, p, num_drafts):
  one = _row(proposal, row)
  outcome = enumerate_verdicts(rule, one, logits[row : row + 1], max_depth=num_drafts)
  return output_law(outcome, np.ones(1), p, CONTEXT, num_drafts + 1)


@pytest.mark.parametrize('case', ['random', 'target misses a token', 'certain target'])
def test_without_trust_it_is_lossless(case):
  p, _ = CASES[case]
  proposal, tokens = _proposals(2)
  for row in (0, 4, 7):
    law = _law_of(trusting.verify, proposal, _logits(p, tokens), row, p, 2)
    np.testing.assert_allclose(law, sequence_law(p, CONTEXT, 3), atol=1e-12)


@pytest.mark.parametrize('trusted', list(itertools.product([False, True], repeat=2)))
def test_trusted_drafts_are_certain(trusted):
  p, _ = CASES['random']
  proposal, tokens = _proposals(2)
  proposal = proposal._replace(
    trusted=jnp.broadcast_to(jnp.asarray([False, *trusted]), proposal.tokens.shape)
  )
  for row in range(len(tokens)):
    drafts = tokens[row, 2:].tolist()
    expected = np.zeros((V,) * 3)
    for text in itertools.product(range(V), repeat=3):
      chance, history, on_path = 1.0, [*map(int, CONTEXT)], True
      for depth, token in enumerate(text):
        if depth < 2 and on_path and trusted[depth]:
          chance *= token == drafts[depth]
        else:
          chance *= p[history[-2], history[-1], token]
        on_path &= depth < 2 and token == drafts[min(depth, 1)]
        history.append(token)
      expected[text] = chance
    law = _law_of(trusting.verify, proposal, _logits(p, tokens), row, p, 2)
    np.testing.assert_allclose(law, expected, atol=1e-12)


# --- Near-best ---------------------------------------------------------------------------------


class _Evidence:
  """The target's logits before they are warped, which is all that the rule reads."""

  def __init__(self, logits):
    self.logits = logits


def _greedy_near_best(p, drafts, top, gap):
  """Returns the tokens that the published rule emits at temperature 0."""
  history, emitted = list(CONTEXT), []
  for draft in drafts:
    law = p[history[-2], history[-1]]
    rank = int(np.sum(law > law[draft]))
    if rank >= top or np.log(law.max() / law[draft]) > gap:
      break
    emitted.append(draft)
    history.append(draft)
  return [*emitted, int(np.argmax(p[history[-2], history[-1]]))]


@pytest.mark.parametrize('top, gap', [(1, 3.0), (2, 0.5), (2, 9.0), (3, 1.0), (3, 0.0)])
def test_near_best_is_its_definition(top, gap):
  p, _ = CASES['random']
  proposal, tokens = _proposals(2)
  logits = _logits(p, tokens)
  best = logits == logits.max(-1, keepdims=True)
  warped = jnp.where(best, 0, -jnp.inf)  # as at temperature 0
  rule = near_best(top, gap)
  lossless = 0
  for row in range(len(tokens)):

    def verify(keys, proposal, target_logits, *, max_depth, row=row):
      evidence = _Evidence(jnp.broadcast_to(logits[row], target_logits.shape))
      return rule.verify(keys, proposal, target_logits, max_depth=max_depth, evidence=evidence)

    one = _row(proposal, row)
    outcome = enumerate_verdicts(verify, one, warped[row : row + 1], max_depth=2)
    emitted = [token for token in outcome.tokens[0].tolist() if token >= 0]
    assert outcome.weight.tolist() == [1.0]
    assert emitted == _greedy_near_best(p, tokens[row, 2:].tolist(), top, gap)
    lossless += emitted[0] == int(np.argmax(p[CONTEXT]))
  law = np.sort(p[CONTEXT])[::-1]
  has_runner_up = np.any(np.log(law[0] / law[1:top]) <= gap)
  assert (lossless < len(tokens)) == has_runner_up == ((top, gap) == (2, 9.0))


def test_knobs_out_of_range_are_refused():
  with pytest.raises(ValueError, match='top must be in'):
    near_best(top=0)
  with pytest.raises(ValueError, match='gap must be in'):
    near_best(gap=-1.0)

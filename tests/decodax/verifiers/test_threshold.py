"""Thresholds on certain candidates: exact when both are 1, and the law they give when not."""

import numpy as np
import pytest

from decodax import check_compatible
from decodax import drafters
from decodax.types import Candidates
from decodax.verifiers import threshold
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.draft_trees import UNEQUAL
from tests.decodax.verifiers.draft_trees import WIDE
from tests.decodax.verifiers.draft_trees import every_tree
from tests.decodax.verifiers.draft_trees import law_error
from tests.decodax.verifiers.draft_trees import laws_after_context
from tests.decodax.verifiers.draft_trees import outcome_of
from tests.decodax.verifiers.draft_trees import star

pytestmark = pytest.mark.usefixtures('float64')


def _certain(p, q, parents):
  """The one tree that a drafter proposes whose children are its most probable tokens."""
  trees = every_tree(p, np.eye(3)[q.argmax(-1)] * 0.9 + 0.1 / 3, parents, Candidates.TOP_AND_ONE)
  best = int(np.argmax(trees.weight))
  proposal = trees.proposal._replace(laws=None)
  chosen = [None if a is None else a[best : best + 1] for a in proposal]
  return trees._replace(
    proposal=proposal._make(chosen), logits=trees.logits[best : best + 1], weight=np.ones(1)
  )


@pytest.mark.parametrize('case', ['random', 'each misses one', 'certain target', 'equal'])
@pytest.mark.parametrize('parents', [UNEQUAL, WIDE], ids=['unequal', 'wide'])
def test_both_at_one_it_is_lossless(case, parents):
  p, q = CASES[case]
  assert law_error(threshold(), _certain(p, q, parents), p, num_tokens=3) < 1e-12
  assert not threshold().lossless


def _first_token(rule, tree):
  outcome = outcome_of(rule, tree)
  law = np.bincount(outcome.tokens[:, 0], outcome.weight, minlength=3)
  return law, float(outcome.weight @ (outcome.num_accepted > 0))


def test_the_total_stretches_the_shares_of_the_children():
  p, q = CASES['random']
  tree = _certain(p, q, star(2))
  target = laws_after_context(p)
  children = np.asarray(tree.proposal.tokens)[0, 1:]
  for total in (0.95, 0.7, 0.3):
    law, accepted = _first_token(threshold(threshold_total=total), tree)
    covered = np.minimum(np.cumsum(target[children]) / total, 1)
    np.testing.assert_allclose(law[children], np.diff(covered, prepend=0), atol=1e-12)
    np.testing.assert_allclose(accepted, covered[-1], atol=1e-12)
    assert np.all(law[children] <= target[children] / total + 1e-12)


def test_a_likely_child_is_always_accepted():
  p, q = CASES['random']
  tree = _certain(p, q, star(2))
  first = int(tree.proposal.tokens[0, 1])
  likely = float(laws_after_context(p)[first])
  law, _ = _first_token(threshold(threshold_single=likely - 1e-6), tree)
  np.testing.assert_allclose(law[first], 1, atol=1e-12)
  law, _ = _first_token(threshold(threshold_single=0.999), tree)
  np.testing.assert_allclose(law, laws_after_context(p), atol=1e-12)


def test_what_it_refuses():
  check_compatible(drafters.ngram(), threshold())
  with pytest.raises(ValueError, match='threshold_total'):
    threshold(threshold_total=0.0)
  with pytest.raises(ValueError, match='threshold_single'):
    threshold(threshold_single=1.5)
  assert Candidates.IID not in threshold().supports

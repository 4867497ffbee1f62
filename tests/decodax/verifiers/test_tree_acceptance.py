"""How often the tree rules accept: what theory says, and never more than the optimum."""

import numpy as np
import pytest

from decodax import theory
from decodax import verifiers
from decodax.types import Candidates
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.draft_trees import every_tree
from tests.decodax.verifiers.draft_trees import mean_accepted
from tests.decodax.verifiers.draft_trees import star
from tests.table_model import random_table

pytestmark = pytest.mark.usefixtures('float64')
V = 4
WOR, IID, TOP = Candidates.WITHOUT_REPLACEMENT, Candidates.IID, Candidates.TOP_AND_ONE


def _pairs():
  """Pairs of tables that differ a little, a lot, and in what they allow at all."""
  close, far, sharp = (random_table(seed, V, sharpness=s) for seed, s in ((3, 0.5), (4, 1), (5, 3)))
  gap = far * (np.arange(V) != 2)
  gap = gap / gap.sum(-1, keepdims=True)
  return {
    'near': (close, 0.8 * close + 0.2 * far),
    'far': (close, far),
    'sharp draft': (far, sharp),
    'sharp target': (sharp, far),
    'gap in the draft': (close, gap),
    'gap in the target': (gap, close),
  }


PAIRS = _pairs()
THEORY = {
  'specinfer': theory.specinfer_acceptance,
  'kseq': theory.kseq_acceptance,
  'without_replacement': theory.recursive_rejection_acceptance,
  'greedy_draft': theory.greedy_draft_acceptance,
}
KINDS = {'specinfer': IID, 'kseq': IID, 'without_replacement': WOR, 'greedy_draft': TOP}


def _after_context(table):
  return table[..., CONTEXT[0], CONTEXT[1], :]


def _accepted(rule, p, q, num_drafts, kind):
  return mean_accepted(rule, every_tree(p, q, star(num_drafts), kind))


@pytest.mark.parametrize('name', THEORY)
@pytest.mark.parametrize('pair', PAIRS)
def test_acceptance_is_what_theory_says(name, pair):
  p, q = PAIRS[pair]
  laws = _after_context(p), _after_context(q)
  for num_drafts in (1, 2, 3):
    measured = _accepted(verifiers.BY_NAME[name], p, q, num_drafts, KINDS[name])
    assert abs(measured - float(THEORY[name](*laws, num_drafts))) < 1e-10, num_drafts
    if KINDS[name] is IID:
      optimum = theory.optimal_acceptance_with_replacement(*laws, num_drafts)
      assert measured <= float(optimum) + 1e-12
    if KINDS[name] is WOR:
      optimum = theory.optimal_acceptance_without_replacement(*laws, num_drafts)
      assert measured <= float(optimum) + 1e-10


def test_several_drafters_are_tried_in_their_order():
  p, (q, r) = PAIRS['far'][0], (PAIRS['far'][1], PAIRS['sharp draft'][1])
  for first, second in ((q, r), (r, q)):
    drafters = np.stack([first, second])
    tree = every_tree(p, drafters, star(2), Candidates.SEVERAL_DRAFTERS)
    expected = theory.multi_step_acceptance(_after_context(p), _after_context(drafters))
    assert abs(mean_accepted(verifiers.specinfer_drafters, tree) - float(expected)) < 1e-12
  equal = every_tree(p, np.stack([q, q]), star(3), Candidates.SEVERAL_DRAFTERS)
  accepted = mean_accepted(verifiers.specinfer_drafters, equal)
  assert abs(accepted - _accepted(verifiers.specinfer, p, q, 3, IID)) < 1e-12


def test_traversal_of_one_level_is_recursive_rejection():
  for name in ('far', 'sharp draft', 'gap in the target'):
    p, q = PAIRS[name]
    for num_drafts in (1, 3):
      tree = every_tree(p, q, star(num_drafts), WOR)
      gain = mean_accepted(verifiers.traversal, tree) - mean_accepted(
        verifiers.without_replacement, tree
      )
      assert abs(gain) < 1e-12


def test_no_rule_loses_to_a_single_draft():
  for p, q in (PAIRS['far'], PAIRS['sharp target']):
    single = float(theory.overlap(_after_context(p), _after_context(q)))
    for name, kind in KINDS.items():
      if name != 'greedy_draft':  # its first draft is certain, and may be a bad one
        assert _accepted(verifiers.BY_NAME[name], p, q, 3, kind) >= single - 1e-12

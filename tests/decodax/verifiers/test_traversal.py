"""Traversal and recursive rejection: longer paths, block verification, several rounds of the loop.

That a single round is exact is shown, with the other lossless rules, in test_lossless_trees.py.
"""

import pytest
import scipy.stats

from decodax import verifiers
from decodax.types import Candidates
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.draft_trees import UNEQUAL
from tests.decodax.verifiers.draft_trees import chi_square
from tests.decodax.verifiers.draft_trees import every_tree
from tests.decodax.verifiers.draft_trees import mean_accepted
from tests.table_model import random_table

WOR = Candidates.WITHOUT_REPLACEMENT


@pytest.mark.usefixtures('float64')
def test_a_chain_is_decided_as_by_block_verification():
  for name, (p, q) in CASES.items():
    chain = every_tree(p, q, (-1, 0, 1, 2), Candidates.SAMPLED)
    gain = mean_accepted(verifiers.traversal, chain) - mean_accepted(verifiers.block, chain)
    assert abs(gain) < 1e-12, name


@pytest.mark.usefixtures('float64')
def test_paths_are_longer_than_those_of_recursive_rejection():
  # Reported for these tables; there is no proof for all.
  for name in ('random', 'close', 'sharp target', 'equal'):
    tree = every_tree(*CASES[name], UNEQUAL, WOR)
    gain = mean_accepted(verifiers.traversal, tree) - mean_accepted(
      verifiers.without_replacement, tree
    )
    assert gain > (-1e-12 if name == 'equal' else 1e-3), name


# --- The jitted loop, with its real random numbers, over several rounds --------------------------

NUM_RUNS, NUM_TOKENS, V = 1 << 17, 5, 3
P, Q = (random_table(seed, V, sharpness=1.5) for seed in (5, 6))
FREEDOM = V**NUM_TOKENS - 1


def test_the_power_of_the_test():
  # 131,072 runs of 5 tokens, 243 cells. A law whose cells are off by 5 % (root mean square,
  # weighted by the law) is rejected with certainty to 4 digits, one off by 4 % in 97 of 100 cases.
  bound = scipy.stats.chi2.isf(1e-4, FREEDOM)
  power = [scipy.stats.ncx2.sf(bound, FREEDOM, NUM_RUNS * error**2) for error in (0.04, 0.05)]
  assert power[0] > 0.97 and power[1] > 0.9999


@pytest.mark.parametrize('rule', [verifiers.without_replacement, verifiers.traversal])
def test_the_loop_has_the_target_s_law_over_several_rounds(rule):
  # Rejects a correct rule once in 10,000 seeds.
  result = chi_square(rule, P, Q, num_runs=NUM_RUNS, num_tokens=NUM_TOKENS)
  assert result.freedom == FREEDOM
  assert result.p_value > 1e-4, result


def test_a_rule_for_other_drafts_is_seen():
  # Independent drafts are what multi-step sampling takes; these are drawn without replacement.
  wrong = verifiers.specinfer._replace(supports=frozenset({WOR}))
  result = chi_square(wrong, P, Q, num_runs=NUM_RUNS, num_tokens=NUM_TOKENS)
  assert result.statistic > 2 * scipy.stats.chi2.isf(1e-4, FREEDOM), result

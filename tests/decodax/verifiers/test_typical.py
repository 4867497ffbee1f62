"""Typical acceptance against a search by hand, on chains and trees, and its two exact ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.noise import RoundKeys
from decodax.noise import row_keys
from decodax.types import Proposal
from decodax.verifiers import typical
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import log
from tests.decodax.verifiers.chains import outcome_of
from tests.enumeration import output_law
from tests.table_model import random_table
from tests.table_model import sequence_law

pytestmark = pytest.mark.usefixtures('float64')


def _random_trees(seed, rows=24, num_nodes=9, vocab_size=5, depth_limit=4):
  rng = np.random.default_rng(seed)
  parents = np.full((rows, num_nodes), -1)
  depth = np.zeros((rows, num_nodes), int)
  for row in range(rows):
    for node in range(1, num_nodes):
      shallow = np.flatnonzero(depth[row, :node] < depth_limit)
      parents[row, node] = rng.choice(shallow)
      depth[row, node] = depth[row, parents[row, node]] + 1
  tokens = rng.integers(0, vocab_size, (rows, num_nodes))
  num_valid = rng.integers(1, num_nodes + 1, rows)
  valid = np.arange(num_nodes) < num_valid[:, None]
  logits = log(random_table(seed, vocab_size)[rng.integers(0, 5, (rows, num_nodes)), tokens])
  proposal = Proposal(
    jnp.asarray(tokens, jnp.int32), jnp.asarray(parents, jnp.int32), jnp.asarray(valid)
  )
  return proposal, logits


def _best_by_hand(tokens, parents, valid, laws, epsilon, delta):
  """Returns (depth, score) of the best accepted node of one tree, and whether each was reached."""
  reached = {0: (0, 0.0)}
  for node in range(1, len(tokens)):
    parent = parents[node]
    if parent not in reached or not valid[node]:
      continue
    p = laws[parent]
    entropy = -np.sum(p * np.log(p + 1e-5))
    if p[tokens[node]] > min(epsilon, delta * np.exp(-entropy)):
      depth, score = reached[parent]
      reached[node] = (depth + 1, score + np.log(p[tokens[node]]))
  return max(reached.values()), reached


def _verify(epsilon, delta, proposal, logits):
  count = proposal.tokens.shape[0]
  zeros = jnp.zeros((count,), jnp.int32)
  keys = RoundKeys(row_keys(0, jnp.arange(count)), zeros, zeros)
  return typical(epsilon, delta).verify(keys, proposal, logits, max_depth=4)


_jitted = jax.jit(_verify)


@pytest.mark.parametrize('knobs', [(0.3, 0.09), (0.5, 2.0), (0.15, 1.0)])
def test_the_path_is_the_longest_and_then_the_likeliest(knobs):
  lengths = set()
  for seed in range(3):
    proposal, logits = _random_trees(seed)
    verdict = jax.device_get(_jitted(*knobs, proposal, logits))
    laws = np.exp(np.asarray(logits))
    trees = zip(*(np.asarray(a) for a in proposal[:3]), laws, strict=True)
    for row, tree in enumerate(trees):
      (depth, score), reached = _best_by_hand(*tree, *knobs)
      assert verdict.num_accepted[row] == depth
      best = [_path_to(node, tree[1]) for node, value in reached.items() if value == (depth, score)]
      assert verdict.path[row, : depth + 1].tolist() in best
      lengths.add(depth)
  assert len(lengths) >= 3


def _path_to(node, parents):
  path = []
  while node >= 0:
    path.insert(0, int(node))
    node = parents[node]
  return path


def test_ids_that_do_not_exist_are_not_accepted():
  proposal, logits = _random_trees(0)
  odd = jnp.asarray([-1, 5, 2**31 - 1] * 3, jnp.int32)[None]
  proposal = proposal._replace(tokens=jnp.broadcast_to(odd, proposal.tokens.shape))
  assert not np.any(_jitted(0.0, 0.0, proposal, logits).num_accepted)


def test_the_token_after_the_path_is_the_target_s():
  tables = CASES['random']
  chains = every_chain(tables, 2)
  outcome = outcome_of(typical(), chains.proposal, chains.logits)
  p = np.exp(np.asarray(chains.logits))
  for row in range(len(chains.weight)):
    own = outcome.row == row
    count = outcome.num_accepted[own][0]
    law = np.zeros(p.shape[-1])
    np.add.at(law, outcome.tokens[own, count], outcome.weight[own])
    np.testing.assert_allclose(law, p[row, count], atol=1e-12)


def test_a_draft_above_epsilon_always_passes():
  chains = every_chain(CASES['random'], 1)
  p = np.exp(np.asarray(chains.logits))[:, 0]
  outcome = outcome_of(typical(0.3, 100.0), chains.proposal, chains.logits)
  for row, count in zip(outcome.row, outcome.num_accepted, strict=True):
    assert count == (p[row, row] > 0.3)


def test_with_infinite_knobs_nothing_is_accepted_and_nothing_lost():
  tables = CASES['random']
  chains = every_chain(tables, 2)
  outcome = outcome_of(typical(np.inf, np.inf), chains.proposal, chains.logits)
  assert not outcome.num_accepted.any()
  law = output_law(outcome, chains.weight, tables.p, CONTEXT, 2)
  np.testing.assert_allclose(law, sequence_law(tables.p, CONTEXT, 2), atol=1e-12)


def test_at_temperature_0_it_is_greedy():
  chains = every_chain(CASES['random'], 3)
  best = np.asarray(chains.logits).argmax(-1)
  one_hot = jnp.where(np.arange(3) == best[..., None], 0, -jnp.inf)
  outcome = outcome_of(typical(), chains.proposal, one_hot)
  drafts = np.asarray(chains.proposal.tokens)[:, 1:]
  matches = np.cumprod(drafts == best[:, :-1], axis=-1).sum(-1)
  np.testing.assert_array_equal(outcome.num_accepted, matches[outcome.row])
  ends = outcome.tokens[np.arange(len(outcome.row)), outcome.num_accepted]
  np.testing.assert_array_equal(ends, best[outcome.row, outcome.num_accepted])

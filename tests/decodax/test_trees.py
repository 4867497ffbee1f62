"""Topology and walks against loops in Python over random trees.

Axes: `B` batch, `N` nodes, `D` depth, `V` vocabulary.
"""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import trees
from decodax.types import Candidates
from decodax.types import DraftShape
from decodax.types import Proposal
from decodax.types import Verdict

_V = 3
_MANY = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
# A few sizes, so that little is compiled; a seed stands for a batch of trees.
_SIZES = st.sampled_from([1, 2, 3, 9, 17])
_SEEDS = st.integers(0, 2**32 - 1)


def _random_parents(rng, batch, num_nodes):
  """Returns i32[B, N]: bushy trees, deep trees and chains."""
  parents = np.full((batch, num_nodes), -1, np.int32)
  for row in range(batch):
    reach = rng.choice([1, 2, num_nodes])
    for node in range(1, num_nodes):
      parents[row, node] = rng.integers(max(0, node - reach), node)
  return parents


def _random_proposal(seed, num_nodes, batch=4):
  """Returns trees with twins, tokens that do not exist, and rows of any number of valid nodes."""
  rng = np.random.default_rng(seed)
  parents = _random_parents(rng, batch, num_nodes)
  tokens = rng.integers(-1, _V + 1, parents.shape).astype(np.int32)
  valid = np.arange(num_nodes)[None] < rng.integers(1, num_nodes + 1, (batch, 1))
  proposal = Proposal(jnp.asarray(tokens), jnp.asarray(parents), jnp.asarray(valid))
  return jax.tree.map(np.asarray, proposal)


def _ancestors(parents, node):
  """Returns the node and its ancestors, upwards."""
  return [node] if parents[node] < 0 else [node, *_ancestors(parents, parents[node])]


@functools.cache
def _jitted(fn, **options):
  return jax.jit(functools.partial(fn, **options))


# --- Topology ------------------------------------------------------------------------------------


@_MANY
@hypothesis.given(seed=_SEEDS, num_nodes=_SIZES)
def test_ancestors_and_depths_are_those_of_a_walk_upwards(seed, num_nodes):
  proposal = _random_proposal(seed, num_nodes)
  mask, depths = _topology(num_nodes)(jax.tree.map(jnp.asarray, proposal))
  assert mask.dtype == bool and depths.dtype == jnp.int32
  expected = np.zeros(mask.shape, bool)
  for row, parents in enumerate(proposal.parents):
    for node in range(num_nodes):
      expected[row, node, _ancestors(parents, node)] = True
  np.testing.assert_array_equal(mask, expected)
  np.testing.assert_array_equal(depths, expected.sum(-1) - 1)


@functools.cache
def _topology(num_nodes):
  shape = DraftShape(num_nodes, max(num_nodes - 2, 0), Candidates.DETERMINISTIC)
  assert num_nodes == 1 or not shape.is_chain
  return jax.jit(functools.partial(trees.topology, shape=shape))


@pytest.mark.parametrize('num_nodes', [1, 2, 5, 33, 64, 65])
def test_the_deepest_tree_is_a_chain(num_nodes):
  """Doubling must reach from the last node to the first."""
  parents = trees.chain_parents(2, num_nodes)
  mask = trees.ancestor_mask(parents)
  np.testing.assert_array_equal(mask, np.tril(np.ones((2, num_nodes, num_nodes), bool)))
  chain = DraftShape(num_nodes, num_nodes - 1, Candidates.DETERMINISTIC)
  proposal = Proposal(jnp.zeros((2, num_nodes), jnp.int32), parents, jnp.ones((2, num_nodes), bool))
  by_shape, depths = trees.topology(proposal, chain)
  np.testing.assert_array_equal(by_shape, mask)
  np.testing.assert_array_equal(depths, np.tile(np.arange(num_nodes), (2, 1)))


@_MANY
@hypothesis.given(seed=_SEEDS, num_nodes=_SIZES)
def test_children_are_the_valid_nodes_below(seed, num_nodes):
  proposal = _random_proposal(seed, num_nodes)
  node = np.random.default_rng(seed).integers(0, num_nodes, 4).astype(np.int32)
  children = _jitted(trees.children_of)(proposal, node)
  for row in range(4):
    expected = [
      i
      for i in range(num_nodes)
      if proposal.valid[row, i] and proposal.parents[row, i] == node[row]
    ]
    np.testing.assert_array_equal(np.flatnonzero(children[row]), expected)


# --- Walks ---------------------------------------------------------------------------------------


def _walk(proposal, row, choose):
  """Returns (path, next token) of one row, by a loop; of twins the first counts."""
  path = [0]
  while True:
    token = choose(path[-1], len(path) - 1)
    for node in range(1, proposal.tokens.shape[1]):
      child = proposal.valid[row, node] and proposal.parents[row, node] == path[-1]
      if child and proposal.tokens[row, node] == token:
        path.append(node)
        break
    else:
      return path, token


def _assert_verdict(verdict, proposal, walks):
  emitted = np.asarray(_jitted(trees.path_tokens)(proposal, verdict))
  verdict = jax.device_get(verdict)
  for row, (path, token) in enumerate(walks):
    assert verdict.num_accepted[row] == len(path) - 1
    np.testing.assert_array_equal(verdict.path[row, : len(path)], path)
    assert verdict.next_token[row] == token
    expected = [*proposal.tokens[row, path[1:]], token]
    np.testing.assert_array_equal(emitted[row, : len(path)], expected)


@_MANY
@hypothesis.given(seed=_SEEDS, num_nodes=_SIZES)
def test_follow_goes_where_the_choices_lead(seed, num_nodes):
  proposal = _random_proposal(seed, num_nodes)
  choices = np.random.default_rng(seed).integers(0, _V, proposal.tokens.shape).astype(np.int32)
  depth = num_nodes - 1  # more than most of these trees need
  verdict = _jitted(_follow, max_depth=depth)(jnp.asarray(choices), proposal)
  assert verdict.path.shape == (4, depth + 1)
  walks = [_walk(proposal, row, lambda n, d, row=row: choices[row, n]) for row in range(4)]
  _assert_verdict(verdict, proposal, walks)


def test_a_walk_may_end_at_the_greatest_depth():
  proposal = trees.chain_proposal(
    jnp.asarray([7]), jnp.asarray([[1, 2, 0, 1]], jnp.int32), jnp.asarray([4])
  )
  choices = jnp.asarray([[1, 2, 0, 1, 2]], jnp.int32)
  verdict = _follow(choices, proposal, 4)
  _assert_verdict(verdict, jax.device_get(proposal), [([0, 1, 2, 3, 4], 2)])


def _follow(choices, proposal, max_depth):
  """Returns the verdict when the successor of every node is known: choices i32[B, N]."""
  rows = jnp.arange(choices.shape[0])
  return trees.walk(lambda node, depth: choices[rows, node], proposal, max_depth)


def _walk_by_table(table, proposal):
  return trees.walk(lambda node, depth: table[jnp.arange(4), node, depth], proposal, 8)


@_MANY
@hypothesis.given(seed=_SEEDS)
def test_walk_asks_for_a_token_after_each_node_of_the_path(seed):
  """The choice may depend on node and depth."""
  proposal = _random_proposal(seed, 9)
  table = np.random.default_rng(seed).integers(0, _V, (4, 9, 10)).astype(np.int32)
  verdict = _jitted(_walk_by_table)(table, proposal)
  walks = [_walk(proposal, row, lambda n, d, row=row: table[row, n, d]) for row in range(4)]
  _assert_verdict(verdict, proposal, walks)


def test_walk_is_not_asked_once_every_row_has_ended():
  proposal = jax.tree.map(jnp.asarray, _random_proposal(0, 9))
  asked = []

  def choose(node, depth):
    asked.append(int(depth))
    return jnp.full_like(node, _V + 7)  # no node has it

  with jax.disable_jit():
    verdict = trees.walk(choose, proposal, 8)
  assert asked == [0]
  np.testing.assert_array_equal(verdict.num_accepted, 0)
  np.testing.assert_array_equal(verdict.next_token, _V + 7)


# --- Chains --------------------------------------------------------------------------------------


def test_a_chain_proposal_holds_root_drafts_and_laws():
  root, drafts = jnp.asarray([7, 8]), jnp.asarray([[1, 2, 3], [4, 5, 6]])
  laws = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 9)), jnp.float32)
  proposal = trees.chain_proposal(root, drafts, jnp.asarray([3, 1]), laws)
  np.testing.assert_array_equal(proposal.tokens, [[7, 1, 2, 3], [8, 4, 5, 6]])
  np.testing.assert_array_equal(proposal.parents, [[-1, 0, 1, 2]] * 2)
  np.testing.assert_array_equal(proposal.valid, [[1, 1, 1, 1], [1, 1, 0, 0]])
  assert proposal.laws is not None
  np.testing.assert_array_equal(proposal.laws[:, :-1], laws)
  assert not np.any(proposal.laws[:, -1])
  assert trees.chain_proposal(root, drafts, jnp.asarray([3, 1])).laws is None


def test_a_root_proposal_has_one_node():
  proposal = trees.root_proposal(jnp.asarray([7, 8]))
  np.testing.assert_array_equal(proposal.tokens, [[7], [8]])
  np.testing.assert_array_equal(proposal.parents, [[-1], [-1]])
  np.testing.assert_array_equal(proposal.valid, [[1], [1]])


def test_path_tokens_ends_with_the_next_token():
  proposal = trees.chain_proposal(
    jnp.asarray([7, 7, 7]), jnp.asarray([[1, 2]] * 3), jnp.asarray([2, 2, 2])
  )
  verdict = Verdict(jnp.asarray([[0, 1, 2]] * 3), jnp.asarray([0, 1, 2]), jnp.asarray([9, 9, 9]))
  tokens = np.asarray(trees.path_tokens(proposal, verdict))
  assert [row[: n + 1].tolist() for n, row in enumerate(tokens)] == [[9], [1, 9], [1, 2, 9]]

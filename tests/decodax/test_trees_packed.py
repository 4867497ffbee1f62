"""Topology of trees against brute force: packed masks, path tables, compaction, siblings."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from decodax import noise
from decodax import static_trees
from decodax import trees
from decodax import verifiers
from decodax.types import Candidates
from decodax.types import DraftShape
from decodax.types import Proposal
from tests.table_model import random_table

NUM_NODES, MAX_DEPTH, BATCH, VOCAB = 37, 8, 3, 4  # more nodes than a word has bits
SETTINGS = hypothesis.settings(deadline=None, max_examples=25)


@st.composite
def _parents(draw, num_nodes=NUM_NODES, max_depth=MAX_DEPTH):
  """Parents i32[B, N] of random trees, no deeper than max_depth."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  lean = draw(st.sampled_from([0.2, 1.0, 4.0]))  # towards bushes, or towards chains
  rows = []
  for _ in range(BATCH):
    parents, depths = [-1], [0]
    for node in range(1, num_nodes):
      parent = int(node * rng.random() ** (1 / lean))
      parent = parent if depths[parent] < max_depth else 0
      parents.append(parent)
      depths.append(depths[parent] + 1)
    rows.append(parents)
  return np.array(rows, np.int32)


def _walk_up(parents, node):
  """The nodes from the root to `node`, by following the parents."""
  path = [node]
  while parents[path[-1]] >= 0:
    path.append(int(parents[path[-1]]))
  return path[::-1]


# --- Masks ---------------------------------------------------------------------------------------


@jax.jit
def _masks(parents):
  mask = trees.ancestor_mask(parents)
  words = trees.pack_ancestors(mask)
  return mask, words, trees.unpack_ancestors(words, NUM_NODES)


@hypothesis.given(_parents())
@SETTINGS
def test_packed_bits_are_the_ancestors_found_by_walking_up(parents):
  mask, words, unpacked = map(np.asarray, _masks(parents))
  np.testing.assert_array_equal(mask, unpacked)
  assert words.dtype == np.int32 and words.shape == (BATCH, NUM_NODES, 2)
  for row in range(BATCH):
    for node in range(NUM_NODES):
      bits = 0
      for word in range(2):
        bits |= (int(words[row, node, word]) & 0xFFFFFFFF) << (32 * word)
      assert bits == sum(1 << above for above in _walk_up(parents[row], node))


@hypothesis.given(_parents())
@SETTINGS
def test_path_table_and_positions_follow_the_walk(parents):
  table, depths = jax.tree.map(np.asarray, _paths(parents))
  for row in range(BATCH):
    for node in range(NUM_NODES):
      path = _walk_up(parents[row], node)
      assert table[row, node].tolist() == path + [-1] * (MAX_DEPTH + 1 - len(path))
      assert depths[row, node] == 10 * row + len(path) - 1


@jax.jit
def _paths(parents):
  depths = trees.ancestor_mask(parents).sum(-1) - 1
  length = 1 + 10 * jnp.arange(BATCH)
  return trees.path_table(parents, MAX_DEPTH), trees.tree_positions(length, depths)


def test_a_constant_topology_equals_a_traced_one():
  tree = static_trees.kary((3, 2, 1))
  proposal = Proposal(
    tokens=jnp.zeros((BATCH, tree.num_nodes), jnp.int32),
    parents=jnp.broadcast_to(tree.parents[None], (BATCH, tree.num_nodes)),
    valid=jnp.ones((BATCH, tree.num_nodes), bool),
  )
  for width in (tree.num_nodes, 6):
    shape = DraftShape(tree.num_nodes, tree.max_depth, Candidates.DETERMINISTIC)
    narrow = jax.tree.map(lambda a, width=width: a[:, :width], proposal)
    known = trees.topology(narrow, shape._replace(parents=tree.parents))
    for a, b in zip(known, trees.topology(narrow, shape), strict=True):
      np.testing.assert_array_equal(a, b)


# --- Choosing nodes ------------------------------------------------------------------------------


@hypothesis.given(_parents(), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.7, 1.0]))
@SETTINGS
def test_kept_nodes_keep_order_and_parents(parents, seed, chance):
  keep = np.random.default_rng(seed).random(parents.shape) < chance
  keep[:, 0] = True
  for node in range(1, NUM_NODES):  # closed under parents
    keep[:, node] &= keep[np.arange(BATCH), parents[:, node]]
  num_nodes = 20
  index, new_parents, valid = map(np.asarray, _compact(keep, parents))
  for row in range(BATCH):
    kept = np.flatnonzero(keep[row])[:num_nodes]
    assert valid[row].tolist() == [True] * len(kept) + [False] * (num_nodes - len(kept))
    assert index[row, : len(kept)].tolist() == kept.tolist()
    for place, node in enumerate(kept[1:], 1):
      assert kept[new_parents[row, place]] == parents[row, node]
    assert new_parents[row, 0] == -1
    assert (new_parents[row, 1:] < np.arange(1, num_nodes)).all()


_compact = jax.jit(functools.partial(trees.compact_nodes, num_nodes=20))


def _path_law_logits(tokens, parents, table):
  """Logits f32[B, N, V] after each node, by the two last tokens of its path."""
  logits = np.zeros((*tokens.shape, VOCAB), np.float32)
  for row in range(len(tokens)):
    for node in range(tokens.shape[1]):
      path = [0, *tokens[row, _walk_up(parents[row], node)]]
      logits[row, node] = np.log(table[path[-2], path[-1]])
  return logits


@hypothesis.given(_parents(num_nodes=12, max_depth=5), st.integers(0, 2**31 - 1))
@SETTINGS
def test_order_of_siblings_does_not_matter_for_deterministic_trees(parents, seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, parents.shape).astype(np.int32)
  valid = np.ones(parents.shape, bool)
  for row in range(BATCH):  # of equal siblings the first counts, so there must be none
    known = set()
    for node in range(1, 12):
      name = (int(parents[row, node]), int(tokens[row, node]))
      valid[row, node] = name not in known and valid[row, parents[row, node]]
      known.add(name)
  other = _shuffle_nodes(rng, tokens, parents, valid)
  table = random_table(seed % 1000, VOCAB)
  keys = noise.RoundKeys(noise.row_keys(seed, jnp.arange(BATCH)), *_two_zeros())
  for rule in (verifiers.greedy, verifiers.coupled):
    emitted = []
    for tree in ((tokens, parents, valid), other):
      proposal = Proposal(jnp.asarray(tree[0]), jnp.asarray(tree[1]), jnp.asarray(tree[2]))
      logits = _path_law_logits(*tree[:2], table)
      emitted.append(_emitted(rule, keys, proposal, jnp.asarray(logits)))
    for row in range(BATCH):
      assert emitted[0][row] == emitted[1][row]


def _two_zeros():
  return jnp.zeros((BATCH,), jnp.int32), jnp.zeros((BATCH,), jnp.int32)


@functools.cache
def _verify(rule):
  return jax.jit(functools.partial(rule.verify, max_depth=5))


def _emitted(rule, keys, proposal, logits):
  verdict = _verify(rule)(keys, proposal, logits)
  tokens = np.asarray(trees.path_tokens(proposal, verdict))
  return [row[: n + 1].tolist() for row, n in zip(tokens, verdict.num_accepted, strict=True)]


def _shuffle_nodes(rng, tokens, parents, valid):
  """The same trees in another topological order, valid nodes first as everywhere."""
  out = tokens.copy(), parents.copy(), valid.copy()
  for row in range(len(tokens)):
    score = np.where(valid[row], 0.0, 10.0) + rng.random(tokens.shape[1])
    order = [0]
    while len(order) < tokens.shape[1]:
      ready = [n for n in range(1, tokens.shape[1]) if n not in order and parents[row, n] in order]
      order.append(min(ready, key=lambda n: score[n]))
    order = sorted(order, key=lambda n: not valid[row, n])  # stable
    place = {node: i for i, node in enumerate(order)}
    for i, node in enumerate(order):
      out[0][row, i], out[2][row, i] = tokens[row, node], valid[row, node]
      above = int(parents[row, node])
      out[1][row, i] = -1 if above < 0 else place[above] if valid[row, node] else 0
  return out


# --- Compaction of the cache ---------------------------------------------------------------------


@hypothesis.given(_parents(num_nodes=12, max_depth=5), st.integers(0, 2**31 - 1))
@hypothesis.settings(deadline=None, max_examples=10)
def test_committing_a_path_equals_reading_it_as_a_chain(zoo, parents, seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, zoo.model.vocab_size, parents.shape).astype(np.int32)
  path, count = np.zeros((BATCH, 6), np.int32), np.zeros(BATCH, np.int32)
  chain = np.zeros((BATCH, 6), np.int32)
  for row in range(BATCH):
    nodes = _walk_up(parents[row], int(rng.integers(0, 12)))
    count[row] = len(nodes)
    path[row, : len(nodes)] = nodes
    chain[row, : len(nodes)] = tokens[row, nodes]
  by_tree, by_chain = _commit_both(zoo)(zoo.params, tokens, parents, path, count, chain)
  np.testing.assert_array_equal(by_tree.length, by_chain.length)
  for row in range(BATCH):
    valid = int(by_tree.length[row])
    for name in ('keys', 'values'):
      a, b = (np.asarray(getattr(c, name))[:, row, :, :valid] for c in (by_tree, by_chain))
      np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)
    np.testing.assert_array_equal(by_tree.positions[row, :valid], by_chain.positions[row, :valid])


_COMMITS = {}


def _commit_both(zoo):
  """Returns the compiled pair of caches: a tree's path committed, and the same path as a chain."""
  model = zoo.model

  def commit_both(params, tokens, parents, path, count, chain):
    cache = model.init_cache(params, BATCH, 32)
    prompt = jnp.broadcast_to(jnp.arange(4)[None], (BATCH, 4))
    cache = _read(params, cache, prompt, prompt, jnp.tril(jnp.ones((4, 4), bool))[None], prompt, 4)
    mask = trees.ancestor_mask(parents)
    positions = 4 + mask.sum(-1) - 1
    by_tree = _read(params, cache, tokens, positions, mask, path, count)
    order = jnp.broadcast_to(jnp.arange(6)[None], chain.shape)
    causal = jnp.tril(jnp.ones((6, 6), bool))[None]
    return by_tree, _read(params, cache, chain, 4 + order, causal, order, count)

  def _read(params, cache, tokens, positions, mask, path, count):
    mask = jnp.broadcast_to(mask, (BATCH, *mask.shape[1:]))
    _, block = model.extend(params, cache, tokens, positions, mask)
    return model.commit(cache, block, path, jnp.broadcast_to(count, (BATCH,)))

  if id(zoo) not in _COMMITS:
    _COMMITS[id(zoo)] = jax.jit(commit_both)
  return _COMMITS[id(zoo)]

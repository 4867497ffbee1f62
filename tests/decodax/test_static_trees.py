"""Static trees against brute force: every invariant by walking, every optimum by trying all."""

import functools
import itertools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import static_trees
from decodax import theory

ACCEPTANCE = np.array([0.55, 0.17, 0.08, 0.04, 0.03, 0.02, 0.01, 0.01])
BY_DEPTH = np.array([[0.6, 0.15, 0.07, 0.04], [0.45, 0.12, 0.06, 0.03], [0.3, 0.1, 0.05, 0.03]])
CURVE = theory.CostCurve(
  np.array([1, 2, 4, 8, 16, 32]), np.array([10.0, 10.5, 11.0, 12.0, 15.0, 22.0])
)


@functools.cache
def _ordered_trees(num_nodes):
  """Every tree in which a node's children have the ranks 0, 1, .., as sets of paths."""
  if num_nodes == 1:
    return [((),)]
  trees = []
  # The last child of the root and what is below it, and the rest.
  for size in range(1, num_nodes):
    for rest, last in itertools.product(_ordered_trees(num_nodes - size), _ordered_trees(size)):
      rank = sum(len(path) == 1 for path in rest)
      trees.append((*rest, *((rank, *path) for path in last)))
  return trees


def _path_value(path, table):
  return np.prod([table[depth, rank] for depth, rank in enumerate(path)])


def _closed_sets(paths, size):
  """Every set of `size` paths that holds the root and the parent of each of its members."""
  others = [path for path in paths if path]
  for chosen in itertools.combinations(others, size - 1):
    members = {(), *chosen}
    if all(path[:-1] in members for path in chosen):
      yield members


# --- The record --------------------------------------------------------------------------------


@st.composite
def _random_paths(draw):
  paths: list[tuple[int, ...]] = [()]
  for _ in range(draw(st.integers(0, 20))):
    path = (*draw(st.sampled_from(paths)), draw(st.integers(0, 5)))
    if path not in paths:
      paths.append(path)
  return paths[1:]


@hypothesis.given(_random_paths())
@hypothesis.settings(deadline=None, max_examples=100)
def test_every_property_of_a_tree_equals_a_walk_over_its_paths(paths):
  tree = static_trees.from_paths(paths)
  assert sorted(tree.paths) == sorted([(), *paths])
  assert static_trees.from_paths(reversed(tree.paths)) == tree
  assert (tree.num_nodes, tree.max_depth) == (len(tree.paths), max(map(len, tree.paths)))
  assert list(tree.paths) == sorted(tree.paths, key=lambda path: (len(path), path))
  for i, path in enumerate(tree.paths):
    assert tree.depths[i] == len(path)
    assert tree.parents[i] == (tree.paths.index(path[:-1]) if path else -1)
    below = sorted(other for other in tree.paths if other and other[:-1] == path)
    assert [tree.paths[c] for c in tree.children[i] if c >= 0] == below
    assert (tree.children[i, len(below) :] == -1).all()
    for j, other in enumerate(tree.paths):
      assert tree.ancestors[i, j] == (path[: len(other)] == other)
  for array in (tree.parents, tree.ranks, tree.depths, tree.children):
    assert array.dtype == np.int32
    assert not array.flags.writeable


def test_a_tree_is_a_static_argument_of_jit():
  num_traces = 0

  @functools.partial(jax.jit, static_argnums=0)
  def fn(tree, x):
    nonlocal num_traces
    num_traces += 1
    return x + tree.num_nodes

  assert fn(static_trees.chain(3), jnp.int32(1)) == 5
  assert fn(static_trees.from_paths([(0,), (0, 0), (0, 0, 0)]), jnp.int32(1)) == 5
  assert num_traces == 1
  assert fn(static_trees.kary((3,)), jnp.int32(1)) == 5
  assert num_traces == 2


def test_trees_compare_by_value_and_by_rank():
  tree = static_trees.from_paths([(0,), (1,)])
  assert tree == static_trees.kary((2,))
  assert tree != static_trees.from_paths([(0,), (2,)])
  assert tree != 'a tree'
  assert repr(tree) == 'StaticTree(num_nodes=3, max_depth=1)'


@pytest.mark.parametrize(
  ('parents', 'ranks', 'message'),
  [
    ([], [], 'at least 1'),
    ([-1, 0], [0], 'i32'),
    ([0, 0], [0, 0], 'must be the root'),
    ([-1, 1], [0, 0], 'a parent before it'),
    ([-1, -1], [0, 0], 'a parent before it'),
    ([-1, 0, 1, 0], [0, 0, 0, 1], 'breadth-first'),
    ([-1, 0, 0], [0, 1, 0], 'rising ranks'),
    ([-1, 0, 0], [0, 1, 1], 'rising ranks'),
    ([-1, 0], [0, -1], 'at least 0'),
    ([-1, 0.5], [0, 0], 'integers'),
  ],
)
def test_arrays_that_are_no_tree_are_refused(parents, ranks, message):
  with pytest.raises(ValueError, match=message):
    static_trees.StaticTree(np.array(parents), np.array(ranks))


# --- Given shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize('length', [0, 1, 5])
def test_chain(length):
  tree = static_trees.chain(length)
  np.testing.assert_array_equal(tree.parents, np.arange(-1, length))
  assert (tree.num_nodes, tree.max_depth) == (length + 1, length)
  assert tree.children.shape == (length + 1, min(length, 1))
  np.testing.assert_array_equal(tree.ancestors, np.tri(length + 1, dtype=bool))


@pytest.mark.parametrize('branching', [(), (3,), (2, 3), (1, 2, 1, 3)])
def test_kary_holds_every_path_within_its_factors(branching):
  paths = [
    path
    for depth in range(1, len(branching) + 1)
    for path in itertools.product(*map(range, branching[:depth]))
  ]
  assert static_trees.kary(branching) == static_trees.from_paths(paths)


def test_duplicate_paths_are_refused_or_removed():
  choices = [(0,), (1,), (0, 0), (1,)]
  with pytest.raises(ValueError, match=r'\(1,\) is listed twice'):
    static_trees.from_paths(choices)
  tree = static_trees.from_paths(choices, duplicates='remove')
  assert tree.paths == ((), (0,), (1,), (0, 0))


def test_candidate_slots_gather_each_node_from_the_flat_list():
  tree = static_trees.from_paths([(0,), (2,), (0, 1), (2, 0), (2, 0, 3)])
  flat = ['root', *(f'depth {d} rank {r}' for d in (1, 2, 3) for r in range(4))]
  found = [flat[slot] for slot in tree.candidate_slots(4)]
  assert found == ['root', *(f'depth {len(p)} rank {p[-1]}' for p in tree.paths[1:])]
  with pytest.raises(ValueError, match='at least 4'):
    tree.candidate_slots(3)


def test_node_values_agree_with_the_theory():
  tree = static_trees.kary((3, 2, 2))
  acceptance = static_trees.node_acceptance(tree, BY_DEPTH)
  values = static_trees.node_values(tree, BY_DEPTH)
  np.testing.assert_allclose(values, [_path_value(p, BY_DEPTH) for p in tree.paths], rtol=1e-14)
  with jax.enable_x64(True):
    expected = theory.expected_tokens_tree(tree.parents, acceptance)
  np.testing.assert_allclose(values.sum(), expected, rtol=1e-14)
  with pytest.raises(ValueError, match='larger table'):
    static_trees.node_values(static_trees.chain(4), BY_DEPTH)


# --- Best by product ---------------------------------------------------------------------------


@pytest.mark.parametrize('num_nodes', [1, 2, 5, 6])
def test_top_product_equals_the_best_of_all_closed_sets(num_nodes):
  rng = np.random.default_rng(num_nodes)
  every = static_trees.kary((2, 2, 2)).paths
  for _ in range(5):
    table = rng.dirichlet(np.ones(3), size=3)[:, :2]  # ranks need not fall
    tree = static_trees.top_product(table, num_nodes)
    assert tree.num_nodes == num_nodes
    best = max(
      sum(_path_value(path, table) for path in paths) for paths in _closed_sets(every, num_nodes)
    )
    np.testing.assert_allclose(static_trees.node_values(tree, table).sum(), best, rtol=1e-13)


def test_top_product_may_skip_a_rank_and_breaks_ties_toward_the_root():
  tree = static_trees.top_product(np.array([[0.1, 0.5]]), 2)
  assert tree.paths == ((), (1,))
  tied = static_trees.top_product(np.array([[0.5, 0.5], [1.0, 0.0]]), 4)
  assert tied.paths == ((), (0,), (1,), (0, 0))


def test_top_product_fills_its_budget_even_with_worthless_nodes():
  tree = static_trees.top_product(np.array([[1.0, 0.0], [1.0, 0.0]]), 7)
  assert tree == static_trees.kary((2, 2))
  with pytest.raises(ValueError, match='only 7'):
    static_trees.top_product(np.array([[1.0, 0.0], [1.0, 0.0]]), 8)


# --- Sequoia -----------------------------------------------------------------------------------


def _best_of_all(acceptance, num_nodes, max_depth, max_children):
  table = np.tile(acceptance, (num_nodes, 1))
  values = [
    sum(_path_value(path, table) for path in paths)
    for paths in _ordered_trees(num_nodes)
    if all(len(path) <= max_depth and max(path, default=0) < max_children for path in paths)
  ]
  return max(values, default=None)


@pytest.mark.parametrize('num_nodes', range(1, 8))
def test_sequoia_equals_the_best_of_all_trees(num_nodes):
  rng = np.random.default_rng(num_nodes)
  for _ in range(6):
    acceptance = rng.dirichlet(np.full(7, 0.5))[:6]  # in any order
    for max_depth, max_children in ((6, 6), (2, 6), (6, 2), (3, 3), (1, 6)):
      best = _best_of_all(acceptance, num_nodes, max_depth, max_children)
      build = functools.partial(
        static_trees.sequoia, max_depth=max_depth, max_children=max_children
      )
      if best is None:
        with pytest.raises(ValueError, match='No tree'):
          build(acceptance, num_nodes)
        continue
      tree = build(acceptance, num_nodes)
      assert tree.num_nodes == num_nodes
      assert tree.max_depth <= max_depth
      assert tree.children.shape[1] <= max_children
      value = static_trees.node_values(tree, acceptance).sum()
      np.testing.assert_allclose(value, best, rtol=1e-13)


def test_sequoia_drafts_siblings_in_order_even_if_a_later_one_is_worth_more():
  tree = static_trees.sequoia(np.array([0.1, 0.8]), 3)
  assert tree.paths == ((), (0,), (1,))


def test_sequoia_with_falling_acceptance_is_the_best_by_product():
  for num_nodes in (2, 30, 256):
    tree = static_trees.sequoia(ACCEPTANCE, num_nodes)
    by_product = static_trees.top_product(np.tile(ACCEPTANCE, (num_nodes, 1)), num_nodes)
    np.testing.assert_allclose(
      static_trees.node_values(tree, ACCEPTANCE).sum(),
      static_trees.node_values(by_product, ACCEPTANCE).sum(),
      rtol=1e-13,
    )


@pytest.mark.parametrize('first', [0.5, 0.9, 0.999])
def test_sequoia_builds_256_nodes(first):
  acceptance = np.concatenate([[first], np.full(31, (1 - first) / 40)])
  tree = static_trees.sequoia(acceptance, 256)
  assert tree.num_nodes == 256


def test_sequoia_gains_with_nodes_and_depth():
  def value(num_nodes, **limits):
    tree = static_trees.sequoia(ACCEPTANCE, num_nodes, **limits)
    return static_trees.node_values(tree, ACCEPTANCE).sum()

  assert (np.diff([value(n) for n in range(1, 40)]) >= 0).all()
  assert (np.diff([value(40, max_depth=d) for d in range(2, 12)]) >= -1e-12).all()


def test_sequoia_is_a_chain_if_only_the_first_sibling_is_ever_kept():
  assert static_trees.sequoia(np.array([0.7, 0, 0]), 12) == static_trees.chain(11)


def _every_sequoia(acceptance, max_nodes):
  for num_nodes in range(1, max_nodes + 1):
    for max_depth in range(num_nodes):
      try:
        yield static_trees.sequoia(acceptance, num_nodes, max_depth=max_depth)
      except ValueError:
        continue  # too shallow for so many nodes


@pytest.mark.parametrize('draft_step_ms', [0.0, 0.7, 4.0])
def test_best_sequoia_equals_trying_every_size_and_depth(draft_step_ms):
  acceptance = ACCEPTANCE[:5]
  choice = static_trees.best_sequoia(
    acceptance, CURVE, draft_step_ms=draft_step_ms, max_nodes=14, overhead_ms=0.3
  )
  rates = []
  for tree in _every_sequoia(acceptance, 14):
    round_ms = np.interp(tree.num_nodes, *CURVE) + tree.max_depth * draft_step_ms
    round_ms += 0.3 * (tree.num_nodes > 1)
    rates.append(static_trees.node_values(tree, acceptance).sum() / round_ms)
  np.testing.assert_allclose(choice.speedup, max(rates) * 10.0, rtol=1e-12)
  value = static_trees.node_values(choice.tree, acceptance).sum()
  np.testing.assert_allclose(choice.expected_tokens, value, rtol=1e-12)
  np.testing.assert_allclose(choice.speedup, value * 10.0 / choice.round_ms, rtol=1e-12)


def test_best_sequoia_agrees_with_the_general_speedup():
  choice = static_trees.best_sequoia(ACCEPTANCE, CURVE, draft_step_ms=0.5)
  with jax.enable_x64(True):
    speedup = theory.walltime_general(
      choice.expected_tokens,
      CURVE,
      block_size=choice.tree.num_nodes,
      num_draft_steps=choice.tree.max_depth,
      draft_step_ms=0.5,
    )
  np.testing.assert_allclose(choice.speedup, speedup, rtol=1e-12)


def test_best_sequoia_does_not_draft_where_drafting_loses():
  choice = static_trees.best_sequoia(ACCEPTANCE, CURVE, draft_step_ms=100.0)
  assert choice.tree == static_trees.chain(0)
  assert (choice.expected_tokens, choice.round_ms, choice.speedup) == (1.0, 10.0, 1.0)


# --- Prompt tokens -----------------------------------------------------------------------------


def _prompt_policies(table, depth, num_inputs):
  """Every (tokens per call, probability of each next state) that a state can choose."""
  outcomes = set()
  capacity = sum(table.shape[1] ** d for d in range(depth + 1))
  for size in range(1, min(num_inputs, capacity) + 1):
    if depth == 0 and size > 1:
      break
    tree = static_trees.top_product(table[: max(depth, 1)], size)
    values = [_path_value(path, table) for path in tree.paths]
    endings = np.array(values)
    for path, value in zip(tree.paths[1:], values[1:], strict=True):
      endings[tree.paths.index(path[:-1])] -= value
    for prompts in itertools.product(range(len(table) + 1), repeat=size):
      if size + sum(prompts) <= num_inputs:
        law = np.zeros(len(table) + 1)
        np.add.at(law, list(prompts), endings)
        outcomes.add((float(np.sum(values)), *law))
  return np.array(sorted(outcomes))


def _long_run(transitions, tokens):
  """Tokens per call, averaged over many rounds from state 0, for a batch of policies."""
  power = (transitions + np.eye(tokens.shape[-1])) / 2
  for _ in range(40):
    power = power @ power
    power /= power.sum(-1, keepdims=True)
  return (power[:, 0] * tokens).sum(-1)


@pytest.mark.parametrize(('num_inputs', 'max_prompts'), [(3, 1), (5, 1), (7, 1), (4, 2), (6, 2)])
def test_ppd_equals_the_best_of_all_policies(num_inputs, max_prompts):
  rng = np.random.default_rng(num_inputs)
  tables = [rng.dirichlet(np.ones(3), size=max_prompts)[:, :2] for _ in range(5)]
  tables.append(np.tile([1.0, 0.0], (max_prompts, 1)))  # here many actions are equally good
  for table in tables:
    built = static_trees.ppd(table, num_inputs, max_prompts=max_prompts)
    states = [_prompt_policies(table, d, num_inputs) for d in range(max_prompts + 1)]
    choices = np.meshgrid(*(np.arange(len(actions)) for actions in states), indexing='ij')
    policies = np.stack(
      [actions[choice.ravel()] for actions, choice in zip(states, choices, strict=True)], axis=1
    )
    best = _long_run(policies[..., 1:], policies[..., 0]).max()
    np.testing.assert_allclose(built.value, best, rtol=1e-10)


@pytest.mark.parametrize('num_inputs', [1, 2, 3, 9, 30])
def test_ppd_is_consistent(num_inputs):
  built = static_trees.ppd(BY_DEPTH, num_inputs)
  np.testing.assert_allclose(built.transitions.sum(axis=1), 1, rtol=1e-14)
  for state, (tree, prompts) in enumerate(zip(built.trees, built.num_prompts, strict=True)):
    assert tree.max_depth <= state
    assert prompts.shape == (tree.num_nodes,)
    assert prompts.dtype == np.int32
    assert tree.num_nodes + prompts.sum() <= num_inputs
    assert ((prompts >= 0) & (prompts <= 3)).all()
    values = static_trees.node_values(tree, BY_DEPTH)
    np.testing.assert_allclose(built.expected_tokens[state], values.sum(), rtol=1e-14)
    endings = values.copy()
    np.subtract.at(endings, tree.parents[1:], values[1:])
    for m in range(4):
      np.testing.assert_allclose(
        built.transitions[state, m], endings[prompts == m].sum(), atol=1e-14
      )
  if num_inputs > 1:  # else no round leaves prompts, and the deeper states are never entered
    with jax.enable_x64(True):
      value = theory.markov_tree_value(built.transitions, built.expected_tokens)
      total = theory.stationary_law(built.transitions).sum()
    np.testing.assert_allclose(built.value, value, rtol=1e-12)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_ppd_gains_with_the_budget():
  values = [static_trees.ppd(BY_DEPTH, n).value for n in range(1, 48)]
  assert values[0] == 1
  assert (np.diff(values) >= -1e-12).all()


def test_ppd_with_certain_guesses_is_a_chain_with_all_prompts_on_its_end():
  table = np.tile([1.0, 0.0], (3, 1))
  built = static_trees.ppd(table, 7)
  assert built.trees[3] == static_trees.chain(3)
  np.testing.assert_array_equal(built.num_prompts[3], [0, 0, 0, 3])
  assert built.value == 4
  # With four inputs, prompts in one round and a chain without them in the next.
  np.testing.assert_allclose(static_trees.ppd(table, 4).value, 2.5)


def test_ppd_value_is_reached_in_simulated_rounds():
  built = static_trees.ppd(BY_DEPTH, 16)
  rng = np.random.default_rng(0)
  num_rounds, state, total = 20_000, 0, 0
  cumulative = np.cumsum(BY_DEPTH, axis=1)
  for _ in range(num_rounds):
    tree, prompts = built.trees[state], built.num_prompts[state]
    path = ()
    while len(path) < state:
      rank = int(np.searchsorted(cumulative[len(path)], rng.random(), side='right'))
      if (*path, rank) not in tree.paths:
        break
      path = (*path, rank)
    total += len(path) + 1
    state = prompts[tree.paths.index(path)]
  # Tokens per round differ by 3 at most, and rounds are only weakly dependent.
  np.testing.assert_allclose(total / num_rounds, built.value, atol=5 * 1.5 / num_rounds**0.5)


def test_best_ppd_equals_trying_every_budget():
  choice = static_trees.best_ppd(BY_DEPTH, CURVE)
  speedups = [
    static_trees.ppd(BY_DEPTH, int(n)).value * 10.0 / t for n, t in zip(*CURVE, strict=True)
  ]
  assert choice.speedup == max(speedups)
  assert choice.trees.num_inputs == CURVE.block_sizes[np.argmax(speedups)]
  only = static_trees.best_ppd(BY_DEPTH, CURVE, budgets=[6], max_prompts=1)
  assert (only.trees.num_inputs, only.round_ms) == (6, 11.5)


# --- Several levels at once --------------------------------------------------------------------


def test_in_blocks_tells_where_each_token_comes_from():
  tree = static_trees.kary((2, 1, 2, 1, 1))
  blocks = static_trees.in_blocks(tree, 2)
  for node, path in enumerate(tree.paths):
    if not path:
      assert (blocks.forwards[0], blocks.rows[0], blocks.sources[0]) == (-1, -1, -1)
      continue
    forward, row = divmod(len(path) - 1, 2)
    assert (blocks.forwards[node], blocks.rows[node]) == (forward, row)
    assert tree.paths[blocks.sources[node]] == path[: 2 * forward]
  np.testing.assert_array_equal(blocks.expanded(0), [0])
  assert [tree.paths[n] for n in blocks.expanded(1)] == [(0, 0), (1, 0)]
  assert (blocks.tree.depths[blocks.expanded(2)] == 4).all()


def test_in_blocks_of_one_level_continues_from_the_parent():
  tree = static_trees.top_product(BY_DEPTH, 20)
  blocks = static_trees.in_blocks(tree, 1)
  np.testing.assert_array_equal(blocks.sources, tree.parents)
  np.testing.assert_array_equal(blocks.forwards, tree.depths - 1)


def test_falcon_without_limit_is_the_best_by_product():
  for block_size in (1, 2, 3):
    blocks = static_trees.falcon(BY_DEPTH, 20, block_size)
    assert blocks.tree == static_trees.top_product(BY_DEPTH, 20)
    assert blocks.block_size == block_size


@pytest.mark.parametrize('max_expanded', [1, 2])
def test_falcon_equals_the_best_of_all_trees_within_its_width(max_expanded):
  every = static_trees.kary((2, 2, 2)).paths
  rng = np.random.default_rng(max_expanded)
  for num_nodes in (3, 6, 8):
    table = rng.dirichlet(np.ones(3), size=3)[:, :2]
    table = -np.sort(-table, axis=1)
    best = 0
    for paths in _closed_sets(every, num_nodes):
      expanded = {path[:2] for path in paths if len(path) > 2}
      if len(expanded) <= max_expanded:
        best = max(best, sum(_path_value(path, table) for path in paths))
    blocks = static_trees.falcon(table, num_nodes, 2, max_expanded=max_expanded)
    assert len(blocks.expanded(1)) <= max_expanded
    value = static_trees.node_values(blocks.tree, table).sum()
    np.testing.assert_allclose(value, best, rtol=1e-13)


# --- Pruning -----------------------------------------------------------------------------------


def test_prune_keeps_the_nodes_most_often_accepted():
  template = static_trees.kary((3, 2))
  counts = dict.fromkeys(template.paths, 0)
  rng = np.random.default_rng(0)
  for _ in range(500):
    path = template.paths[rng.choice(template.num_nodes)]
    for depth in range(len(path) + 1):
      counts[path[:depth]] += 1
  hits = np.array([counts[path] for path in template.paths])
  for num_nodes in range(1, template.num_nodes + 1):
    tree = static_trees.prune(template, hits, num_nodes)
    assert tree.num_nodes == num_nodes
    assert set(tree.paths) <= set(template.paths)
    kept = sorted((counts[path] for path in tree.paths), reverse=True)
    assert kept == sorted(hits, reverse=True)[:num_nodes]
  assert tree == template


def test_prune_keeps_ranks_and_breaks_ties_in_template_order():
  template = static_trees.kary((3, 1))
  tree = static_trees.prune(template, np.array([9, 0, 2, 2, 0, 2, 2]), 4)
  assert tree.paths == ((), (1,), (2,), (1, 0))
  nothing = static_trees.prune(template, np.zeros(7, int), 3)
  assert nothing.paths == ((), (0,), (1,))


# --- Inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: static_trees.chain(-1), 'length must be an integer of at least 0, got -1'),
    (
      lambda: static_trees.chain(2.5),  # pyright: ignore
      'got 2.5',
    ),
    (lambda: static_trees.chain(True), 'got True'),
    (lambda: static_trees.kary((2, 0)), r'branching\[1\]'),
    (lambda: static_trees.kary((10,) * 6), 'choose smaller factors'),
    (lambda: static_trees.from_paths([(0, 1)]), r'\(0, 1\) needs its parent \(0,\)'),
    (lambda: static_trees.from_paths([(-1,)]), 'a rank of'),
    (lambda: static_trees.from_paths([], duplicates='keep'), 'refuse'),
    (lambda: static_trees.top_product(ACCEPTANCE, 4), 'repeats one row'),
    (lambda: static_trees.top_product(BY_DEPTH, 0), 'num_nodes'),
    (lambda: static_trees.top_product(BY_DEPTH, 10**6), 'at most 4096'),
    (lambda: static_trees.top_product(np.array([[0.7, 0.6]]), 2), 'exactly this sibling'),
    (lambda: static_trees.top_product(np.array([[1.7]]), 2), 'probabilities'),
    (lambda: static_trees.top_product(np.array([[np.nan]]), 2), 'probabilities'),
    (lambda: static_trees.sequoia(BY_DEPTH, 4), 'one entry per sibling'),
    (lambda: static_trees.sequoia(ACCEPTANCE, 10, max_depth=1), 'No tree'),
    (lambda: static_trees.sequoia(ACCEPTANCE, 4, max_children=9), 'wider star'),
    (lambda: static_trees.sequoia(ACCEPTANCE, 4, max_depth=-1), 'max_depth'),
    (
      lambda: static_trees.best_sequoia(ACCEPTANCE, CURVE, draft_step_ms=-1),
      'draft_step_ms must be a time',
    ),
    (
      lambda: static_trees.best_sequoia(ACCEPTANCE, CURVE, draft_step_ms=1, max_nodes=33),
      'measured from 1 to 32',
    ),
    (
      lambda: static_trees.best_ppd(BY_DEPTH, theory.CostCurve(np.array([2]), np.array([1.0]))),
      'rise strictly from 1',
    ),
    (
      lambda: static_trees.best_ppd(BY_DEPTH, theory.CostCurve(np.array([1]), np.array([0.0]))),
      'positive milliseconds',
    ),
    (lambda: static_trees.best_ppd(BY_DEPTH, CURVE._replace(times_ms=np.ones(2))), 'one time per'),
    (lambda: static_trees.best_ppd(BY_DEPTH, CURVE, budgets=[]), 'at least one'),
    (lambda: static_trees.ppd(BY_DEPTH, 8, max_prompts=4), 'measure more depths'),
    (lambda: static_trees.ppd(BY_DEPTH, 0), 'num_inputs'),
    (lambda: static_trees.in_blocks(static_trees.chain(2), 0), 'block_size'),
    (lambda: static_trees.falcon(BY_DEPTH, 20, 1, max_expanded=1), 'ask for fewer'),
    (lambda: static_trees.prune(static_trees.chain(2), np.ones(2), 2), 'one count per node'),
    (lambda: static_trees.prune(static_trees.chain(2), np.ones(3), 4), 'cannot keep'),
    (lambda: static_trees.prune(static_trees.chain(2), np.arange(3), 2), 'of the parent'),
    (lambda: static_trees.prune(static_trees.chain(2), -np.ones(3), 2), 'at least 0'),
  ],
)
def test_wrong_input_is_refused_with_the_remedy(build, message):
  with pytest.raises(ValueError, match=message):
    build()

"""The loop round by round: its Python twin, its counters, and what is in the caches between rounds.

Axes: `B` batch, `N` nodes, `D` depth, `S` slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import drafters
from decodax.types import Result
from tests.decodax.zoo import BATCH
from tests.decodax.zoo import CAPACITY
from tests.decodax.zoo import PROMPT_LENGTHS
from tests.decodax.zoo import VOCAB_SIZE
from tests.decodax.zoo import Compiled
from tests.decodax.zoo import assert_same_output
from tests.decodax.zoo import make_request
from tests.decodax.zoo import make_script

_NUM_NODES = 9  # of the zoo's tree


class History(NamedTuple):
  """A generation by the Python loop, with what the compiled loop made of the same request."""

  drafter: str
  params: decodax.Params
  request: decodax.Request
  before: list[decodax.DecodeState]  # one per round
  infos: list[decodax.RoundInfo]
  final: decodax.DecodeState
  compiled: decodax.DecodeResult


def start(params, request, **options):
  """Returns the state with the prompt read."""
  return decodax.prefill(params, decodax.init_state(params, request, **options), **options)


@pytest.fixture(
  scope='module',
  params=[('draft_model', 'speculative'), ('tree', 'coupled'), ('scripted', 'greedy')],
  ids=lambda pair: '-'.join(pair),
)
def history(zoo, request):
  drafter, verifier = request.param
  request = make_request()
  text = zoo.plain('greedy' if verifier == 'greedy' else 'coupled', request).tokens
  own = zoo.other_params if drafter == 'draft_model' else make_script(text)
  params = decodax.Params(zoo.params, own)
  before, infos = [], []
  step = zoo.compiled(decodax.speculative_step, drafter, verifier=verifier)

  def recording_step(params, state):
    after, info = step(params, state)
    before.append(jax.device_get(state._replace(rng_keys=())))
    infos.append(jax.device_get(info))
    return after, info

  state = zoo.compiled(start, drafter)(params, request)
  final = decodax.generate(params, state, step_fn=recording_step, loop_fn=decodax.python_while_loop)
  compiled = zoo.decode(drafter, verifier)(params, request)
  return History(drafter, params, request, before, infos, final, jax.device_get(compiled))


# --- The twin ------------------------------------------------------------------------------------


def test_the_python_loop_equals_the_compiled_one(history):
  result = jax.device_get(decodax.finish(history.final))
  assert_same_output(result, history.compiled)
  for name, count in result.stats._asdict().items():
    np.testing.assert_array_equal(count, getattr(history.compiled.stats, name), err_msg=name)


def test_prefill_in_a_python_loop_equals_the_compiled_one(zoo):
  model = zoo.model._replace(extend=jax.jit(zoo.model.extend), commit=jax.jit(zoo.model.commit))
  drafter = drafters.draft_model(model)
  params, request = decodax.Params(zoo.params, zoo.other_params), make_request()
  options: dict[str, Any] = dict(model=model, drafter=drafter, prefill_chunk=8)
  state = decodax.init_state(params, request, **options)
  twin = decodax.prefill(params, state, loop_fn=decodax.python_while_loop, **options)
  compiled = Compiled(functools.partial(decodax.prefill, **options))(params, state)
  for ours, theirs in zip(jax.tree.leaves(twin), jax.tree.leaves(compiled), strict=True):
    if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
      ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  np.testing.assert_array_equal(twin.cache.length, np.asarray(PROMPT_LENGTHS) - 1)


# --- Counters ------------------------------------------------------------------------------------


def _depth(parents, node):
  return 0 if node == 0 else 1 + _depth(parents, parents[node])


def _recount(history):
  """Returns the statistics as their definitions say, counted row by row in Python."""
  max_depth = history.infos[0].verdict.path.shape[1] - 1
  counts = {
    name: np.zeros((BATCH, max_depth) if name.endswith('_at') else BATCH, int)
    for name in decodax.Stats._fields
  }
  for state, info in zip(history.before, history.infos, strict=True):
    for row in np.flatnonzero(state.result == Result.RUNNING):
      proposal, verdict = info.proposal, info.verdict
      parents, num_accepted = proposal.parents[row], int(verdict.num_accepted[row])
      valid = [node for node in range(1, len(parents)) if proposal.valid[row, node]]
      path = verdict.path[row, : num_accepted + 1].tolist()
      emitted = int(info.num_emitted[row])
      drafted = [int(proposal.tokens[row, node]) for node in path[1:]]
      counts['num_target_calls'][row] += 1
      counts['num_emitted'][row] += emitted
      counts['num_drafted'][row] += len(valid)
      # Every emitted token but the verifier's own was drafted.
      assert info.tokens[row, :emitted].tolist() == [*drafted, verdict.next_token[row]][:emitted]
      counts['num_accepted'][row] += min(emitted, num_accepted)
      for depth in range(max_depth):
        below = [node for node in valid if _depth(parents, node) == depth + 1]
        counts['num_proposed_at'][row, depth] += bool(below)
        if depth < len(path):
          tested = [node for node in below if parents[node] == path[depth]]
          counts['num_tested_at'][row, depth] += bool(tested)
        counts['num_accepted_at'][row, depth] += num_accepted > depth
  return counts


def test_statistics_follow_their_definitions(history):
  stats = jax.device_get(history.final.stats)
  for name, count in _recount(history).items():
    np.testing.assert_array_equal(getattr(stats, name), count, err_msg=name)
  length = np.asarray(history.final.length)
  np.testing.assert_array_equal(stats.num_emitted, length - PROMPT_LENGTHS)
  np.testing.assert_array_equal(stats.num_target_calls, history.final.round)
  for deeper, shallower in (('accepted', 'tested'), ('tested', 'proposed')):
    smaller, larger = (getattr(stats, f'num_{name}_at') for name in (deeper, shallower))
    assert np.all(smaller <= larger) and np.any(smaller < larger), (deeper, smaller, larger)


def test_every_live_row_makes_progress_and_done_rows_keep_everything(history):
  after = [*history.before[1:], jax.device_get(history.final._replace(rng_keys=()))]
  stopped_early = False
  for old, new, info in zip(history.before, after, history.infos, strict=True):
    live = old.result == Result.RUNNING
    assert np.all(info.num_emitted[live] >= 1)
    np.testing.assert_array_equal(new.length, old.length + info.num_emitted)
    slots = np.arange(CAPACITY)[None]
    fresh = (slots >= old.length[:, None]) & (slots < new.length[:, None])
    np.testing.assert_array_equal(new.tokens[~fresh], old.tokens[~fresh])
    assert not np.any(new.tokens[slots >= new.length[:, None]])
    stopped_early |= bool(np.any(~live))
    for name in ('tokens', 'length', 'round', 'result', 'stats', 'seen'):
      _assert_rows_equal(getattr(new, name), getattr(old, name), ~live)
    np.testing.assert_array_equal(new.cache.length[~live], old.cache.length[~live])
  assert stopped_early  # rows end at different times, or this test shows nothing


def _assert_rows_equal(new, old, rows):
  for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
    np.testing.assert_array_equal(ours[rows], theirs[rows])


def test_tokens_seen_are_those_of_the_row(history):
  for state in (*history.before, history.final):
    seen = np.asarray(state.seen)
    for row in range(BATCH):
      expected = np.unique(np.asarray(state.tokens)[row, : state.length[row]])
      np.testing.assert_array_equal(np.flatnonzero(seen[row]), expected)


# --- Caches --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def read_all(zoo):
  """Returns (params, tokens i32[B, S]) -> logits and keys and values of one plain forward pass."""

  def run(params, tokens):
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    empty = zoo.model.init_cache(params, batch, 1)
    output, block = zoo.model.extend(params, empty, tokens, positions, mask)
    return zoo.model.unembed(params, output.hidden), block

  return Compiled(run)


def _assert_cache_holds(cache, block, lengths):
  np.testing.assert_array_equal(cache.length, lengths)
  for row, length in enumerate(lengths):
    np.testing.assert_array_equal(cache.positions[row, :length], np.arange(length))
    for name in ('keys', 'values'):
      ours = np.asarray(getattr(cache, name))[:, row, :, :length]
      theirs = np.asarray(getattr(block, name))[:, row, :, :length]
      np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f'{name} of row {row}')


def test_the_cache_is_that_of_a_fresh_prefill(history, read_all):
  """After every round, chain or tree, it holds all committed tokens but the root."""
  states = [*history.before[1:], history.final]
  for state in (*states[:3], states[-1]):
    _, block = read_all(history.params.target, jnp.asarray(state.tokens))
    _assert_cache_holds(state.cache, jax.device_get(block), np.asarray(state.length) - 1)


def test_the_draft_models_cache_is_that_of_a_fresh_prefill(history, read_all):
  for state in history.before[1:]:
    caches = _caches_in(state.drafter)
    assert len(caches) == (history.drafter == 'draft_model')
    for cache in caches:
      # It never holds more than the target's, and lacks at most a last draft that was accepted.
      lag = np.asarray(state.length - 1 - cache.length)[state.result == Result.RUNNING]
      assert np.all((lag >= 0) & (lag <= 1)), lag
      _, block = read_all(history.params.drafter, jnp.asarray(state.tokens))
      _assert_cache_holds(cache, jax.device_get(block), cache.length)


def _caches_in(tree):
  is_cache = lambda node: isinstance(node, decodax.kv_cache.KVCache)  # noqa: E731
  return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_cache) if is_cache(leaf)]


# --- Trees ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tree_logits(zoo):
  """Returns (params, state, proposal) -> logits f32[B, N, V] of the tree's nodes."""

  def run(params, state, proposal):
    mask = decodax.trees.ancestor_mask(proposal.parents)
    positions = state.length[:, None] + mask.sum(-1, dtype=jnp.int32) - 2
    output, _ = zoo.model.extend(params, state.cache, proposal.tokens, positions, mask)
    return zoo.model.unembed(params, output.hidden)

  return Compiled(run)


def _random_proposal(seed, roots):
  rng = np.random.default_rng(seed)
  parents = np.stack([[rng.integers(0, max(n, 1)) for n in range(_NUM_NODES)] for _ in roots])
  parents[:, 0] = -1
  tokens = rng.integers(0, VOCAB_SIZE, parents.shape)
  tokens[:, 0] = roots
  return decodax.Proposal(
    jnp.asarray(tokens, jnp.int32), jnp.asarray(parents, jnp.int32), jnp.ones(tokens.shape, bool)
  )


def test_the_logits_of_a_node_are_those_of_its_path(zoo, read_all, tree_logits):
  """What a plain forward pass over the prefix and the node's path gives."""
  request = make_request()
  params = decodax.Params(zoo.params)
  state = zoo.compiled(start, 'plain')(params, request)
  length = np.asarray(state.length)
  roots = np.asarray(state.tokens)[np.arange(BATCH), length - 1]
  for seed in range(3):
    proposal = _random_proposal(seed, roots)
    parents = np.asarray(proposal.parents)
    logits = np.asarray(tree_logits(zoo.params, state, proposal))
    for node in range(_NUM_NODES):
      text, last = np.array(state.tokens), np.zeros(BATCH, int)
      for row in range(BATCH):
        path = [node]
        while parents[row, path[0]] >= 0:
          path.insert(0, parents[row, path[0]])
        text[row, length[row] - 1 :][: len(path)] = np.asarray(proposal.tokens)[row, path]
        last[row] = length[row] + len(path) - 2
      expected = np.asarray(read_all(zoo.params, jnp.asarray(text))[0])[np.arange(BATCH), last]
      np.testing.assert_allclose(logits[:, node], expected, atol=1e-5 * np.abs(logits).max())


def test_nodes_off_a_path_do_not_change_it(zoo, tree_logits):
  request = make_request()
  params = decodax.Params(zoo.params)
  state = zoo.compiled(start, 'plain')(params, request)
  roots = np.asarray(state.tokens)[np.arange(BATCH), np.asarray(state.length) - 1]
  proposal = _random_proposal(0, roots)
  mask = np.asarray(decodax.trees.ancestor_mask(proposal.parents))
  logits = np.asarray(tree_logits(zoo.params, state, proposal))
  for node in (_NUM_NODES - 1, _NUM_NODES // 2):
    garbage = np.random.default_rng(node).integers(0, VOCAB_SIZE, mask.shape[:2])
    tokens = jnp.where(mask[:, node], proposal.tokens, garbage.astype(np.int32))
    assert np.any(tokens != proposal.tokens)
    others = np.asarray(tree_logits(zoo.params, state, proposal._replace(tokens=tokens)))
    np.testing.assert_array_equal(others[:, node], logits[:, node])
    assert np.any(others != logits)

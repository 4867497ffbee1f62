"""Parallel prompt decoding on a target whose answers are given: blocks, rounds and states.

Axes: `S` slots, `K` prompt tokens, `V` vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import drafters
from decodax import static_trees
from decodax import trees as trees_lib
from decodax import verifiers
from decodax.drafters.prompt_tokens import lay_out
from decodax.types import DraftShape
from decodax.types import Model
from decodax.types import ModelOutput
from tests.decodax.zoo import Compiled

_V, _SLOTS = 12, 128
_TABLE = np.array([[0.5, 0.2, 0.1], [0.4, 0.2, 0.1], [0.3, 0.15, 0.1]])
_CERTAIN = np.array([[1.0, 0.0]] * 3)


def _trees(num_inputs, table=_TABLE):
  return static_trees.ppd(table, num_inputs)


# --- A target that answers by position only ------------------------------------------------------


class _Answers(NamedTuple):
  """Its parameters: it is certain of `text`, and its prompt tokens have the text at some rank."""

  text: jax.Array  # i32[S]
  ranks: jax.Array  # i32[S, K] of the text's next token, for prompt token k read at a place


class _Cache(NamedTuple):
  tokens: jax.Array  # i32[B, S]
  length: jax.Array  # i32[B]


def _model(num_copies=1) -> Model:
  def init_cache(params, batch_size, capacity):
    del params
    return _Cache(jnp.zeros((batch_size, capacity), jnp.int32), jnp.zeros((batch_size,), jnp.int32))

  def extend(params, cache, tokens, positions, mask, *, embeddings=None):
    del params, cache, mask
    if embeddings is not None:
      assert embeddings.shape == (3 * num_copies, 1)
    return ModelOutput(jnp.stack([tokens, positions], axis=-1)), tokens

  def commit(cache, block, path, count):
    kept = jnp.take_along_axis(block, path, axis=1)
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    return _Cache(write(cache.tokens, kept, cache.length), cache.length + count)

  def unembed(params, hidden):
    tokens, positions = hidden[..., 0], jnp.minimum(hidden[..., 1], _SLOTS - 2)
    right = params.text[positions + 1][..., None]
    every = jax.lax.broadcasted_iota(jnp.int32, (*tokens.shape, _V), tokens.ndim)
    behind = jnp.mod(every - right, _V)  # 0 for the right token, else 1, 2, ...
    prompt = jnp.clip((tokens - _V) // num_copies, 0, params.ranks.shape[1] - 1)
    rank = jnp.where(tokens >= _V, params.ranks[positions, prompt], 0)[..., None]
    return jnp.where(behind == 0, -rank - 0.5, -behind.astype(jnp.float32)) * 50

  return Model(init_cache, extend, commit, unembed, _V)


def _answers(table, seed=0) -> _Answers:
  rng = np.random.default_rng(seed)
  chances = np.append(table, 1 - table.sum(1, keepdims=True), axis=1)
  ranks = [rng.choice(table.shape[1] + 1, _SLOTS, p=row / row.sum()) for row in chances]
  text = rng.integers(0, _V, _SLOTS)
  return _Answers(jnp.asarray(text, jnp.int32), jnp.asarray(np.stack(ranks, 1), jnp.int32))


_LENGTHS = (1, 2, 9)


def _run(trees, answers, *, num_copies=1, num_new=90, eos_ids=(), capacity=_SLOTS, rows=_LENGTHS):
  """Returns the final state of the compiled loop, greedy."""
  model = _model(num_copies)
  drafter = drafters.prompt_tokens(
    trees, vocab_size=_V, num_copies=num_copies, embeddings_fn=lambda params: params.drafter
  )
  step_fn = decodax.make_step_fn(model=model, drafter=drafter, verifier=verifiers.coupled)
  prompts = [np.asarray(answers.text)[:length].tolist() for length in rows]
  request = decodax.make_request(
    prompts, max_new_tokens=1, vocab_size=_V, eos_ids=eos_ids, capacity=capacity
  )
  request = request._replace(max_new_tokens=jnp.full((len(rows),), num_new, jnp.int32))

  @Compiled
  def run(params, request):
    state = decodax.init_state(params, request, model=model, drafter=drafter)
    state = decodax.prefill(params, state, model=model, drafter=drafter)
    return decodax.generate(params, state, step_fn=step_fn)

  params = decodax.Params(answers, jnp.zeros((3 * num_copies + 2, 1)))
  return jax.device_get(run(params, request))


def _simulate(trees, ranks, root, num_new):
  """Returns i[], the calls that `num_new` tokens take from a root at place `root` on."""
  state = emitted = calls = 0
  while emitted < num_new:
    index = {path: node for node, path in enumerate(trees.trees[state].paths)}
    path: tuple[int, ...] = ()
    while len(path) < state:
      longer = (*path, int(ranks[root + len(path), len(path)]))
      if longer not in index:
        break
      path = longer
    state = int(trees.num_prompts[state][index[path]])
    emitted, calls, root = emitted + len(path) + 1, calls + 1, root + len(path) + 1
  return calls


@pytest.mark.parametrize(
  ('num_inputs', 'num_copies', 'table'),
  [(4, 1, _CERTAIN), (8, 1, _CERTAIN), (6, 1, _TABLE), (14, 1, _TABLE), (9, 3, _TABLE)],
)
def test_rounds_are_those_of_the_simulation(num_inputs, num_copies, table):
  trees, answers = _trees(num_inputs, table), _answers(table)
  state = _run(trees, answers, num_copies=num_copies)
  for row, length in enumerate(_LENGTHS):
    end = length + 90
    np.testing.assert_array_equal(state.tokens[row, :end], answers.text[:end])
    # What the cache holds is the text: no prompt token, and no draft that was wrong.
    np.testing.assert_array_equal(state.cache.length[row], end - 1)
    np.testing.assert_array_equal(state.cache.tokens[row, : end - 1], answers.text[: end - 1])
    calls = _simulate(trees, np.asarray(answers.ranks), length - 1, 90)
    assert state.stats.num_target_calls[row] == calls


@pytest.mark.parametrize('num_inputs', [6, 14])
def test_long_runs_emit_what_the_builder_promised(num_inputs):
  """20000 rounds or so; the standard error is below 0.01, the builder's other values farther."""
  trees, rng, num_new = _trees(num_inputs), np.random.default_rng(1), 30_000
  chances = np.append(_TABLE, 1 - _TABLE.sum(1, keepdims=True), axis=1)
  ranks = np.stack([rng.choice(4, num_new + 8, p=row) for row in chances], axis=1)
  assert abs(num_new / _simulate(trees, ranks, 0, num_new) - trees.value) < 0.03


def test_certain_guesses_reach_the_builders_value():
  trees = _trees(8, _CERTAIN)
  state = _run(trees, _answers(_CERTAIN), num_new=96, rows=(5,))
  assert trees.value > 2
  assert abs(96 / state.stats.num_target_calls[0] - trees.value) < 0.2


def test_stops_and_limits_cut_a_round():
  answers, trees = _answers(_CERTAIN), _trees(8, _CERTAIN)
  text = np.asarray(answers.text)
  stop = int(text[30])
  eos = _run(trees, answers, eos_ids=(stop,))
  for row, length in enumerate(_LENGTHS):
    first = length + int(np.argmax(text[length:] == stop))
    assert eos.result[row] == decodax.Result.EOS and eos.length[row] == first + 1
  for num_new in (1, 2, 3, 5):
    assert (_run(trees, answers, num_new=num_new).length == np.add(_LENGTHS, num_new)).all()
  full = _run(trees, answers, num_new=90, capacity=23)
  assert (full.length == 23).all() and (full.result == decodax.Result.CAPACITY).all()
  np.testing.assert_array_equal(full.tokens, np.tile(text[:23], (3, 1)))


# --- Blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_copies', [1, 3])
@pytest.mark.parametrize('num_inputs', [4, 7, 16])
def test_what_nodes_see_is_brute_force(num_inputs, num_copies):
  """A prompt token sees its node's path and those before it of its own copy, and nothing else."""
  trees = _trees(num_inputs)
  blocks = lay_out(trees, num_ranks=3, num_copies=num_copies)
  width = blocks.parents.shape[1]
  max_depth = max(tree.max_depth for tree in trees.trees)
  if num_copies == 1:
    assert width == max(num_inputs, 2 + max_depth)
  parents, valid, sources, *_ = (jnp.asarray(a) for a in blocks)
  proposal = decodax.Proposal(sources, parents, valid)
  shape = DraftShape(width, max_depth, drafters.plain().shape.candidates)
  mask, depths = jax.device_get(trees_lib.topology(proposal, shape))
  for state, (tree, counts) in enumerate(zip(trees.trees, trees.num_prompts, strict=True)):
    names: list[tuple] = [(node,) for node in range(tree.num_nodes)]
    names += [
      (node, prompt, copy)
      for node in range(tree.num_nodes)
      for prompt in range(counts[node])
      for copy in range(num_copies)
    ]
    assert blocks.valid[state].tolist() == [i < tree.num_nodes for i in range(width)]
    for i, (node, *mine) in enumerate(names):
      for j, (other, *its) in enumerate(names):
        sees = bool(tree.ancestors[node, other]) and not its
        if mine and its:
          sees = node == other and mine[1] == its[1] and its[0] <= mine[0]
        assert mask[state, i, j] == sees
      assert depths[state, i] == tree.depths[node] + (mine[0] + 1 if mine else 0)
      assert not mask[state, i, len(names) :].any()
      if mine:
        assert blocks.sources[state, i] == 1 + 3 * 3 + mine[0] * num_copies + mine[1]
        assert blocks.prompts[state, node, mine[0] * num_copies + mine[1]] == i
    np.testing.assert_array_equal(blocks.available[state, : tree.num_nodes], counts)
    np.testing.assert_array_equal(blocks.sources[state, : tree.num_nodes], tree.candidate_slots(3))


def test_nonsense_is_refused():
  make = functools.partial(
    drafters.prompt_tokens, vocab_size=_V, embeddings_fn=lambda params: params.drafter
  )
  with pytest.raises(ValueError, match='num_copies must be at least 1'):
    make(_trees(8), num_copies=0)
  with pytest.raises(ValueError, match='nothing to draft'):
    make(_trees(1))
  with pytest.raises(ValueError, match='have 3 ranks, the vocabulary 2 tokens'):
    make(_trees(16), vocab_size=2)
  trees = _trees(8)
  with pytest.raises(ValueError, match='guesses for m depths'):
    make(trees._replace(trees=trees.trees[::-1], num_prompts=trees.num_prompts[::-1]))
  with pytest.raises(ValueError, match='a vocabulary of 12 tokens, the target one of 13'):
    decodax.make_step_fn(
      model=_model()._replace(vocab_size=13), drafter=make(trees), verifier=verifiers.coupled
    )

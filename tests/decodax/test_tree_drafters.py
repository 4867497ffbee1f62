"""Tree drafters: what they propose, by brute force; that it is lossless; that caches keep up."""

import functools
import heapq
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import decodax
from decodax import drafters
from decodax import static_trees
from decodax import verifiers
from decodax.decode import init_state
from decodax.decode import prefill
from decodax.drafters import dynamic_tree
from decodax.noise import RoundKeys
from decodax.types import Candidates
from models.adapter import as_model
from tests.decodax import zoo as zoo_lib
from tests.table_model import random_table
from tests.table_model import sequence_law
from tests.table_model import table_model

V = 6
BUSH = static_trees.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)])
MODEL = table_model(V)
TARGET, DRAFT = (jnp.asarray(random_table(s, V, sharpness=1.5), jnp.float32) for s in (1, 2))
PARAMS = decodax.Params(TARGET, DRAFT)


def _drafters(expander):
  """Every tree drafter, by name, small."""
  kinds = Candidates.DETERMINISTIC, Candidates.WITHOUT_REPLACEMENT, Candidates.IID
  return {
    **{
      f'static-{kind.value}': drafters.static_tree(expander, BUSH, candidates=kind)
      for kind in (*kinds, Candidates.TOP_AND_ONE)
    },
    'eagle2': drafters.eagle2_tree(expander, num_nodes=12, max_depth=4, beam_width=3),
    'dyspec': drafters.dyspec_tree(
      expander, num_nodes=12, max_depth=4, beam_width=3, max_children=4
    ),
    'beam': drafters.stochastic_beam_tree(expander, beam_width=3, max_depth=3),
  }


TABLE_DRAFTERS = _drafters(drafters.model_expander(MODEL))


def _request(*, temperature: Any = 1.0, max_new_tokens: Any = 16, top_k: Any = 0):
  """Eight rows with contexts (1, 2), (2, 2), (3, 2), (1, 2), .. and keys of their own."""
  prompts = [[1 + row % 3, 2] for row in range(8)]
  return decodax.make_request(
    prompts, max_new_tokens=max_new_tokens, vocab_size=V, temperature=temperature, top_k=top_k,
    capacity=64,
  )  # fmt: skip


@functools.cache
def _proposer(name):
  """Compiled: (params, request) -> the first proposal of a drafter by name, and its state."""
  return _compile_proposer(TABLE_DRAFTERS[name])


def _compile_proposer(drafter, noise_fn=RoundKeys.draft_gumbel, with_laws=True):
  def propose(params, request):
    state = init_state(params, request, model=MODEL, drafter=drafter)
    state = prefill(params, state, model=MODEL, drafter=drafter)
    return drafter.propose(params, state, noise_fn=noise_fn, with_laws=with_laws)

  return zoo_lib.Compiled(propose)


def _paths(proposal, row):
  """The tokens from the root's child down to each valid node of a row."""
  tokens, parents, valid = (np.asarray(a)[row] for a in proposal[:3])
  paths: list[tuple[int, ...]] = [()]
  for node in range(1, len(tokens)):
    if valid[node]:
      paths.append((*paths[parents[node]], int(tokens[node])))
  return paths


def _table_law(table, context, path):
  """The law after a context and a path."""
  history = (0, *context, *path)
  return np.asarray(table, np.float64)[history[-2], history[-1]]


# --- Every proposal ------------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [0.0, 1.0, (1.0, 0.0) * 4])
@pytest.mark.parametrize('name', TABLE_DRAFTERS)
def test_proposals_are_trees_with_valid_nodes_first(name, temperature):
  request = _request(temperature=temperature, top_k=(0, 2) * 4)
  proposal, drafter_state = _proposer(name)(PARAMS, request)
  tokens, parents, valid = map(np.asarray, proposal[:3])
  shape = TABLE_DRAFTERS[name].shape
  assert tokens.shape == (8, shape.num_nodes)
  np.testing.assert_array_equal(tokens[:, 0], np.asarray(request.tokens)[:, 1])
  assert (parents[:, 0] == -1).all() and valid[:, 0].all()
  assert (parents[:, 1:] >= 0).all() and (parents < np.arange(shape.num_nodes)).all()
  assert (valid[:, 1:] <= valid[:, :-1]).all()
  for row in range(8):
    nodes = np.flatnonzero(valid[row])[1:]
    assert valid[row, parents[row, nodes]].all()
    paths = _paths(proposal, row)
    assert max(map(len, paths)) <= shape.max_depth
    if shape.candidates is not Candidates.IID:
      assert len(set(paths)) == len(paths), 'siblings differ'
    # Read nodes are those with children, in slots of their own.
    slots = np.asarray(drafter_state.slots)[row]
    with_children = set(parents[row, nodes].tolist()) - {0}
    assert with_children <= set(np.flatnonzero(slots >= 0).tolist())
    assert len(set(slots[slots >= 0].tolist())) == (slots >= 0).sum()


@pytest.mark.parametrize('name', TABLE_DRAFTERS)
def test_laws_are_those_that_the_draft_model_gives_along_each_path(name):
  request = _request(temperature=(1.0, 0.7) * 4)
  proposal, _ = _proposer(name)(PARAMS, request)
  if TABLE_DRAFTERS[name].shape.candidates is Candidates.DETERMINISTIC:
    assert proposal.laws is None
    return
  laws = jax.nn.softmax(proposal.laws, axis=-1)
  for row in range(8):
    context = np.asarray(request.tokens)[row, :2]
    paths, parents = _paths(proposal, row), np.asarray(proposal.parents)[row]
    for node in {int(parents[i]) for i in range(1, len(paths))}:
      law = _table_law(DRAFT, context, paths[node]) ** (1 / (1.0, 0.7)[row % 2])
      if TABLE_DRAFTERS[name].shape.candidates is Candidates.TOP_AND_ONE:
        below = [i for i in range(1, len(paths)) if parents[i] == node]
        law[[paths[i][-1] for i in below[:-1]]] = 0
      np.testing.assert_allclose(laws[row, node], law / law.sum(), atol=1e-5)


def test_growth_is_the_same_in_any_company():
  # The loop over levels runs until the last row has finished; that must not show in others.
  request = _request(temperature=(1.0, 0.0) * 4, max_new_tokens=(16, 1, 2, 3, 16, 16, 2, 16))
  for name in ('dyspec', 'eagle2', 'beam'):
    together, _ = _proposer(name)(PARAMS, request)
    for rows in ([0] * 8, [1, 2] * 4, [6, 6, 6, 6, 3, 3, 3, 3]):
      alone, _ = _proposer(name)(PARAMS, zoo_lib.take_rows(request, rows))
      for place, row in enumerate(rows):
        assert _paths(alone, place) == _paths(together, row)


def test_a_row_drafts_no_deeper_than_it_can_emit():
  request = _request(max_new_tokens=(1, 2, 3, 16) * 2)
  for name in ('dyspec', 'eagle2', 'beam'):
    proposal, _ = _proposer(name)(PARAMS, request)
    depths = [max(map(len, _paths(proposal, row))) for row in range(4)]
    assert depths[:3] == [0, 1, 2] and depths[3] >= 3


# --- What is chosen ------------------------------------------------------------------------------


def _best_paths(table, context, num_drafts, max_depth):
  """The `num_drafts` paths of highest probability: what EAGLE-2 would take with a beam of all."""
  scored = []
  for depth in range(1, max_depth + 1):
    for path in itertools.product(range(V), repeat=depth):
      laws = [_table_law(table, context, path[:i])[path[i]] for i in range(depth)]
      scored.append((-np.prod(laws), depth, path))
  return {path for _, _, path in sorted(scored)[:num_drafts]}


def test_eagle2_takes_the_most_probable_paths_of_all():
  drafter = drafters.eagle2_tree(
    drafters.model_expander(MODEL), num_nodes=9, max_depth=4, beam_width=V
  )
  request = _request()
  proposal, _ = _compile_proposer(drafter)(PARAMS, request)
  for row in range(3):
    expected = _best_paths(DRAFT, np.asarray(request.tokens)[row, :2], 8, 4)
    assert set(_paths(proposal, row)[1:]) == expected


def test_eagle2_threshold_drops_improbable_paths():
  expander = drafters.model_expander(MODEL)
  drafter = drafters.eagle2_tree(expander, num_nodes=12, max_depth=4, beam_width=3, threshold=0.1)
  request = _request()
  everything = _proposer('eagle2')(PARAMS, request)
  proposal, _ = _compile_proposer(drafter)(PARAMS, request)
  for row in range(3):
    context = np.asarray(request.tokens)[row, :2]
    kept = {
      path
      for path in _paths(everything[0], row)
      if np.prod([_table_law(DRAFT, context, path[:i])[t] for i, t in enumerate(path)]) >= 0.1
    }
    assert set(_paths(proposal, row)) == kept and 1 < len(kept) < 12


@pytest.mark.parametrize('grow', [drafters.eagle2_tree, drafters.dyspec_tree])
def test_a_beam_of_one_is_a_chain(grow):
  more = {} if grow is drafters.eagle2_tree else {'max_children': 1}
  drafter = grow(drafters.model_expander(MODEL), num_nodes=60, max_depth=5, beam_width=1, **more)
  assert drafter.shape.is_chain and drafter.shape.num_nodes == 6
  proposal, _ = _compile_proposer(drafter)(PARAMS, _request())
  np.testing.assert_array_equal(proposal.parents, np.broadcast_to(np.arange(-1, 5), (8, 6)))
  assert proposal.valid.all()


def test_a_stochastic_beam_of_one_is_speculative_sampling():
  drafter = drafters.stochastic_beam_tree(drafters.model_expander(MODEL), beam_width=1, max_depth=3)
  assert drafter.shape.is_chain and drafter.shape.candidates is Candidates.SAMPLED
  decodax.check_compatible(drafter, verifiers.speculative)
  decodax.check_compatible(drafter, verifiers.block)


def _sequential_dyspec(laws_fn, noise_fn, num_drafts, max_children, max_depth):
  """The paper's loop: take the place of highest worth, draw, and add the two places it opens.

  Args:
    laws_fn: (path) -> f64[V].
    noise_fn: (path) -> f64[V], the noise that orders the draws after a path.
  """
  taken, tie = [], itertools.count(1)
  heap: list[tuple[float, int, tuple[int, ...], int]] = [(-1.0, 0, (), 0)]
  while heap and len(taken) < num_drafts:
    worth, _, parent, index = heapq.heappop(heap)
    law = laws_fn(parent)
    order = np.argsort(-(np.log(law) + noise_fn(parent)), kind='stable')
    token, before = int(order[index]), law[order[:index]].sum()
    path, reach = (*parent, token), -worth / (1 - before)
    taken.append(path)
    if index + 1 < min(max_children, V):
      worth_of_next = reach * (1 - before - law[token])
      heapq.heappush(heap, (-worth_of_next, next(tie), parent, index + 1))
    if len(path) < max_depth:
      heapq.heappush(heap, (-reach * law[token], next(tie), path, 0))
  return taken


def test_dyspec_takes_the_places_that_the_sequential_growth_takes():
  # With noise that depends on the depth only, the order of draws is known for every path.
  noise = np.asarray(jax.random.gumbel(jax.random.key(3), (8, V)), np.float64)

  def noise_fn(keys, vocab_size, depth, node=0):
    del node
    shape = (keys.position.shape[0], vocab_size)
    return jnp.broadcast_to(jnp.asarray(noise, jnp.float32)[depth][None], shape)

  drafter = drafters.dyspec_tree(
    drafters.model_expander(MODEL), num_nodes=14, max_depth=4, beam_width=V, max_children=5
  )
  request = _request()
  proposal, _ = _compile_proposer(drafter, noise_fn)(PARAMS, request)
  for row in range(3):
    context = np.asarray(request.tokens)[row, :2]
    expected = _sequential_dyspec(
      lambda path, context=context: _table_law(DRAFT, context, path),
      lambda path: noise[len(path) + 1], num_drafts=13, max_children=5, max_depth=4,
    )  # fmt: skip
    assert set(_paths(proposal, row)[1:]) == set(expected)
    # Siblings stand in the order of the draws.
    for parent in {path[:-1] for path in expected}:
      ours = [path for path in _paths(proposal, row)[1:] if path[:-1] == parent]
      assert ours == [path for path in expected if path[:-1] == parent]


# --- The laws of what is drawn -------------------------------------------------------------------


def _fits(counts, law, *, least=5.0):
  """The p-value of counts under a law; rare cells are pooled."""
  expected = law / law.sum() * counts.sum()
  rare = expected < least
  pooled = [np.append(a[~rare], a[rare].sum()) for a in (counts, expected)]
  if pooled[1][-1] < least:
    pooled = [np.append(a[:-2], a[-2:].sum()) for a in pooled]
  return stats.chisquare(pooled[0], pooled[1]).pvalue


def _first_siblings(drafter, num_siblings, num_rows=4096, num_batches=3):
  """Counts, [V] * num_siblings, of the first children of the root, over independent rows."""
  propose = _compile_proposer(drafter, with_laws=False)
  counts = np.zeros((V,) * num_siblings)
  for seed in range(num_batches):
    prompts = [[1, 2]] * num_rows
    request = decodax.make_request(
      prompts, max_new_tokens=4, vocab_size=V, temperature=1.0, seed=seed, capacity=8
    )
    tokens = np.asarray(propose(PARAMS, request)[0].tokens)[:, 1 : num_siblings + 1]
    np.add.at(counts, tuple(tokens.T), 1)
  return counts


def test_siblings_drawn_without_replacement_have_the_ordered_law():
  q = _table_law(DRAFT, (1, 2), ())
  law = np.zeros((V,) * 3)
  for a, b, c in itertools.permutations(range(V), 3):
    law[a, b, c] = q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b])
  drafter = drafters.static_tree(
    drafters.model_expander(MODEL), static_trees.kary((3,)),
    candidates=Candidates.WITHOUT_REPLACEMENT,
  )  # fmt: skip
  assert _fits(_first_siblings(drafter, 3).ravel(), law.ravel()) > 1e-4


def test_independent_siblings_have_the_product_law():
  q = _table_law(DRAFT, (1, 2), ())
  drafter = drafters.static_tree(
    drafters.model_expander(MODEL), static_trees.kary((2,)), candidates=Candidates.IID
  )
  assert _fits(_first_siblings(drafter, 2).ravel(), np.outer(q, q).ravel()) > 1e-4


def test_top_and_one_draws_the_last_sibling_from_the_rest():
  q = _table_law(DRAFT, (1, 2), ())
  top = np.argsort(-q)[:2]
  rest = q.copy()
  rest[top] = 0
  drafter = drafters.static_tree(
    drafters.model_expander(MODEL), static_trees.kary((3,)), candidates=Candidates.TOP_AND_ONE
  )
  counts = _first_siblings(drafter, 3)
  assert counts[top[0], top[1]].sum() == counts.sum()
  assert _fits(counts[top[0], top[1]], rest / rest.sum()) > 1e-4


@pytest.mark.parametrize('kind', [Candidates.WITHOUT_REPLACEMENT, Candidates.TOP_AND_ONE])
def test_draws_end_with_the_support(kind):
  # Under top-k 3, three children exist at most; the last of them is the draw of top-and-one.
  drafter = drafters.static_tree(
    drafters.model_expander(MODEL), static_trees.kary((5,)), candidates=kind
  )
  proposal, _ = _compile_proposer(drafter)(PARAMS, _request(top_k=(3, 0, 0, 1) * 2))
  assert (proposal.valid.sum(-1) - 1).tolist() == [3, 5, 5, 1] * 2
  best = np.argsort(-_table_law(DRAFT, (1, 2), ()))[:3].tolist()
  first = [path[0] for path in _paths(proposal, 0)[1:]]
  assert sorted(first) == sorted(best)
  if kind is Candidates.TOP_AND_ONE:
    assert first == best
    law = np.asarray(jax.nn.softmax(proposal.laws[0, 0]))
    np.testing.assert_allclose(law[first], [0, 0, 1], atol=1e-6)


# --- The law of what is emitted ------------------------------------------------------------------

SMALL = 4
SMALL_MODEL = table_model(SMALL)
SMALL_PARAMS = decodax.Params(*(
  jnp.asarray(random_table(s, SMALL, sharpness=1.2), jnp.float32) for s in (5, 6)
))  # fmt: skip


def _emitted_counts(drafter, verifier, num_tokens=3, rows=25_000, batches=4):
  """Counts [V] * num_tokens of what the compiled loop emits after one prompt, over all rows."""
  decode = zoo_lib.Compiled(
    functools.partial(decodax.decode, model=SMALL_MODEL, drafter=drafter, verifier=verifier)
  )
  counts = np.zeros((SMALL,) * num_tokens)
  for seed in range(batches):
    request = decodax.make_request(
      np.full((rows, 2), [1, 2]), max_new_tokens=num_tokens, vocab_size=SMALL, temperature=1.0,
      seed=100 + seed, capacity=8,
    )  # fmt: skip
    out = decode(SMALL_PARAMS, request)
    np.add.at(counts, tuple(np.asarray(out.tokens)[:, 2 : 2 + num_tokens].T), 1)
  return counts


_EXPANDER = drafters.model_expander(SMALL_MODEL)
_LAW = sequence_law(np.asarray(SMALL_PARAMS.target, np.float64), (1, 2), 3)


_KARY = static_trees.kary((2, 2))


@pytest.mark.parametrize(
  ('drafter', 'rule'),
  [
    (drafters.dyspec_tree(_EXPANDER, num_nodes=7, max_depth=3, beam_width=2, max_children=3),
     'traversal'),
    (drafters.stochastic_beam_tree(_EXPANDER, beam_width=3, max_depth=3, num_nodes=6),
     'without_replacement'),
    (drafters.static_tree(_EXPANDER, _KARY, candidates=Candidates.WITHOUT_REPLACEMENT),
     'traversal'),
  ],
  ids=['dyspec', 'beam', 'static'],
)  # fmt: skip
def test_emitted_text_has_the_targets_law_over_rounds(drafter, rule):
  # 100,000 runs of three tokens in one to three rounds, 63 degrees of freedom. Rejects a right rule
  # for one seed in 10,000. Power: a law whose cells are off by 3 % (root mean square, weighted by
  # the law) is rejected with probability 0.97, one off by 4 % with 0.999998.
  counts = _emitted_counts(drafter, verifiers.BY_NAME[rule])
  assert _fits(counts.ravel(), _LAW.ravel()) > 1e-4


def test_ranking_drawn_nodes_by_their_own_probability_would_be_found_out():
  def peek(state, beam, logits, depth, nodes, *, noise_fn, with_laws):
    scored = dynamic_tree._by_place(
      state, beam, logits, depth, nodes, num_children=3, noise_fn=noise_fn, with_laws=with_laws
    )
    best = jnp.argsort(-scored.value, axis=-1)  # keep what looks best, in that order
    pick = functools.partial(jnp.take_along_axis, indices=best, axis=-1)
    value = pick(scored.value)
    return scored._replace(tokens=pick(scored.tokens), value=value, priority=value, rank=value)

  plan = dynamic_tree._Plan(Candidates.COMPETING, peek, 2, 3, 0.0)
  drafter = dynamic_tree._dynamic_tree(_EXPANDER, plan, 4, 2, None)
  counts = _emitted_counts(drafter, verifiers.without_replacement, batches=1)
  assert _fits(counts.ravel(), _LAW.ravel()) < 1e-12


# --- Token identity and caches, on a small transformer -------------------------------------------

NEW_TOKENS = (14, 9, 14, 1, 6, 14)


def _transformer_drafters(zoo):
  transformer, _ = zoo_lib._make_transformer(0)
  exit_model = drafters.exit_expander(as_model(transformer, exit_layer=2))
  by_model, by_exit = _drafters(drafters.model_expander(zoo.model)), _drafters(exit_model)
  return {
    'draft-static-without_replacement': by_model['static-without_replacement'],
    'draft-eagle2': by_model['eagle2'],
    'exit-dyspec': by_exit['dyspec'],
    'draft-beam': by_model['beam'],
  }


_NAMES = (
  'draft-static-without_replacement', 'draft-eagle2', 'exit-dyspec', 'draft-beam',
)  # fmt: skip


def _ragged(temperature, seed=0):
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(0, zoo_lib.VOCAB_SIZE, n).tolist() for n in (1, 5, 17, 9, 2, 12)]
  return decodax.make_request(
    prompts, max_new_tokens=NEW_TOKENS, vocab_size=zoo_lib.VOCAB_SIZE, temperature=temperature,
    repetition_penalty=(1.0, 1.0, 1.2, 1.0, 1.3, 1.0), seed=seed, capacity=32,
  )  # fmt: skip


_RUNS = {}


def _run(zoo, name):
  """Compiled: (params, request) -> the finished rows, and the last state of the drafter."""
  if name not in _RUNS:
    drafter = drafters.plain() if name == 'plain' else _transformer_drafters(zoo)[name]

    def run(params, request):
      state = init_state(params, request, model=zoo.model, drafter=drafter)
      state = prefill(params, state, model=zoo.model, drafter=drafter)
      step = decodax.make_step_fn(model=zoo.model, drafter=drafter, verifier=verifiers.coupled)
      state = decodax.generate(params, state, step_fn=step)
      return decodax.finish(state), state.drafter

    _RUNS[name] = zoo_lib.Compiled(run)
  return _RUNS[name]


@pytest.mark.parametrize('name', _NAMES)
def test_output_is_that_of_plain_decoding_and_caches_keep_up(zoo, name):
  for temperature in (0.0, 1.0, (1.0, 0.0, 0.8, 0.0, 1.2, 1.0)):
    request = _ragged(temperature)
    plain, _ = _run(zoo, 'plain')(decodax.Params(zoo.params), request)
    for draft_params in (zoo.params, zoo.other_params):
      out, drafter_state = _run(zoo, name)(decodax.Params(zoo.params, draft_params), request)
      zoo_lib.assert_same_output(out, plain)
      if name.startswith('draft'):
        _assert_cache_is_fresh(zoo, draft_params, drafter_state.own, out)
    # A drafter that is as good as the target's own model saves calls.
    perfect, _ = _run(zoo, name)(decodax.Params(zoo.params, zoo.params), request)
    assert perfect.stats.num_target_calls.sum() < plain.stats.num_target_calls.sum() * 0.75


def _assert_cache_is_fresh(zoo, params, own, out):
  """The drafter's cache holds what reading its tokens from the start gives."""
  tokens = np.asarray(out.tokens)[:, :32]
  fresh = _read_all(zoo)(params, tokens)
  length = np.asarray(own.length)
  np.testing.assert_array_equal(np.asarray(own.cache.length), length)
  # Never more than two tokens behind the text: the last one, and a draft that was not read.
  assert (np.asarray(out.length) - length <= 2).all() and (length <= np.asarray(out.length)).all()
  for row in range(len(tokens)):
    order = np.argsort(np.asarray(own.cache.positions)[row, : length[row]])
    assert order.tolist() == list(range(length[row]))
    for name in ('keys', 'values'):
      ours, reread = (np.asarray(getattr(c, name))[:, row, :, : length[row]]
                      for c in (own.cache, fresh))  # fmt: skip
      np.testing.assert_allclose(ours, reread, atol=2e-3, rtol=2e-3)


def _read_all(zoo):
  if 'read' not in _RUNS:

    def read(params, tokens):
      batch_size, width = tokens.shape
      cache = zoo.model.init_cache(params, batch_size, width)
      path = jnp.broadcast_to(jnp.arange(width)[None], tokens.shape)
      mask = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (batch_size, width, width))
      _, block = zoo.model.extend(params, cache, tokens, path, mask)
      return zoo.model.commit(cache, block, path, jnp.full((batch_size,), width))

    _RUNS['read'] = zoo_lib.Compiled(read)
  return _RUNS['read']


EXIT_MODEL = MODEL._replace(unembed=lambda params, hidden: 0.7 * MODEL.unembed(params, hidden))


def _compile_decode(drafter):
  return zoo_lib.Compiled(
    functools.partial(decodax.decode, model=MODEL, drafter=drafter, verifier=verifiers.coupled)
  )


@functools.cache
def _decode_plainly():
  return _compile_decode(drafters.plain())


@pytest.mark.parametrize(
  'name', ['static-deterministic', 'static-iid', 'static-top_and_one', 'eagle2-threshold']
)
def test_output_is_that_of_plain_decoding_for_the_other_trees(name):
  expander = drafters.exit_expander(EXIT_MODEL)
  if name == 'eagle2-threshold':  # its target calls have three widths
    drafter = drafters.eagle2_tree(
      expander, num_nodes=12, max_depth=4, beam_width=3, threshold=0.05
    )
    assert drafter.shape.widths == (3, 6, 12)
  else:
    drafter = _drafters(expander)[name]
  request = _request(temperature=(1.0, 0.0) * 4, max_new_tokens=(16, 1, 9, 16) * 2)
  params = decodax.Params(TARGET)
  plain, out = _decode_plainly()(params, request), _compile_decode(drafter)(params, request)
  zoo_lib.assert_same_output(out, plain)
  assert out.stats.num_target_calls.sum() < 0.75 * plain.stats.num_target_calls.sum()


# --- Errors --------------------------------------------------------------------------------------


def test_what_cannot_be_grown_is_refused():
  expander = drafters.model_expander(MODEL)
  with pytest.raises(ValueError, match='num_nodes >= 2'):
    drafters.eagle2_tree(expander, num_nodes=1, beam_width=2)
  with pytest.raises(ValueError, match='1 to 6: 7'):
    drafters.eagle2_tree(expander, beam_width=7)
  with pytest.raises(ValueError, match='nothing to draft'):
    drafters.static_tree(expander, static_trees.chain(0))
  with pytest.raises(ValueError, match='7 candidates of a vocabulary of 6'):
    drafters.static_tree(expander, static_trees.kary((7,)))
  with pytest.raises(ValueError, match='COMPETING'):
    drafters.static_tree(expander, BUSH, candidates=Candidates.COMPETING)
  with pytest.raises(ValueError, match='init_scratch'):
    drafters.model_expander(MODEL._replace(init_scratch=None))
  with pytest.raises(ValueError, match='competing'):
    decodax.check_compatible(TABLE_DRAFTERS['dyspec'], verifiers.specinfer)

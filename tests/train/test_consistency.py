"""Consistency training: what is collected, what each token sees and learns, token by token."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from models.config import TransformerConfig
from models.transformer import Transformer
from tests.decodax.zoo import Compiled
from tests.table_model import random_table
from tests.table_model import table_model
from train import trajectories
from train.objectives import consistency
from train.tape import Batch
from train.tape import make_tape

_N = 3
_CONFIG = TransformerConfig(
  vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
  intermediate_size=24,
)  # fmt: skip


@pytest.fixture(scope='module')
def target():
  transformer = Transformer(_CONFIG, rngs=nnx.Rngs(0))
  graph, state = nnx.split(transformer)
  return nnx.merge(graph, jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, state))


# --- Collecting ----------------------------------------------------------------------------------


def test_trajectories_are_those_of_whole_windows():
  """Window and guesses of each row iterated as they stand, in plain Python."""
  table, window = random_table(3, 5, sharpness=3), 6
  request = decodax.make_request(
    [[1, 2], [3], [0, 4, 4, 1]], max_new_tokens=window, vocab_size=5, capacity=64
  )
  run = functools.partial(trajectories.trajectories, model=table_model(5), window=window)
  found = jax.device_get(jax.jit(run)(decodax.Params(jnp.asarray(table, jnp.float32)), request))
  for row, prompt in enumerate([[1, 2], [3], [0, 4, 4, 1]]):
    state, calls = found.states[row, 0].tolist(), 0
    for index in range(1, window + 1):
      text = [0, *prompt, *state]
      first = len(prompt) + 1
      state = [int(table[text[i - 2], text[i - 1]].argmax()) for i in range(first, first + window)]
      np.testing.assert_array_equal(found.states[row, index], state)
    settled = [np.array_equal(found.states[row, i], state) for i in range(window + 1)]
    calls = settled.index(True) + 1  # one more call shows that it is settled
    assert found.num_rounds[row] <= calls
    assert all(settled[settled.index(True) :])


def test_states_are_chosen_by_their_noise():
  fixed = [1, 2, 3, 4]
  states = np.asarray([[[9, 9, 9, 9], [1, 9, 9, 9], [1, 2, 3, 9], fixed, fixed]] * 3)
  assert trajectories.noise_ratios(states)[0].tolist() == [1.0, 0.75, 0.25, 0.0, 0.0]
  wanted = np.asarray([1.0, 0.3, 0.0])
  chosen = trajectories.choose_states(states, wanted, np.random.default_rng(0))
  assert chosen.tolist() == [[9, 9, 9, 9], [1, 2, 3, 9], fixed]
  rng = np.random.default_rng(0)
  drawn = {tuple(trajectories.choose_states(states[:1], None, rng)[0]) for _ in range(40)}
  assert drawn == {tuple(state) for state in states[0, :3].tolist()}


# --- The packed row ------------------------------------------------------------------------------


def _documents(parts):
  """Two documents: a prompt and windows of `parts` parts each; and what each token is."""
  rng = np.random.default_rng(0)
  tokens, segments, mask, meaning = [], [], [], []
  for segment, (prompt, windows) in enumerate([(4, 2), (2, 3)], 1):
    for place in range(prompt):
      meaning.append(('prompt', segment, -1, place, place))
    for window in range(windows):
      for kind in ('state', 'fixed', 'shown')[:parts]:
        for place in range(_N):
          meaning.append((kind, segment, window, place, prompt + window * _N + place))
    size = prompt + windows * parts * _N
    tokens += rng.integers(0, 11, size).tolist()
    segments += [segment] * size
    mask += [False] * prompt + [True] * (size - prompt)
  pad = 5
  positions = [i - segments.index(segment) for i, segment in enumerate(segments)]
  batch = Batch(
    *(
      jnp.asarray([column + [0] * pad], dtype)
      for column, dtype in ((tokens, jnp.int32), (positions, jnp.int32), (segments, jnp.int32),
                            (mask, bool))
    )
  )  # fmt: skip
  return batch, meaning


@pytest.mark.parametrize('parts', [2, 3])
@pytest.mark.parametrize('noise_windows', [1, 2])
def test_each_token_sees_what_it_should(parts, noise_windows):
  batch, meaning = _documents(parts)
  layout = consistency.layout_of(make_tape(None, batch), _N, parts)
  seen = np.asarray(consistency.visible(layout, noise_windows))[0]
  for i, (kind, segment, window, place, position) in enumerate(meaning):
    assert int(layout.position[0, i]) == position or kind == 'shown'
    for j, (other, other_segment, other_window, other_place, _) in enumerate(meaning):
      before = (other_window, other_place) <= (window, place)
      if kind == 'state' and other == 'state':
        expected = other_window // noise_windows == window // noise_windows and before
      elif kind == 'state':
        early = other_window < window // noise_windows * noise_windows
        expected = other in ('prompt', 'fixed') and (other == 'prompt' or early)
      else:
        text = kind in ('prompt', 'fixed') and other in ('prompt', 'fixed')
        expected = text and before
      expected = (expected and segment == other_segment) or i == j
      assert seen[i, j] == expected, (i, j, meaning[i], meaning[j])
  np.testing.assert_array_equal(seen[len(meaning) :], np.eye(seen.shape[0])[len(meaning) :])


@pytest.mark.parametrize('parts', [2, 3])
def test_each_token_learns_what_comes_next(parts):
  batch, meaning = _documents(parts)
  layout = consistency.layout_of(make_tape(None, batch), _N, parts)
  labels, weights = consistency.next_labels(batch.tokens, layout, _N, parts, 1000)
  tokens, place_of = np.asarray(batch.tokens)[0], {}
  for i, (kind, segment, _, _, position) in enumerate(meaning):
    if kind in ('prompt', 'fixed'):
      place_of[segment, position] = i
  for i, (kind, segment, _, _, position) in enumerate(meaning):
    following = place_of.get((segment, position + 1))
    text = kind in ('prompt', 'fixed')
    learns = text and following is not None and meaning[following][0] == 'fixed'
    assert float(weights[0, i]) == learns, meaning[i]
    if learns:
      assert int(labels[0, i]) == tokens[following]
  assert not np.asarray(weights)[0, len(meaning) :].any()


def test_mixed_labels_take_the_demonstration_where_the_fixed_point_errs():
  batch, meaning = _documents(3)
  layout = consistency.layout_of(make_tape(None, batch), _N, 3)
  tokens = np.asarray(batch.tokens)[0]
  error = np.asarray(consistency.window_error(batch.tokens, layout, _N))[0]
  for i, (kind, segment, window, _, _) in enumerate(meaning):
    if kind != 'fixed':
      assert error[i] == 0
      continue
    mine = [j for j, m in enumerate(meaning) if m[:3] == ('fixed', segment, window)]
    expected = np.mean([abs(int(tokens[j]) - int(tokens[j + _N])) for j in mine])
    np.testing.assert_allclose(error[i], expected, rtol=1e-6)
  bar = float(np.median(error[error > 0]))
  strict, weights = consistency.next_labels(batch.tokens, layout, _N, 3, bar)
  loose, _ = consistency.next_labels(batch.tokens, layout, _N, 3, 1000)
  changed = np.asarray((strict != loose) & (weights > 0))[0]
  assert changed.any() and not changed.all()


def test_only_what_is_not_settled_learns_to_be_consistent():
  batch, meaning = _documents(2)
  tokens = np.array(batch.tokens)
  for i, (kind, _, window, place, _) in enumerate(meaning):
    if kind == 'state':  # window 0 is settled, window 1 wrong at place 1, window 2 at place 0
      tokens[0, i] = tokens[0, i + _N]
      if (window, place) in ((1, 1), (2, 0)):
        tokens[0, i] = (tokens[0, i] + 1) % 11
  layout = consistency.layout_of(make_tape(None, batch), _N)
  found = np.asarray(consistency.wrong_from(jnp.asarray(tokens), layout, _N))[0]
  for i, (kind, _, window, place, _) in enumerate(meaning):
    expected = kind == 'state' and ((window == 1 and place >= 1) or window == 2)
    assert found[i] == expected, meaning[i]


@pytest.mark.parametrize('kind', ['global', 'local'])
def test_settled_states_lose_nothing(target, kind):
  """At a fixed point the law of a state is that of the text, whatever the weights."""
  batch, meaning = _documents(2)
  tokens = np.array(batch.tokens)
  for i, (what, *_) in enumerate(meaning):
    if what == 'state':
      tokens[0, i] = tokens[0, i + _N]
  settled = batch._replace(tokens=jnp.asarray(tokens))
  objective = consistency.make_objective(window=_N, loss=kind)
  graph, params = nnx.split(target)

  @Compiled
  def loss_of(params, batch):
    head = nnx.merge(graph, params)
    return objective.loss(head, head, make_tape(None, batch), jax.random.key(0), jnp.int32(0))

  loss = loss_of(params, settled)
  assert float(loss.metrics['consistency'].total) == 0
  assert float(loss.metrics['next_token'].total) > 0
  unsettled = loss_of(params, batch)
  assert float(unsettled.metrics['consistency'].total) > 1e-3
  assert float(unsettled.weight) == float(loss.weight)


def test_a_state_is_read_as_decoding_reads_it(target):
  """With one pass for all windows: each state as if it alone stood behind its text."""
  batch, meaning = _documents(2)
  layout = consistency.layout_of(make_tape(None, batch), _N)
  read = Compiled(lambda *args: target(*args)[0].hidden)
  hidden = read(batch.tokens, layout.position, consistency.visible(layout, 1))
  tokens = np.asarray(batch.tokens)[0]
  text = [i for i, m in enumerate(meaning) if m[1] == 2 and m[0] in ('prompt', 'fixed')]
  own = [i for i, m in enumerate(meaning) if m[:3] == ('state', 2, 2)]
  before = [i for i in text if meaning[i][2] < 2]
  row = jnp.asarray(tokens[[*before, *own]])[None]
  size = row.shape[1]
  mask = jnp.tril(jnp.ones((1, size, size), bool))
  alone = read(row, jnp.arange(size)[None], mask)
  np.testing.assert_allclose(hidden[0, np.asarray(own)], alone[0, -_N:], atol=1e-5)


def test_the_gradient_reaches_states_and_not_their_goals(target):
  batch, _ = _documents(2)
  objective = consistency.make_objective(window=_N, ar_weight=0.0)
  graph, params = nnx.split(target)

  def total(params):
    head, key = nnx.merge(graph, params), jax.random.key(0)
    return objective.loss(head, head, make_tape(None, batch), key, jnp.int32(0)).total

  before, gradient = Compiled(jax.value_and_grad(total))(params)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
  step = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
  assert float(Compiled(total)(step)) < float(before)


def test_nonsense_is_refused():
  with pytest.raises(ValueError, match="loss must be 'global' or 'local'"):
    consistency.make_objective(loss='all')
  with pytest.raises(ValueError, match='need at least 1'):
    consistency.make_objective(window=0)

"""Random numbers: what they depend on, what they must not, and decisions at the edges.

Two draws count as different if they differ in each of 64 rows.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decodax.noise import RoundKeys
from decodax.noise import Tag
from decodax.noise import row_keys

_ROWS, _V = 64, 5


def _keys(*, seed=0, round=3, position=9, rows=_ROWS):
  full = lambda value: jnp.full((rows,), value, jnp.int32)  # noqa: E731
  return RoundKeys(row_keys(seed, jnp.arange(rows)), full(round), full(position))


def _all_differ(draws):
  return all(
    np.all(np.any(one != other, axis=-1)) for one, other in itertools.combinations(draws, 2)
  )


def test_row_keys_depend_on_seed_and_id_alone():
  ids = np.asarray([5, 0, -3, 2**31 - 1])
  data = jax.random.key_data(row_keys(1, jnp.asarray(ids)))
  assert len(np.unique(data, axis=0)) == len(ids)
  for order in itertools.permutations(range(len(ids))):
    shuffled = jax.random.key_data(row_keys(1, jnp.asarray(ids[list(order)])))
    np.testing.assert_array_equal(shuffled, data[np.asarray(order)])
  alone = jax.random.key_data(row_keys(1, jnp.asarray([-3])))
  np.testing.assert_array_equal(alone, data[2:3])
  assert not np.any(np.all(jax.random.key_data(row_keys(2, jnp.asarray(ids))) == data, axis=-1))


def test_coupled_noise_depends_on_row_and_position_alone():
  expected = np.asarray(_keys(position=9).coupled_gumbel(_V, 2))
  for keys, depth, node in (
    (_keys(position=9), 2, 4),
    (_keys(position=4), 7, 0),
    (_keys(position=11, round=0), 0, 1),
    (_keys(position=9, round=100), jnp.full((_ROWS,), 2), 0),
  ):
    np.testing.assert_array_equal(keys.coupled_gumbel(_V, depth, node), expected)
  others = [_keys(position=9).coupled_gumbel(_V, depth) for depth in (0, 1, 3)]
  assert _all_differ([expected, *others, _keys(seed=1).coupled_gumbel(_V, 2)])


def test_a_row_draws_the_same_beside_any_neighbour():
  many, one = _keys(), _keys(rows=1)
  for draw in (
    lambda keys: keys.coupled_gumbel(_V, 1),
    lambda keys: keys.draft_gumbel(_V, 1, 2),
    lambda keys: keys.pick(jnp.ones(keys.round.shape + (_V,)), 1),
  ):
    np.testing.assert_array_equal(draw(many)[:1], draw(one))


def test_fresh_noise_differs_by_round_depth_and_node_but_not_by_position():
  expected = _keys().draft_gumbel(_V, 1, 2)
  np.testing.assert_array_equal(_keys(position=1).draft_gumbel(_V, 1, 2), expected)
  others = [
    _keys(round=4).draft_gumbel(_V, 1, 2),
    _keys().draft_gumbel(_V, 2, 2),
    _keys().draft_gumbel(_V, 1, 1),
    _keys().draft_gumbel(_V, 2, 1),  # not a matter of the sum of depth and node
    _keys(seed=1).draft_gumbel(_V, 1, 2),
  ]
  assert _all_differ([expected, *others])


def test_fresh_noise_never_meets_coupled_noise():
  """Rounds and positions are both small numbers folded into the same key."""
  fresh = [_keys(round=i).draft_gumbel(_V, 1) for i in range(4)]
  coupled = [_keys(position=i).coupled_gumbel(_V, 1) for i in range(-1, 4)]
  assert _all_differ([*fresh, *coupled])


def test_purposes_have_noise_of_their_own():
  keys, law = _keys(rows=2000), jnp.ones((2000, _V))
  picked = np.asarray(keys.pick(law, 1))
  drafted = np.asarray(jnp.argmax(keys.draft_gumbel(_V, 1), axis=-1))
  coupled = np.asarray(keys.pick_coupled(jnp.zeros((2000, _V)), 1))
  for one, other in itertools.combinations((picked, drafted, coupled), 2):
    agree = np.mean(one == other)  # 1 / V if independent; 5 standard errors
    assert abs(agree - 1 / _V) < 5 * np.sqrt(1 / _V * (1 - 1 / _V) / 2000)
  assert len(set(Tag)) == 4


@pytest.mark.parametrize('change', [dict(round=4), dict(depth=2), dict(index=1), dict(seed=1)])
def test_decisions_and_picks_are_independent(change):
  """They agree as often as independent ones do; otherwise the table of pairs shows it."""

  def draw(seed=0, round=3, depth=1, index=0):
    keys = _keys(seed=seed, round=round, rows=4000)
    accepted = keys.accepts(jnp.full((4000,), 0.5), depth, index)
    return np.asarray(accepted), np.asarray(keys.pick(jnp.ones((4000, _V)), depth, index))

  (accepted, picked), (other_accepted, other_picked) = draw(), draw(**change)
  for one, other in (
    (accepted, other_accepted), (picked, other_picked), (accepted, other_picked),
    (accepted, picked),
  ):  # fmt: skip
    table = np.zeros((_V, _V))
    np.add.at(table, (one.astype(int), other.astype(int)), 1)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    p_value = np.asarray(scipy.stats.chi2_contingency(table)[1])
    assert p_value > 1e-4
  np.testing.assert_array_equal(draw()[0], accepted)


def test_decisions_have_the_given_probability():
  rows = 100_000
  probability = jnp.tile(jnp.asarray([0.0, 0.01, 0.3, 0.99, 1.0]), rows // 5)
  accepted = np.asarray(_keys(rows=rows).accepts(probability, 1)).reshape(-1, 5).mean(0)
  assert accepted[0] == 0 and accepted[4] == 1
  expected = np.asarray([0.0, 0.01, 0.3, 0.99, 1.0])
  error = np.sqrt(expected * (1 - expected) / (rows // 5))
  assert np.all(np.abs(accepted - expected) <= 4.5 * error)


@pytest.mark.parametrize('draw', [0.0, 1 - 2.0**-24])
def test_no_draw_accepts_at_probability_0_or_refuses_at_1(monkeypatch, draw):
  """Not even the smallest and largest number that `uniform` can return."""
  monkeypatch.setattr(jax.random, 'uniform', lambda key: jnp.float32(draw))
  accepted = _keys(rows=2).accepts(jnp.asarray([0.0, 1.0], jnp.float32), 1)
  np.testing.assert_array_equal(accepted, [False, True])


def test_picks_follow_the_law_and_never_take_the_impossible():
  rows, law = 100_000, np.asarray([0.0, 0.5, 0.125, 0.0, 0.375])
  for scale in (1.0, 1e-6):  # need not be normalised
    laws = jnp.broadcast_to(jnp.asarray(law * scale, jnp.float32)[None], (rows, _V))
    for picked in (_keys(rows=rows).pick(laws, 1), _keys(rows=rows).pick_coupled(jnp.log(laws), 1)):
      assert picked.dtype == jnp.int32
      counts = np.bincount(picked, minlength=_V)
      assert not np.any(counts[law == 0])
      possible = law > 0
      assert scipy.stats.chisquare(counts[possible], rows * law[possible]).pvalue > 1e-4

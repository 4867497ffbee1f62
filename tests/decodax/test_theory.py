"""Closed forms, bounds and fits against enumeration, linear programs and simulation.

Laws have V = 5 tokens, so that every draft outcome can be summed; float64 unless a test says so.
"""

import functools
import itertools
from typing import Any

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from decodax import theory
from decodax.theory import fits
from decodax.theory import several_drafts
from decodax.theory.common import sorted_by_ratio

V = 5


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def _jitted(fn, **options):
  return jax.jit(functools.partial(fn, **options))


def _call(fn, *args, **options):
  """Calls with the options static, compiled once per function, options and shapes."""
  return jax.tree.map(np.asarray, _jitted(fn, **options)(*args))


def _laws(seed=0, rows=12, vocab_size=V):
  """Random pairs of laws, sharp and flat, and the awkward ones."""
  rng = np.random.default_rng(seed)
  scales = rng.choice([0.2, 1.0, 5.0], size=(rows, 2))
  p = np.stack([rng.dirichlet(np.full(vocab_size, s)) for s in scales[:, 0]])
  q = np.stack([rng.dirichlet(np.full(vocab_size, s)) for s in scales[:, 1]])
  one_hot = np.eye(vocab_size)
  half = np.where(np.arange(vocab_size) < 2, 0.5, 0.0)  # fewer tokens than drafts
  rest = np.where(np.arange(vocab_size) < 2, 0.0, 1.0 / (vocab_size - 2))
  awkward = [
    (p[0], p[0]),
    (one_hot[0], one_hot[0]),
    (one_hot[0], one_hot[1]),
    (half, rest),
    (p[1], one_hot[2]),
    (one_hot[3], q[1]),
    (p[2], half),
    (rest, q[2]),
  ]
  p_odd, q_odd = zip(*awkward, strict=True)
  return np.concatenate([p, p_odd]), np.concatenate([q, q_odd])


def _residual(p, q):
  rest = np.maximum(p - q, 0)
  return rest / rest.sum() if rest.sum() > 0 else rest


def _draft_tuples(q, num_drafts, replace):
  """Every ordered draft and its probability; without replacement, fewer if q runs out."""
  if num_drafts == 0:
    yield (), 1.0
    return
  for first in np.flatnonzero(q):
    left = q if replace else np.where(np.arange(len(q)) == first, 0, q)
    if left.sum() <= 1e-15:
      yield (first,), q[first]
      continue
    for others, probability in _draft_tuples(left / left.sum(), num_drafts - 1, replace):
      yield (first, *others), q[first] * probability


def _transport_optimum(p, drafts):
  """The best acceptance of any lossless rule: a linear program over (draft outcome, token).

  It moves mass from outcomes to tokens; what is left on both sides is matched by rejections.
  """
  drafts = list(drafts)
  size = len(drafts) * len(p)
  gain = np.zeros((len(drafts), len(p)))
  for i, (tokens, _) in enumerate(drafts):
    gain[i, list(tokens)] = 1
  rows = np.kron(np.eye(len(drafts)), np.ones(len(p)))
  columns = np.kron(np.ones(len(drafts)), np.eye(len(p)))
  weights = np.array([probability for _, probability in drafts])
  result = scipy.optimize.linprog(
    -gain.reshape(size),
    A_ub=np.concatenate([rows, columns]),
    b_ub=np.concatenate([weights, p]),
    method='highs',
  )
  assert result.status == 0
  return -result.fun


# --- One draft ---------------------------------------------------------------------------------


def test_overlap_is_one_minus_total_variation_and_the_acceptance_of_a_ratio_test():
  p, q = _laws()
  accepted = np.where(q > 0, q * np.minimum(1, p / np.where(q > 0, q, 1)), 0).sum(-1)
  np.testing.assert_allclose(_call(theory.overlap, p, q), accepted, atol=1e-14)
  np.testing.assert_allclose(_call(theory.total_variation, p, q), 1 - accepted, atol=1e-14)


def test_coupled_acceptance_equals_its_double_sum():
  p, q = _laws()
  with np.errstate(divide='ignore', invalid='ignore'):
    larger = np.maximum(p[:, None] / p[:, :, None], q[:, None] / q[:, :, None])
    expected = np.where((p > 0) & (q > 0), 1 / larger.sum(-1), 0).sum(-1)
  np.testing.assert_allclose(_call(theory.coupled_acceptance, p, q), expected, atol=1e-13)


def test_coupled_acceptance_lies_between_its_bounds():
  p, q = _laws(1)
  distance = _call(theory.total_variation, p, q)
  value = _call(theory.coupled_acceptance, p, q)
  assert (value <= 1 - distance + 1e-13).all()
  assert (value >= (1 - distance) / (1 + distance) - 1e-13).all()


def test_coupled_acceptance_equals_simulation():
  p, q = _laws(2, rows=4)
  num_runs = 200_000
  noise = np.random.default_rng(0).gumbel(size=(num_runs, V))
  with np.errstate(divide='ignore'):
    agree = [
      ((np.log(a) + noise).argmax(-1) == (np.log(b) + noise).argmax(-1)).mean()
      for a, b in zip(p, q, strict=True)
    ]
  # Five standard errors: for twelve rows, a false alarm once in 1e5 seeds; this one is fixed.
  np.testing.assert_allclose(
    agree, _call(theory.coupled_acceptance, p, q), atol=5 * (0.25 / num_runs) ** 0.5
  )


@pytest.mark.parametrize('leniency', [1.0, 0.7, 0.3, 0.01])
def test_lenient_output_equals_enumeration(leniency):
  p, q = _laws()
  accept = np.minimum(1, p / np.where(q > 0, leniency * q, 1))
  kept = q * accept
  rest = np.stack([_residual(a, leniency * b) for a, b in zip(p, q, strict=True)])
  expected = kept + (1 - kept.sum(-1, keepdims=True)) * rest
  output = _call(theory.lenient_output, p, q, leniency)
  np.testing.assert_allclose(output.law, expected, atol=1e-14)
  np.testing.assert_allclose(output.law.sum(-1), 1, atol=1e-14)
  np.testing.assert_allclose(output.acceptance, kept.sum(-1), atol=1e-14)
  np.testing.assert_allclose(output.total_variation, abs(p - expected).sum(-1) / 2, atol=1e-14)
  assert (output.law <= p / leniency + 1e-14).all()


def test_lenience_of_one_is_lossless_and_less_accepts_more():
  p, q = _laws()
  levels = np.linspace(0.05, 1, 20)
  outputs = [_call(theory.lenient_output, p, q, level) for level in levels]
  np.testing.assert_allclose(outputs[-1].law, p, atol=1e-14)
  assert (np.diff([output.acceptance for output in outputs], axis=0) <= 1e-14).all()
  per_row = theory.lenient_output(p, q, jnp.full(len(p), levels[3]))
  np.testing.assert_allclose(per_row.law, outputs[3].law, atol=1e-15)


# --- Tokens per call and speed-up --------------------------------------------------------------


def _expected_length(acceptance):
  """By enumeration of how many drafts are accepted."""
  total, reach = 0.0, 1.0
  for i, a in enumerate(acceptance):
    total += (i + 1) * reach * (1 - a)
    reach *= a
  return total + (len(acceptance) + 1) * reach


@hypothesis.given(st.floats(0, 1), st.integers(0, 40))
@hypothesis.settings(deadline=None, max_examples=100)
def test_expected_tokens_equals_enumeration(alpha, length):
  value = _call(theory.expected_tokens, np.float64(alpha), np.int64(length))
  np.testing.assert_allclose(value, _expected_length([alpha] * length), rtol=1e-13)


def test_expected_tokens_and_its_gradient_are_precise_up_to_one():
  alphas = np.array([0, 1e-9, 0.3, 0.5, 0.9, 1 - 1e-4, 1 - 1e-7, 1 - 1e-12, 1 - 1e-16, 1])
  length = 12
  powers = alphas[:, None] ** np.arange(length + 1)
  slopes = np.arange(1, length + 1) * alphas[:, None] ** np.arange(length)
  value_fn = functools.partial(theory.expected_tokens, draft_length=length)
  value, slope = jax.jit(jax.vmap(jax.value_and_grad(value_fn)))(alphas)
  np.testing.assert_allclose(value, powers.sum(-1), rtol=1e-14)
  np.testing.assert_allclose(slope, slopes.sum(-1), rtol=1e-12)
  single = theory.expected_tokens(alphas.astype(np.float32), length)
  assert single.dtype == jnp.float32
  np.testing.assert_allclose(single, powers.sum(-1), rtol=1e-6)


@hypothesis.given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
@hypothesis.settings(deadline=None, max_examples=50)
def test_expected_tokens_by_depth_equals_enumeration(acceptance):
  value = _call(theory.expected_tokens_by_depth, np.array(acceptance))
  np.testing.assert_allclose(value, _expected_length(acceptance), rtol=1e-13)


def test_expected_tokens_controlled_holds_when_the_controller_knows_the_acceptance():
  # Easy and hard contexts; the controller drafts on with a probability that depends on which.
  # Acceptance and length are therefore dependent, and the marginals must be conditioned.
  easy = np.array([0.5, 0.5])
  accept = np.array([[0.9, 0.8, 0.9], [0.3, 0.4, 0.2]])
  go_on = np.array([[1.0, 0.9, 0.9], [0.7, 0.4, 0.1]])
  exact = sum(w * _expected_length(a * c) for w, a, c in zip(easy, accept, go_on, strict=True))
  reach = easy
  acceptance, continuation = [], []
  for a, c in zip(accept.T, go_on.T, strict=True):
    continuation.append((reach * c).sum() / reach.sum())
    acceptance.append((reach * c * a).sum() / (reach * c).sum())
    reach = reach * c * a
  value = _call(theory.expected_tokens_controlled, np.array(acceptance), np.array(continuation))
  np.testing.assert_allclose(value, exact, rtol=1e-14)


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=50)
def test_path_probabilities_equal_a_walk_to_the_root(data):
  num_nodes = data.draw(st.sampled_from([1, 2, 9, 17]))
  parents = np.array([-1, *(data.draw(st.integers(0, i - 1)) for i in range(1, num_nodes))])
  acceptance = np.array(
    data.draw(st.lists(st.floats(0, 1), min_size=num_nodes, max_size=num_nodes))
  )
  expected = np.ones(num_nodes)
  for node in range(1, num_nodes):
    expected[node] = acceptance[node] * expected[parents[node]]
  value = _call(theory.path_probabilities, parents, acceptance)
  np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-300)
  total = _call(theory.expected_tokens_tree, parents, acceptance)
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-13)


def test_expected_tokens_tree_equals_a_simulated_walk():
  parents = np.array([-1, 0, 0, 1, 1, 2, 3])
  acceptance = np.array([1, 0.5, 0.3, 0.4, 0.4, 0.9, 0.7])
  # At each node one child at most is kept; enumerate where the walk ends.
  value = [0.0] * 7
  for node in reversed(range(7)):
    below = [c for c in range(7) if parents[c] == node]
    value[node] = 1 + sum(acceptance[c] * value[c] for c in below)
  batch = np.stack([acceptance, acceptance * 0.5])
  total = _call(theory.expected_tokens_tree, parents, batch)
  np.testing.assert_allclose(total[0], value[0], rtol=1e-14)
  per_row = _call(theory.expected_tokens_tree, np.stack([parents, parents]), batch)
  np.testing.assert_allclose(per_row, total, rtol=1e-14)


def test_expected_tokens_tree_of_a_chain_is_that_of_the_chain():
  acceptance = np.array([0.9, 0.5, 0.7, 0.2])
  tree = theory.expected_tokens_tree(np.arange(-1, 4), np.concatenate([[1.0], acceptance]))
  np.testing.assert_allclose(tree, theory.expected_tokens_by_depth(acceptance), rtol=1e-14)


def test_walltime_speedup_equals_simulated_time():
  alpha, cost_ratio, length, num_rounds = 0.7, 0.1, 4, 200_000
  tests = np.random.default_rng(0).random((num_rounds, length)) < alpha
  tokens = num_rounds + np.cumprod(tests, axis=1).sum()
  simulated = tokens / (num_rounds * (1 + length * cost_ratio))
  value = _call(theory.walltime_speedup, alpha, cost_ratio, length)
  # The standard deviation of a round's tokens is below 2: five standard errors.
  np.testing.assert_allclose(value, simulated, atol=5 * 2 / num_rounds**0.5)


def test_walltime_general_reduces_to_the_simple_form_when_width_is_free():
  flat = theory.CostCurve(np.array([1, 8, 64]), np.array([20.0, 20.0, 20.0]))
  alpha, length = np.array([0.3, 0.8]), 5
  value = theory.walltime_general(
    theory.expected_tokens(alpha, length),
    flat,
    block_size=length + 1,
    num_draft_steps=length,
    draft_step_ms=3.0,
  )
  np.testing.assert_allclose(value, theory.walltime_speedup(alpha, 3 / 20, length), rtol=1e-14)


def test_walltime_general_counts_every_millisecond():
  curve = theory.CostCurve(np.array([1, 4, 16]), np.array([10.0, 13.0, 37.0]))
  value = theory.walltime_general(
    3.0, curve, block_size=10, num_draft_steps=2.5, draft_step_ms=2.0, overhead_ms=1.0
  )
  np.testing.assert_allclose(value, 3.0 * 10 / (5 + 25 + 1), rtol=1e-14)


def test_call_time_is_nan_where_nothing_was_measured():
  curve = theory.CostCurve(np.array([2, 4]), np.array([10.0, 13.0]))
  times = np.asarray(theory.call_time_ms(curve, np.array([1.0, 2.0, 3.0, 4.0, 5.0])))
  np.testing.assert_allclose(times, [np.nan, 10, 11.5, 13, np.nan])


def test_ops_factor_counts_operations():
  alpha, ops_ratio, length = 0.6, 0.2, 3
  per_round = length * ops_ratio + length + 1  # the target reads every draft and the root
  expected = per_round / _expected_length([alpha] * length)
  np.testing.assert_allclose(_call(theory.ops_factor, alpha, ops_ratio, length), expected)


@hypothesis.given(st.floats(0, 1), st.floats(0.01, 1))
@hypothesis.settings(deadline=None, max_examples=100)
def test_worth_it_exactly_when_some_draft_length_gains(alpha, cost_ratio):
  hypothesis.assume(abs(alpha - cost_ratio) > 1e-9)
  length, best = _call(theory.optimal_draft_length, alpha, cost_ratio, max_length=30)
  if _call(theory.worth_it, alpha, cost_ratio):
    assert length >= 1
    assert best >= (1 + alpha) / (1 + cost_ratio) - 1e-12
  else:
    assert length == 0
    np.testing.assert_allclose(best, 1, rtol=1e-15)


def test_optimal_draft_length_at_known_points():
  alpha, cost_ratio = np.array([0.6, 0.8, 0.9, 0.1]), np.array([0.1, 0.05, 0.02, 0.3])
  length, best = _call(theory.optimal_draft_length, alpha, cost_ratio, max_length=64)
  np.testing.assert_array_equal(length, [3, 8, 19, 0])
  assert length.dtype == np.int32
  for a, c, g, s in zip(alpha, cost_ratio, length, best, strict=True):
    speedups = [_expected_length([a] * n) / (1 + n * c) for n in range(65)]
    assert g == np.argmax(speedups)
    np.testing.assert_allclose(s, max(speedups), rtol=1e-13)


# --- Several drafts: the optimum ---------------------------------------------------------------


@pytest.mark.parametrize('num_drafts', [1, 2, 3])
def test_optimal_acceptance_with_replacement_equals_the_linear_program(num_drafts):
  p, q = _laws(3, rows=6)
  value = _call(theory.optimal_acceptance_with_replacement, p, q, num_drafts=num_drafts)
  expected = [
    _transport_optimum(a, _draft_tuples(b, num_drafts, replace=True))
    for a, b in zip(p, q, strict=True)
  ]
  np.testing.assert_allclose(value, expected, atol=1e-9)


@pytest.mark.parametrize('num_drafts', [1, 2, 3, 4])
def test_optimal_acceptance_without_replacement_equals_the_linear_program(num_drafts):
  p, q = _laws(4, rows=6)
  value = _call(theory.optimal_acceptance_without_replacement, p, q, num_drafts=num_drafts)
  expected = [
    _transport_optimum(a, _draft_tuples(b, num_drafts, replace=False))
    for a, b in zip(p, q, strict=True)
  ]
  np.testing.assert_allclose(value, expected, atol=1e-9)


@pytest.mark.parametrize('num_drafts', [2, 3, 5])
def test_optimal_acceptance_without_replacement_equals_brute_force_over_all_sets(num_drafts):
  p, q = _laws(5, rows=4)
  value = _call(theory.optimal_acceptance_without_replacement, p, q, num_drafts=num_drafts)
  for a, b, alpha in zip(p, q, value, strict=True):
    drafts = list(_draft_tuples(b, num_drafts, replace=False))
    bounds = []
    for inside in itertools.product([False, True], repeat=V):
      inside = np.array(inside)
      all_inside = sum(w for tokens, w in drafts if inside[list(tokens)].all())
      bounds.append(1 + a[inside].sum() - all_inside)
    np.testing.assert_allclose(alpha, min(bounds), atol=1e-12)


def test_two_drafts_agree_in_closed_form_and_by_quadrature():
  p, q = (x[:12] for x in _laws(6, vocab_size=40))
  closed = _call(theory.optimal_acceptance_without_replacement, p, q, num_drafts=2)

  @jax.jit
  def by_quadrature(p, q):
    p, q = sorted_by_ratio(p, q)
    return several_drafts._least_bound(p, several_drafts._some_draft_outside(q, 2, 256))

  integral = by_quadrature(p, q)
  np.testing.assert_allclose(closed, integral, atol=1e-13)


def test_the_quadrature_has_converged_at_eight_drafts():
  p, q = (x[:6] for x in _laws(7, vocab_size=60))
  fn = functools.partial(_call, theory.optimal_acceptance_without_replacement, p, q, num_drafts=8)
  np.testing.assert_allclose(fn(num_quadrature_nodes=256), fn(num_quadrature_nodes=700), atol=1e-12)


def test_optima_in_float32_at_a_large_vocabulary():
  logits = np.random.default_rng(8).normal(size=(2, 2000)) * 3
  p, q = scipy.special.softmax(logits, axis=-1)
  for fn in (
    theory.optimal_acceptance_with_replacement,
    theory.optimal_acceptance_without_replacement,
  ):
    exact = _call(fn, p, q, num_drafts=3)
    single = _call(fn, p.astype(np.float32), q.astype(np.float32), num_drafts=3)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, atol=2e-5)


# --- Several drafts: the rules -----------------------------------------------------------------


def _enumerate_multi_step(p, laws, tokens):
  """Acceptance of one draft tuple under multi-step verification."""
  refused = 1.0
  for q, token in zip(laws, tokens, strict=True):
    refused *= 1 - min(1, p[token] / q[token])
    p = _residual(p, q)
  return 1 - refused


@pytest.mark.parametrize('num_drafts', [1, 2, 3])
def test_specinfer_acceptance_equals_enumeration(num_drafts):
  p, q = _laws(9)
  expected = [
    sum(
      w * _enumerate_multi_step(a, [b] * num_drafts, tokens)
      for tokens, w in _draft_tuples(b, num_drafts, replace=True)
    )
    for a, b in zip(p, q, strict=True)
  ]
  value = _call(theory.specinfer_acceptance, p, q, num_drafts=num_drafts)
  np.testing.assert_allclose(value, expected, atol=1e-13)
  laws = np.repeat(q[:, None], num_drafts, axis=1)
  np.testing.assert_allclose(_call(theory.multi_step_acceptance, p, laws), expected, atol=1e-13)


def test_multi_step_acceptance_of_different_drafters_equals_enumeration():
  p, first = _laws(10, rows=4)
  second = np.roll(first, 1, axis=0)
  expected = []
  for a, b, c in zip(p, first, second, strict=True):
    outcomes = itertools.product(np.flatnonzero(b), np.flatnonzero(c))
    expected.append(
      sum(b[x] * c[y] * _enumerate_multi_step(a, [b, c], (x, y)) for x, y in outcomes)
    )
  value = _call(theory.multi_step_acceptance, p, np.stack([first, second], axis=1))
  np.testing.assert_allclose(value, expected, atol=1e-13)


@pytest.mark.parametrize('num_drafts', [1, 2, 3, 8])
def test_kseq_factor_solves_its_equation_and_keeps_the_rule_lossless(num_drafts):
  p, q = _laws(11)
  rho = _call(theory.kseq_factor, p, q, num_drafts=num_drafts)
  assert ((rho >= 1) & (rho <= num_drafts)).all()
  kept = np.minimum(q, p / rho[:, None])
  beta = kept.sum(-1)
  accepted = 1 - (1 - beta) ** num_drafts
  # Lossless: what the accepted drafts bring of a token never exceeds what the target wants of it.
  brought = kept * (accepted / np.where(beta > 0, beta, 1))[:, None]
  assert (brought <= p + 1e-13).all()
  inner = rho > 1 + 1e-9
  np.testing.assert_allclose(accepted[inner], (rho * beta)[inner], atol=1e-13)
  value = _call(theory.kseq_acceptance, p, q, num_drafts=num_drafts)
  np.testing.assert_allclose(value, accepted, atol=1e-13)


def test_kseq_acceptance_equals_enumeration():
  p, q = _laws(12, rows=4)
  rho = _call(theory.kseq_factor, p, q, num_drafts=3)
  expected = []
  for a, b, r in zip(p, q, rho, strict=True):
    refuse = 1 - np.minimum(1, a / np.where(b > 0, r * b, 1))
    tuples = _draft_tuples(b, 3, replace=True)
    expected.append(sum(w * (1 - refuse[list(tokens)].prod()) for tokens, w in tuples))
  value = _call(theory.kseq_acceptance, p, q, num_drafts=3)
  np.testing.assert_allclose(value, expected, atol=1e-13)


@pytest.mark.parametrize('num_drafts', [1, 2, 3, 5])
def test_greedy_draft_acceptance_equals_the_optimum_for_its_drafts(num_drafts):
  p, q = (x[:12] for x in _laws(13))
  expected = []
  for a, b in zip(p, q, strict=True):
    top = np.argsort(-b, kind='stable')[: num_drafts - 1]
    rest = b.copy()
    rest[top] = 0
    drafts = [((*top, x), rest[x] / rest.sum()) for x in np.flatnonzero(rest)]
    expected.append(_transport_optimum(a, drafts))
  value = _call(theory.greedy_draft_acceptance, p, q, num_drafts=num_drafts)
  np.testing.assert_allclose(value, expected, atol=1e-9)


def test_greedy_draft_acceptance_when_the_deterministic_drafts_use_up_the_law():
  p, half = np.full(4, 0.25), np.array([0.5, 0.5, 0, 0])
  value = _call(theory.greedy_draft_acceptance, p, half, num_drafts=3)
  np.testing.assert_allclose(value, 0.5)


def _enumerate_recursive(p, q, num_drafts):
  """Acceptance of recursive rejection, summed over draft tuples and not over rejections."""
  total = 0.0
  for tokens, w in _draft_tuples(q, num_drafts, replace=False):
    target, draft, refused = p, q, 1.0
    for token in tokens:
      refused *= 1 - min(1, target[token] / draft[token])
      target = _residual(target, draft)
      draft = np.where(np.arange(len(q)) == token, 0, draft)
      draft = draft / draft.sum() if draft.sum() > 0 else draft
    total += w * (1 - refused)
  return total


@pytest.mark.parametrize('num_drafts', [1, 2, 3, 4])
def test_recursive_rejection_acceptance_equals_enumeration(num_drafts):
  p, q = _laws(14, rows=6)
  expected = [_enumerate_recursive(a, b, num_drafts) for a, b in zip(p, q, strict=True)]
  value = _call(theory.recursive_rejection_acceptance, p, q, num_drafts=num_drafts)
  np.testing.assert_allclose(value, expected, atol=1e-13)


def test_recursive_rejection_acceptance_sampled_agrees_within_its_error():
  p, q = _laws(15)
  key = jax.random.key(0)
  sampled = theory.recursive_rejection_acceptance_sampled
  for num_drafts in (1, 3):
    exact = _call(theory.recursive_rejection_acceptance, p, q, num_drafts=num_drafts)
    mean, error = _call(sampled, key, p, q, num_drafts=num_drafts, num_samples=4000)
    assert (error < 0.01).all()
    # 40 comparisons at five standard errors; the estimates are far from normal in a few rows.
    assert (abs(mean - exact) <= 5 * error + 1e-4).all()
  first = _call(sampled, key, p, q, num_drafts=1, num_samples=2)
  np.testing.assert_allclose(first[0], _call(theory.overlap, p, q), atol=1e-13)


def _law(weights):
  weights = np.array(weights)
  return (weights + 1e-300) / (weights + 1e-300).sum()


_LAW = st.lists(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 1.0, 3.0, 20.0]), min_size=V, max_size=V)


@hypothesis.given(_LAW.map(_law), _LAW.map(_law), st.integers(1, 3))
@hypothesis.settings(deadline=None, max_examples=60)
def test_no_rule_beats_the_optimum_and_more_drafts_never_hurt_it(p, q, num_drafts):
  def value(fn, count=num_drafts):
    return float(_call(fn, p, q, num_drafts=count))

  tolerance = 1e-12
  with_replacement = value(theory.optimal_acceptance_with_replacement)
  without = value(theory.optimal_acceptance_without_replacement)
  single = float(_call(theory.overlap, p, q))
  assert value(theory.specinfer_acceptance) <= with_replacement + tolerance
  assert value(theory.kseq_acceptance) <= with_replacement + tolerance
  assert value(theory.recursive_rejection_acceptance) <= without + tolerance
  assert single <= with_replacement + tolerance
  assert with_replacement <= without + tolerance  # distinct drafts are never worse
  more = value(theory.optimal_acceptance_without_replacement, num_drafts + 1)
  assert without <= more + tolerance <= 1 + 2 * tolerance


def test_rules_with_one_draft_are_plain_speculative_sampling():
  p, q = _laws(16)
  for fn in (
    theory.optimal_acceptance_with_replacement,
    theory.optimal_acceptance_without_replacement,
    theory.specinfer_acceptance,
    theory.kseq_acceptance,
    theory.greedy_draft_acceptance,
    theory.recursive_rejection_acceptance,
  ):
    np.testing.assert_allclose(
      _call(fn, p, q, num_drafts=1), _call(theory.overlap, p, q), atol=1e-13
    )


_GRADIENTS = [
  theory.optimal_acceptance_with_replacement,
  theory.optimal_acceptance_without_replacement,
  theory.specinfer_acceptance,
  theory.kseq_acceptance,
  theory.kseq_factor,
  theory.greedy_draft_acceptance,
  theory.recursive_rejection_acceptance,
]


@pytest.mark.parametrize('fn', _GRADIENTS)
def test_gradient_in_the_draft_equals_finite_differences(fn):
  rng = np.random.default_rng(17)
  p, logits, direction = rng.dirichlet(np.ones(V)), rng.normal(size=V), rng.normal(size=V)

  @jax.jit
  def along(step):
    return fn(p, jax.nn.softmax(logits + step * direction), 3)

  step = 1e-5
  difference = (along(step) - along(-step)) / (2 * step)
  np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('fn', _GRADIENTS)
def test_gradient_is_finite_for_awkward_laws(fn):
  p, q = (jnp.asarray(x) for x in _laws(18, rows=3))
  gradients = jax.jit(jax.grad(lambda p, q: fn(p, q, 2).sum(), (0, 1)))(p, q)
  assert np.isfinite(gradients).all()


# --- Chains of rounds, fits, estimates ---------------------------------------------------------


def test_markov_tree_value_equals_simulated_rounds():
  transitions = np.array([[0.0, 0.5, 0.5], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2]])
  tokens = np.array([1.0, 1.6, 2.3])
  law = np.full(3, 1 / 3)
  for _ in range(500):
    law = law @ transitions
  np.testing.assert_allclose(_call(theory.stationary_law, transitions), law, atol=1e-14)
  value = _call(theory.markov_tree_value, np.stack([transitions] * 2), np.stack([tokens] * 2))
  np.testing.assert_allclose(value, [law @ tokens] * 2, rtol=1e-14)


def test_stationary_law_of_a_periodic_chain():
  law = theory.stationary_law(np.array([[0.0, 1.0], [1.0, 0.0]]))
  np.testing.assert_allclose(law, [0.5, 0.5])


def test_fit_loglinear_equals_a_reference_regression():
  rng = np.random.default_rng(19)
  x = 10 ** rng.uniform(1, 6, size=(3, 9))
  y = 0.4 * np.log10(x) + 1.5 + 0.1 * rng.normal(size=x.shape)
  fit = _call(theory.fit_loglinear, x, y, confidence=0.9)
  for i in range(3):
    expected: Any = scipy.stats.linregress(np.log10(x[i]), y[i])
    quantile = scipy.stats.t.ppf(0.95, 7)
    np.testing.assert_allclose(fit.slope[i], expected.slope, rtol=1e-12)
    np.testing.assert_allclose(fit.intercept[i], expected.intercept, rtol=1e-12)
    np.testing.assert_allclose(fit.slope_error[i], expected.stderr, rtol=1e-10)
    for interval, centre, error in (
      (fit.slope_interval[i], expected.slope, expected.stderr),
      (fit.intercept_interval[i], expected.intercept, expected.intercept_stderr),
    ):
      radius = quantile * error
      np.testing.assert_allclose(interval, [centre - radius, centre + radius], rtol=1e-8)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(np.float64, 1e-8), (np.float32, 1e-2)])
def test_student_quantile(dtype, tolerance):
  cases = list(itertools.product((0.5, 0.95, 0.999), (1, 2, 5, 40)))
  values = jax.jit(lambda: [fits._student_quantile(c, f, dtype) for c, f in cases])()
  for value, (confidence, freedom) in zip(values, cases, strict=True):
    assert value.dtype == dtype
    expected = scipy.stats.t.ppf((1 + confidence) / 2, freedom)
    np.testing.assert_allclose(value, expected, rtol=tolerance)


def test_fit_loglinear_intervals_cover_as_often_as_they_say():
  num_fits = 4000
  rng = np.random.default_rng(20)
  x = np.broadcast_to(10.0 ** np.arange(6), (num_fits, 6))
  y = 2.0 * np.log10(x) - 1.0 + rng.normal(size=x.shape)
  fit = _call(theory.fit_loglinear, x, y, confidence=0.8)
  for interval, truth in ((fit.slope_interval, 2.0), (fit.intercept_interval, -1.0)):
    covered = ((interval[:, 0] < truth) & (truth < interval[:, 1])).mean()
    assert abs(covered - 0.8) < 5 * (0.8 * 0.2 / num_fits) ** 0.5


def test_fit_loglinear_through_two_points_has_infinite_intervals():
  fit = theory.fit_loglinear(np.array([10.0, 1000.0]), np.array([1.0, 2.0]))
  np.testing.assert_allclose((fit.slope, fit.intercept), (0.5, 0.5), rtol=1e-14)
  np.testing.assert_array_equal(fit.slope_interval, [-np.inf, np.inf])


def test_combine_loglinear_recovers_an_additive_law():
  def law(tokens, size, batch):
    return 0.5 * np.log10(tokens) + 0.2 * np.log10(size) - 0.3 * np.log10(batch) + 1.0

  reference = np.array([1e6, 1e8, 4.0])
  fits = []
  for factor in range(3):
    x = np.tile(reference, (5, 1))
    x[:, factor] *= 10.0 ** np.arange(5)
    fits.append(theory.fit_loglinear(x[:, factor], law(*x.T)))
  points = np.array([[1e9, 1e9, 1.0], reference])
  value, error = theory.combine_loglinear(
    fits, points, reference_x=reference, reference_y=law(*reference)
  )
  np.testing.assert_allclose(value, law(*points.T), rtol=1e-12)
  np.testing.assert_allclose(error, 0, atol=1e-12)


def test_combine_loglinear_adds_independent_errors():
  def fit(slope, error):
    empty = jnp.zeros(2)
    return theory.LogLinearFit(jnp.array(slope), empty[0], empty, empty, jnp.array(error), empty[0])

  value, error = theory.combine_loglinear(
    [fit(1.0, 0.3), fit(2.0, 0.4)],
    np.array([100.0, 10.0]),
    reference_x=np.array([10.0, 1.0]),
    reference_y=5.0,
  )
  np.testing.assert_allclose((value, error), (8.0, 0.5), rtol=1e-14)


def test_information_surplus_of_a_table_model():
  # The hidden state decides which of two futures comes after the next token, fairly.
  rng = np.random.default_rng(21)
  joint = rng.dirichlet(np.ones(12)).reshape(2, 2, 3)  # hidden, next, future
  future_given_next = joint.sum(0) / joint.sum((0, 2))[:, None]
  future_given_both = joint / joint.sum(2, keepdims=True)
  exact = (joint * np.log(future_given_both / future_given_next)).sum()
  num_positions = 100_000
  hidden, token, future = np.unravel_index(
    rng.choice(12, size=num_positions, p=joint.ravel()), joint.shape
  )
  estimate = _call(
    theory.information_surplus,
    np.log(future_given_next[token, future]),
    np.log(future_given_both[hidden, token, future]),
  )
  assert abs(estimate.surplus - exact) < 5 * estimate.standard_error
  np.testing.assert_allclose(
    estimate.cross_entropy_without - estimate.cross_entropy_with, estimate.surplus, atol=1e-12
  )


def test_information_surplus_at_its_ends():
  coin = np.log(np.full(10, 0.5))
  independent = theory.information_surplus(coin, coin)
  np.testing.assert_array_equal((independent.surplus, independent.standard_error), (0, 0))
  known = theory.information_surplus(coin, np.zeros(10))
  np.testing.assert_allclose(known.surplus, np.log(2))


# --- Inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('fn', 'args', 'kwargs', 'message'),
  [
    (theory.overlap, (np.ones(3), np.ones(4)), {}, 'same shape'),
    (theory.specinfer_acceptance, (np.ones(3), np.ones(3), 0), {}, 'at least 1'),
    (theory.greedy_draft_acceptance, (np.ones(3), np.ones(3), 4), {}, 'only 3 tokens'),
    (theory.recursive_rejection_acceptance, (np.ones(99), np.ones(99), 4), {}, 'sampled'),
    (theory.multi_step_acceptance, (np.ones(3), np.ones((2, 4))), {}, r'\[B, K, V\]'),
    (theory.expected_tokens_tree, (np.array([-1, 0]), np.ones(3)), {}, 'number of nodes'),
    (theory.optimal_draft_length, (0.5, 0.1, -1), {}, 'at least 0'),
    (theory.fit_loglinear, (np.ones(1), np.ones(1)), {}, 'at least 2'),
    (theory.fit_loglinear, (np.ones(3), np.ones(3)), {'confidence': 95}, 'between 0 and 1'),
    (theory.information_surplus, (np.ones(3), np.ones(4)), {}, 'same positions'),
  ],
)
def test_wrong_input_is_refused(fn, args, kwargs, message):
  with pytest.raises(ValueError, match=message):
    fn(*args, **kwargs)


def test_dtype_of_the_input_is_kept_and_halves_are_widened():
  for dtype, expected in (('bfloat16', 'float32'), ('float32', 'float32'), ('float64', 'float64')):
    p = jax.ShapeDtypeStruct((3, V), dtype)
    for fn in (
      theory.overlap,
      theory.total_variation,
      theory.coupled_acceptance,
      *(functools.partial(fn, num_drafts=3) for fn in _GRADIENTS),
      functools.partial(theory.lenient_output, leniency=0.5),
      functools.partial(theory.walltime_speedup, draft_length=3),
      theory.fit_loglinear,
      theory.information_surplus,
    ):
      for array in jax.tree.leaves(jax.eval_shape(fn, p, p)):
        assert array.dtype == expected

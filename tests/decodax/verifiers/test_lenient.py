"""Lenient speculative sampling: its output law in closed form, its bound, and its exact end."""

import jax.numpy as jnp
import numpy as np
import pytest

from decodax import theory
from decodax.verifiers import lenient
from decodax.verifiers import speculative
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import V
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import evidence_of
from tests.decodax.verifiers.chains import laws_after
from tests.decodax.verifiers.chains import outcome_of
from tests.decodax.verifiers.chains import position_laws
from tests.enumeration import expected_accepted
from tests.enumeration import output_law
from tests.table_model import sequence_law

NUM_DRAFTS = 2
FUNCTIONS = {
  'linear': (lambda p, e: p / e, lambda q, e: q * e),
  'squared': (lambda p, e: p / e**2, lambda q, e: q * e**2),
  'exponential': (lambda p, e: p**e, lambda q, e: q ** (1 / e)),
}
pytestmark = pytest.mark.usefixtures('float64')


def _closed_form(p, q, leniency, function):
  raised, lowered = FUNCTIONS[function]
  kept = np.minimum(q, raised(p, leniency))
  residual = np.maximum(p - lowered(q, leniency), 0)
  return kept + (1 - kept.sum()) * residual / max(residual.sum(), 1e-300)


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('case', CASES)
def test_the_output_law_is_the_closed_form(case, function):
  leniency, tables = 0.6, CASES[case]
  chains = every_chain(tables, NUM_DRAFTS)
  rule = lenient(leniency, function=function)
  laws = position_laws(outcome_of(rule, chains.proposal, chains.logits), chains.weight)
  for prefix, law in laws.items():
    p, q = laws_after(tables, prefix)
    if len(prefix) == NUM_DRAFTS:
      np.testing.assert_allclose(law, p, atol=1e-12)
      continue
    np.testing.assert_allclose(law, _closed_form(p, q, leniency, function), atol=1e-12)
    if function == 'linear':
      np.testing.assert_allclose(law, theory.lenient_output(p, q, leniency).law, atol=1e-12)
      assert np.all(law <= p / leniency + 1e-12)


@pytest.mark.parametrize('function', FUNCTIONS)
def test_leniency_one_is_speculative_sampling(function):
  tables = CASES['each misses one']
  chains = every_chain(tables, NUM_DRAFTS)
  outcome = outcome_of(lenient(1.0, function=function), chains.proposal, chains.logits)
  law = output_law(outcome, chains.weight, tables.p, CONTEXT, NUM_DRAFTS + 1)
  np.testing.assert_allclose(law, sequence_law(tables.p, CONTEXT, NUM_DRAFTS + 1), atol=1e-12)
  vanilla = outcome_of(speculative, chains.proposal, chains.logits)
  accepted = [expected_accepted(one, chains.weight) for one in (outcome, vanilla)]
  assert abs(accepted[0] - accepted[1]) < 1e-12


@pytest.mark.parametrize('function', FUNCTIONS)
def test_accepts_more_the_more_lenient(function):
  chains = every_chain(CASES['random'], NUM_DRAFTS)
  accepted = [
    expected_accepted(
      outcome_of(lenient(e, function=function), chains.proposal, chains.logits), chains.weight
    )
    for e in (1.0, 0.8, 0.5, 0.2)
  ]
  assert np.all(np.diff(accepted) > 0)


def test_takes_drafts_that_are_certain():
  tables = CASES['certain draft']
  chains = every_chain(tables, NUM_DRAFTS)
  told = outcome_of(lenient(0.7), chains.proposal, chains.logits)
  untold = outcome_of(lenient(0.7), chains.proposal._replace(laws=None), chains.logits)
  for prefix, law in position_laws(untold, chains.weight).items():
    np.testing.assert_allclose(law, position_laws(told, chains.weight)[prefix], atol=1e-12)


def test_leniency_may_differ_by_row():
  chains = every_chain(CASES['random'], 1)
  rows = len(chains.weight)
  leniency = np.where(np.arange(rows) % 2, 0.5, 1.0)
  # One evaluation of the rule, without the enumerator, whose rows are scripts.
  seen = {}

  class Recorder:
    def accepts(self, probability, depth, index=0):
      seen[depth] = np.asarray(probability)
      return jnp.ones(probability.shape, bool)

    def pick(self, law, depth, index=0):
      return jnp.argmax(law, axis=-1)

  def chances(value):
    evidence = evidence_of(chains.logits)
    rule = lenient(jnp.asarray(value))
    rule.verify(Recorder(), chains.proposal, chains.logits, max_depth=1, evidence=evidence)
    return seen[1]

  mixed, strict, loose = chances(leniency), chances(1.0), chances(0.5)
  np.testing.assert_array_equal(mixed, np.where(np.arange(rows) % 2, loose, strict))


@pytest.mark.parametrize('leniency', [1.0, 0.3])
def test_at_temperature_0_near_best_drafts_pass(leniency):
  tables = CASES['random']
  chains = every_chain(tables, 1)
  p = laws_after(tables, ())[0]
  greedy = np.where(np.arange(V) == p.argmax(), 0, -np.inf)
  warped = jnp.broadcast_to(jnp.asarray(greedy), chains.logits.shape)
  evidence = evidence_of(chains.logits, temperature=0.0)
  outcome = outcome_of(lenient(leniency), chains.proposal, warped, evidence=evidence)
  for row, weight, count, tokens in zip(*outcome, strict=True):
    assert weight == 1
    passes = row == p.argmax() or p[row] > leniency * p.max()
    assert count == passes
    assert tokens[0] == (row if passes else p.argmax())
  assert {0.3: 2, 1.0: 1}[leniency] == outcome.num_accepted.sum()


def test_refuses_a_leniency_outside_its_range():
  with pytest.raises(ValueError, match='leniency'):
    lenient(1.5)
  with pytest.raises(ValueError, match='function'):
    lenient(0.5, function='cubic')

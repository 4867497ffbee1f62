"""Fuzzy verification and the divergences it compares."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from decodax.verifiers import fuzzy
from decodax.verifiers.divergence import divergence
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import evidence_of
from tests.decodax.verifiers.chains import laws_after
from tests.decodax.verifiers.chains import log
from tests.decodax.verifiers.chains import outcome_of
from tests.decodax.verifiers.chains import position_laws
from tests.enumeration import output_law
from tests.table_model import sequence_law

NUM_DRAFTS = 2
pytestmark = pytest.mark.usefixtures('float64')


def _kl(p, q):
  return scipy.special.rel_entr(p, q).sum(-1)


BY_HAND = {
  'kl': _kl,
  'reverse_kl': lambda p, q: _kl(q, p),
  'js': lambda p, q: (_kl(p, (p + q) / 2) + _kl(q, (p + q) / 2)) / 2,
  'tv': lambda p, q: np.abs(p - q).sum(-1) / 2,
}


@pytest.mark.parametrize('metric', BY_HAND)
@pytest.mark.parametrize('case', CASES)
def test_divergences(case, metric):
  p, q = CASES[case]
  expected = BY_HAND[metric](p, q)
  # Logits need not be normalised.
  np.testing.assert_allclose(divergence(log(p) + 3, log(q) - 2, metric), expected, atol=1e-12)
  if case == 'equal':
    assert not np.any(divergence(log(p), log(q), metric))


@pytest.mark.parametrize('metric', BY_HAND)
def test_divergence_of_the_likeliest_tokens_and_the_rest(metric):
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(7), 4), rng.dirichlet(np.ones(7), 4)
  order = np.argsort(-p, axis=-1)
  merged = []
  for law in (p, q):
    law = np.take_along_axis(law, order, axis=-1)
    merged.append(np.concatenate([law[:, :3], law[:, 3:].sum(-1, keepdims=True)], axis=-1))
  actual = divergence(log(p), log(q), metric, top_k=3)
  np.testing.assert_allclose(actual, BY_HAND[metric](*merged), atol=1e-12)
  whole = divergence(log(p), log(q), metric, top_k=7)
  np.testing.assert_allclose(whole, BY_HAND[metric](p, q), atol=1e-12)


@pytest.mark.parametrize('metric', BY_HAND)
@pytest.mark.parametrize('case', ['random', 'close', 'each misses one', 'equal'])
def test_each_position_emits_one_law_or_the_other(case, metric):
  tables, threshold = CASES[case], 0.1
  chains = every_chain(tables, NUM_DRAFTS)
  rule = fuzzy(threshold, metric=metric)
  laws = position_laws(outcome_of(rule, chains.proposal, chains.logits), chains.weight)
  for prefix, law in laws.items():
    p, q = laws_after(tables, prefix)
    close = len(prefix) < NUM_DRAFTS and BY_HAND[metric](p, q) <= threshold
    np.testing.assert_allclose(law, q if close else p, atol=1e-12)


@pytest.mark.parametrize('case', ['random', 'equal', 'disjoint'])
def test_threshold_0_is_lossless(case):
  tables = CASES[case]
  chains = every_chain(tables, NUM_DRAFTS)
  outcome = outcome_of(fuzzy(0.0), chains.proposal, chains.logits)
  law = output_law(outcome, chains.weight, tables.p, CONTEXT, NUM_DRAFTS + 1)
  np.testing.assert_allclose(law, sequence_law(tables.p, CONTEXT, NUM_DRAFTS + 1), atol=1e-12)
  accepted = {'equal': NUM_DRAFTS}.get(case, 0)
  assert np.all(outcome.num_accepted == accepted)


def test_an_infinite_threshold_keeps_every_draft():
  chains = every_chain(CASES['disjoint'], NUM_DRAFTS)
  outcome = outcome_of(fuzzy(np.inf, metric='kl'), chains.proposal, chains.logits)
  assert np.all(outcome.num_accepted == NUM_DRAFTS)


def test_at_temperature_0_laws_are_compared_at_temperature_1():
  tables = CASES['random']
  chains = every_chain(tables, NUM_DRAFTS)
  best = np.asarray(chains.logits).argmax(-1)
  warped = jnp.where(np.arange(3) == best[..., None], 0, -jnp.inf)
  evidence = evidence_of(chains.logits, temperature=0.0)
  for threshold in (0.0, 0.1):
    outcome = outcome_of(fuzzy(threshold), chains.proposal, warped, evidence=evidence)
    drafts = np.asarray(chains.proposal.tokens)[:, 1:]
    p, q = (np.exp(np.asarray(a))[:, :-1] for a in (chains.logits, chains.proposal.laws))
    passes = (BY_HAND['js'](p, q) <= threshold) | (drafts == best[:, :-1])
    counts = np.cumprod(passes, axis=-1).sum(-1)
    np.testing.assert_array_equal(outcome.num_accepted, counts[outcome.row])
    ends = outcome.tokens[np.arange(len(counts)), outcome.num_accepted]
    np.testing.assert_array_equal(ends, best[outcome.row, outcome.num_accepted])


def test_refuses_an_unknown_metric():
  with pytest.raises(ValueError, match='metric'):
    fuzzy(metric='cosine')

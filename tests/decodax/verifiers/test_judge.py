"""Judged verification: what it emits for a given judge, its exact end, and the judge's inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.verifiers import divergence_judge
from decodax.verifiers import judge
from decodax.verifiers.divergence import divergence
from decodax.verifiers.judge import linear_score
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import V
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import evidence_of
from tests.decodax.verifiers.chains import laws_after
from tests.decodax.verifiers.chains import log
from tests.decodax.verifiers.chains import outcome_of
from tests.decodax.verifiers.chains import position_laws
from tests.enumeration import output_law
from tests.table_model import sequence_law

NUM_DRAFTS = 2
LIKED = np.asarray([False, True, False])
pytestmark = pytest.mark.usefixtures('float64')


def _likes(judge_params, evidence, proposal, target_logits):
  """A judge that looks at the token alone."""
  del judge_params, evidence, target_logits
  return jnp.asarray(LIKED, jnp.float64)[proposal.tokens]


def _closed_form(p, q, liked):
  kept = np.where(liked, q, np.minimum(p, q))
  residual = np.maximum(p - q, 0)
  return kept + (1 - kept.sum()) * residual / max(residual.sum(), 1e-300)


@pytest.mark.parametrize('case', CASES)
def test_the_output_law_is_the_closed_form(case):
  tables = CASES[case]
  chains = every_chain(tables, NUM_DRAFTS)
  outcome = outcome_of(judge(_likes), chains.proposal, chains.logits)
  for prefix, law in position_laws(outcome, chains.weight).items():
    p, q = laws_after(tables, prefix)
    expected = p if len(prefix) == NUM_DRAFTS else _closed_form(p, q, LIKED)
    np.testing.assert_allclose(law, expected, atol=1e-12)


@pytest.mark.parametrize('case', ['random', 'each misses one', 'disjoint'])
@pytest.mark.parametrize(
  'rule', [judge(_likes, 1.0), divergence_judge(0.0)], ids=lambda rule: rule.name
)
def test_a_judge_that_likes_nothing_is_lossless(rule, case):
  tables = CASES[case]
  chains = every_chain(tables, NUM_DRAFTS)
  outcome = outcome_of(rule, chains.proposal, chains.logits)
  law = output_law(outcome, chains.weight, tables.p, CONTEXT, NUM_DRAFTS + 1)
  np.testing.assert_allclose(law, sequence_law(tables.p, CONTEXT, NUM_DRAFTS + 1), atol=1e-12)


def test_a_judge_that_likes_everything_keeps_every_draft():
  chains = every_chain(CASES['disjoint'], NUM_DRAFTS)
  outcome = outcome_of(judge(_likes, -1.0), chains.proposal, chains.logits)
  assert np.all(outcome.num_accepted == NUM_DRAFTS)


@pytest.mark.parametrize('metric', ['kl', 'js'])
def test_the_judge_without_training_likes_close_laws(metric):
  threshold, seen = 0.2, set()
  tables = CASES['random']
  chains = every_chain(tables, NUM_DRAFTS)
  rule = divergence_judge(threshold, metric=metric)
  outcome = outcome_of(rule, chains.proposal, chains.logits)
  for prefix, law in position_laws(outcome, chains.weight).items():
    p, q = laws_after(tables, prefix)
    close = bool(divergence(log(p), log(q), metric) < threshold)
    last = len(prefix) == NUM_DRAFTS
    np.testing.assert_allclose(law, q if close and not last else p, atol=1e-12)
    seen.add(close and not last)
  assert seen == {True, False}


def test_takes_drafts_that_are_certain():
  tables = CASES['certain draft']
  chains = every_chain(tables, NUM_DRAFTS)
  told = outcome_of(judge(_likes), chains.proposal, chains.logits)
  untold = outcome_of(judge(_likes), chains.proposal._replace(laws=None), chains.logits)
  expected = position_laws(told, chains.weight)
  for prefix, law in position_laws(untold, chains.weight).items():
    np.testing.assert_allclose(law, expected[prefix], atol=1e-12)


def test_at_temperature_0_a_draft_passes_if_it_is_best_or_liked():
  chains = every_chain(CASES['random'], NUM_DRAFTS)
  best = np.asarray(chains.logits).argmax(-1)
  warped = jnp.where(np.arange(V) == best[..., None], 0, -jnp.inf)
  evidence = evidence_of(chains.logits, temperature=0.0)
  outcome = outcome_of(judge(_likes), chains.proposal, warped, evidence=evidence)
  drafts = np.asarray(chains.proposal.tokens)[:, 1:]
  counts = np.cumprod((drafts == best[:, :-1]) | LIKED[drafts], axis=-1).sum(-1)
  np.testing.assert_array_equal(outcome.num_accepted, counts[outcome.row])
  assert np.all(outcome.weight == 1)
  ends = outcome.tokens[np.arange(len(counts)), outcome.num_accepted]
  np.testing.assert_array_equal(ends, best[outcome.row, outcome.num_accepted])


def test_the_linear_judge_reads_the_state_after_each_token():
  chains = every_chain(CASES['random'], NUM_DRAFTS)
  evidence = evidence_of(chains.logits)
  hidden = np.random.default_rng(0).standard_normal((*chains.logits.shape[:2], 4))
  evidence = evidence._replace(output=evidence.output._replace(hidden=jnp.asarray(hidden)))
  weight, bias = jnp.arange(4.0), jnp.asarray(0.5)
  score = linear_score((weight, bias), evidence, chains.proposal, chains.logits)
  expected = 1 / (1 + np.exp(-(hidden @ np.arange(4.0) + 0.5)))
  np.testing.assert_allclose(score, expected, atol=1e-12)


def test_refuses_scores_of_another_shape():
  chains = every_chain(CASES['random'], NUM_DRAFTS)
  rule = judge(lambda *args: jnp.zeros((1, NUM_DRAFTS)))
  with pytest.raises(ValueError, match='score_fn must return'):
    outcome_of(rule, chains.proposal, chains.logits)

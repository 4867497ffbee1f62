"""The law of what the compiled loop emits, with its real random numbers, on a model of known law.

Every test draws 200,000 continuations of 4 tokens over 3 tokens of vocabulary: 81 cells, and at
least two rounds each, since a round emits at most 3 tokens here. A chi-square test at p < 1e-4 then
finds a total variation of 0.0125 from the target with probability 0.998 and one of 0.01 with 0.87,
however it is spread. Seeds are fixed, so a test that passes keeps passing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import decodax
from decodax import drafters
from decodax import theory
from decodax import verifiers
from decodax.trees import walk
from tests.table_model import random_table
from tests.table_model import sequence_law
from tests.table_model import table_model

_NUM_RUNS, _LENGTH, _NUM_DRAFTS, _VOCAB = 200_000, 4, 2, 3
_PROMPT = (1, 2)
_TARGET = random_table(0, _VOCAB)
_DRAFT = random_table(1, _VOCAB)
_SAMPLINGS: dict[str, Any] = {
  'plain': dict(temperature=1.0, top_p=1.0),
  'warped': dict(temperature=1.4, top_p=0.8),
}


def _verify_without_residual(keys, proposal, target_logits, *, max_depth):
  """Speculative sampling gone wrong: after a rejection it draws from p."""
  p, q = jax.nn.softmax(target_logits), jax.nn.softmax(proposal.laws)
  num_accepted, going = jnp.zeros_like(proposal.tokens[:, 0]), True
  for depth in range(max_depth):
    draft = proposal.tokens[:, depth + 1, None]
    ratio = [jnp.take_along_axis(law[:, depth], draft, axis=1)[:, 0] for law in (p, q)]
    going &= keys.accepts(jnp.minimum(ratio[0] / ratio[1], 1), depth + 1)
    num_accepted += going
  law = jnp.take_along_axis(p, num_accepted[:, None, None], axis=1)[:, 0]
  path = jnp.broadcast_to(jnp.arange(max_depth + 1, dtype=jnp.int32), proposal.tokens.shape)
  return decodax.Verdict(path, num_accepted, keys.pick(law, num_accepted + 1))


def _verify_with_repeated_noise(keys, proposal, target_logits, *, max_depth):
  """Coupled verification gone wrong: one noise for all tokens of a round."""

  def choose(node, depth):
    del depth
    logits = jnp.take_along_axis(target_logits, node[:, None, None], axis=1)[:, 0]
    return keys.pick_coupled(logits, 1)

  return walk(choose, proposal, max_depth)


_RULES = {
  'speculative': verifiers.speculative,
  'coupled': verifiers.coupled,
  'without_residual': verifiers.speculative._replace(verify=_verify_without_residual),
  'repeated_noise': verifiers.coupled._replace(verify=_verify_with_repeated_noise),
}


@functools.cache
def _compiled(rule):
  model = table_model(_VOCAB)
  drafter = drafters.draft_model(model, num_drafts=_NUM_DRAFTS)
  run = functools.partial(
    decodax.decode, model=model, drafter=drafter, verifier=_RULES[rule], prefill_chunk=2
  )
  return jax.jit(run)


def _run(rule, sampling, *, max_new_tokens=_LENGTH):
  request = decodax.make_request(
    np.tile(_PROMPT, (_NUM_RUNS, 1)),
    max_new_tokens=max_new_tokens,
    vocab_size=_VOCAB,
    capacity=8,
    seed=5,
    **_SAMPLINGS[sampling],
  )
  params = decodax.Params(*(jnp.asarray(table, jnp.float32) for table in (_TARGET, _DRAFT)))
  return jax.device_get(_compiled(rule)(params, request))


def _warp(table, *, temperature, top_p):
  """Returns the laws after temperature and top-p, token by token."""
  warped = table ** (1 / temperature)
  warped /= warped.sum(-1, keepdims=True)
  for law in warped.reshape(-1, _VOCAB):
    order = np.argsort(-law)
    before = np.cumsum(law[order]) - law[order]
    law[order[before >= top_p]] = 0
    law /= law.sum()
  return warped


def _p_value(tokens, law):
  """Returns the p-value of the observed continuations under a law over them."""
  counts = np.zeros(law.shape, int)
  np.add.at(counts, tuple(tokens.T), 1)
  possible = law > 0
  if np.any(counts[~possible]):
    return 0.0
  expected = law[possible] * len(tokens)
  assert expected.min() > 5  # what the chi-square approximation needs
  return scipy.stats.chisquare(counts[possible], expected, sum_check=False).pvalue


def _continuations(result):
  return result.tokens[:, len(_PROMPT) : len(_PROMPT) + _LENGTH]


@pytest.mark.parametrize('sampling', _SAMPLINGS)
@pytest.mark.parametrize('rule', ['speculative', 'coupled'])
def test_the_output_has_the_targets_law(rule, sampling):
  result = _run(rule, sampling)
  assert result.stats.num_target_calls.min() == 2  # several rounds lie within what is counted
  assert result.stats.num_target_calls.max() == _LENGTH
  law = sequence_law(_warp(_TARGET, **_SAMPLINGS[sampling]), _PROMPT, _LENGTH)
  assert _p_value(_continuations(result), law) > 1e-4


@pytest.mark.parametrize('rule', ['without_residual', 'repeated_noise'])
def test_a_wrong_rule_is_found(rule):
  """The test above has teeth."""
  law = sequence_law(_TARGET, _PROMPT, _LENGTH)
  assert _p_value(_continuations(_run(rule, 'plain')), law) < 1e-12


def test_a_small_distance_is_found():
  """As the power promised above: a total variation of 0.0125, tried once."""
  law = sequence_law(_TARGET, _PROMPT, _LENGTH)
  sign = np.where(np.random.default_rng(0).permutation(law.size).reshape(law.shape) % 2, 1.0, -1.0)
  shift = sign * law  # each cell is off by the same fraction: the hardest to see
  shift -= law * shift.sum()
  other = law + shift * (0.0125 / (np.abs(shift).sum() / 2))
  np.testing.assert_allclose(np.abs(other - law).sum() / 2, 0.0125)
  assert _p_value(_continuations(_run('speculative', 'plain')), other) < 1e-4


@pytest.mark.parametrize('sampling', _SAMPLINGS)
@pytest.mark.parametrize(
  'rule, expected_fn',
  [('speculative', theory.overlap), ('coupled', theory.coupled_acceptance)],
)
def test_acceptance_is_what_theory_says(rule, expected_fn, sampling):
  """Within 4.5 standard errors, about 0.005: one first draft for each run."""
  stats = _run(rule, sampling, max_new_tokens=1).stats
  np.testing.assert_array_equal(stats.num_tested_at[:, 0], 1)
  p, q = (_warp(table, **_SAMPLINGS[sampling])[_PROMPT] for table in (_TARGET, _DRAFT))
  expected = float(expected_fn(p[None], q[None])[0])
  assert 0.2 < expected < 0.95
  error = np.sqrt(expected * (1 - expected) / _NUM_RUNS)
  assert abs(stats.num_accepted_at[:, 0].mean() - expected) < 4.5 * error

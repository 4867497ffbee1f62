"""The chain rules in the compiled loop: temperature 0, knobs, and what rows must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import drafters
from decodax import verifiers
from tests.table_model import random_table
from tests.table_model import table_model

V = 6
PROMPTS = ((1, 2, 3), (4,), (5, 0, 2, 1, 3), (2, 2), (3, 1), (0,))
NUM_TOKENS = 12
GREEDY_ROWS = np.asarray([0, 2, 3])
TEMPERATURES = (0.0, 1.0, 0.0, 0.0, 0.7, 1.3)
TOP_K = (0, 0, 2, 0, 3, 0)
MODEL = table_model(V)
WEIGHT = jnp.asarray([0.3, -0.2], jnp.float32), jnp.asarray(0.1, jnp.float32)  # of the judge

# name -> (the rule for a knob, the knob's exact end, a knob that gives way)
LOSSY = {
  'lenient': (verifiers.lenient, 1.0, 0.2),
  'typical': (lambda knob: verifiers.typical(knob, knob), np.inf, 0.05),
  'fuzzy': (verifiers.fuzzy, 0.0, 0.3),
  'mentored': (verifiers.mentored, 0.0, 0.5),
  'enriched': (verifiers.enriched, 0.0, 2.0),
  'judge': (lambda knob: verifiers.judge(threshold=knob), 2.0, 0.4),
  'divergence_judge': (verifiers.divergence_judge, 0.0, 0.5),
}  # fmt: skip
LOSSLESS = [
  verifiers.speculative, verifiers.block, verifiers.sample_and_match, verifiers.coupled,
]  # fmt: skip


def _params():
  target, draft = (random_table(seed, V, sharpness=0.8).astype(np.float32) for seed in (0, 1))
  return decodax.Params(jnp.asarray(target), jnp.asarray(draft), verifier=WEIGHT)


def _request(temperature, top_k=None):
  return decodax.make_request(
    PROMPTS, max_new_tokens=NUM_TOKENS, vocab_size=V, capacity=24, seed=3,
    temperature=temperature, top_k=top_k,
  )  # fmt: skip


@functools.cache
def _loop(make_rule, drafter):
  def run(knob, params, request):
    return decodax.decode(params, request, model=MODEL, drafter=drafter, verifier=make_rule(knob))

  return jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})


DRAFT_MODEL = drafters.draft_model(MODEL, num_drafts=3)
NGRAM = drafters.ngram(num_drafts=3, min_ngram=1)


def _tokens(make_rule, knob=0.0, *, greedy, top_k=None, drafter=DRAFT_MODEL):
  """Returns i32[B, S], with every row at temperature 0 or only some."""
  request = _request(0.0 if greedy else TEMPERATURES, top_k)
  return np.asarray(_loop(make_rule, drafter)(knob, _params(), request).tokens)


@functools.cache
def _plain_greedy():
  request = _request(0.0)
  run = functools.partial(
    decodax.decode, model=MODEL, drafter=drafters.plain(), verifier=verifiers.greedy
  )
  return np.asarray(jax.jit(run)(_params(), request).tokens)


@functools.cache
def _constant(rule):
  return lambda knob: rule


@pytest.mark.parametrize('greedy', [True, False], ids=['all greedy', 'some greedy'])
@pytest.mark.parametrize('rule', LOSSLESS, ids=lambda rule: rule.name)
def test_lossless_rules_decode_greedily_at_temperature_0(rule, greedy):
  tokens = _tokens(_constant(rule), greedy=greedy)
  np.testing.assert_array_equal(tokens[GREEDY_ROWS], _plain_greedy()[GREEDY_ROWS])


@pytest.mark.parametrize('name', LOSSY)
def test_lossy_rules_at_their_exact_end_decode_greedily_at_temperature_0(name):
  make_rule, exact, _ = LOSSY[name]
  for greedy in (True, False):
    tokens = _tokens(make_rule, exact, greedy=greedy, top_k=_top_k(name))
    np.testing.assert_array_equal(tokens[GREEDY_ROWS], _plain_greedy()[GREEDY_ROWS])


@pytest.mark.parametrize('name', LOSSY)
def test_a_greedy_row_does_not_depend_on_sampled_neighbours(name):
  # A batch without sampled rows drafts and verifies by other code than one with some.
  make_rule, _, knob = LOSSY[name]
  alone, mixed = (_tokens(make_rule, knob, greedy=g, top_k=_top_k(name)) for g in (True, False))
  np.testing.assert_array_equal(alone[GREEDY_ROWS], mixed[GREEDY_ROWS])
  if name != 'typical':  # which is greedy at temperature 0, whatever its knobs
    assert np.any(alone != _plain_greedy())


def _top_k(name):
  """Top-k must not change the laws that are compared at temperature 0; one rule will do."""
  return TOP_K if name == 'fuzzy' else None


def test_copied_drafts_are_taken_too():
  make_rule, exact, knob = LOSSY['lenient']
  tokens = _tokens(make_rule, exact, greedy=False, drafter=NGRAM)
  np.testing.assert_array_equal(tokens[GREEDY_ROWS], _plain_greedy()[GREEDY_ROWS])
  assert np.any(_tokens(make_rule, knob, greedy=True, drafter=NGRAM) != _plain_greedy())


@pytest.mark.parametrize('rule', [verifiers.block, verifiers.mentored()], ids=lambda r: r.name)
def test_refuses_copied_drafts_and_trees(rule):
  with pytest.raises(ValueError, match='not exact for proposals of kind'):
    decodax.check_compatible(NGRAM, rule)
  shape = DRAFT_MODEL.shape._replace(num_nodes=7)
  with pytest.raises(ValueError, match='takes chains'):
    decodax.check_compatible(DRAFT_MODEL._replace(shape=shape), rule)

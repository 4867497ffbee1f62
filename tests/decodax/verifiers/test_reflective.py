"""Reflective verification: the second reading is the real one, and leaves no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax.decode import init_state
from decodax.decode import prefill
from decodax.decode import root_tokens
from decodax.decode import speculative_step
from decodax.drafters.plain import stateless_init
from decodax.drafters.plain import stateless_observe
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.verifiers import greedy
from decodax.verifiers import reflective
from decodax.verifiers import typical
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import every_chain
from tests.decodax.verifiers.chains import evidence_of
from tests.decodax.verifiers.chains import outcome_of
from tests.decodax.zoo import Compiled

REFLECTION = (7, 3, 11)
DRAFTS = np.asarray([[4, 9, 1], [2, 2, 8], [5, 0, 6], [1, 2, 3]], np.int32)
LENGTHS = np.asarray([3, 1, 0, 2], np.int32)
PROMPTS = ((1, 2, 3), (4,), (5, 6, 7, 8, 9), (10, 11))
TEMPERATURES = (0.0, 1.0, 0.7, 0.0)


def _fixed_chains():
  """Returns a drafter that proposes DRAFTS, the first LENGTHS of each row."""

  def propose(params, state, **_):
    del params
    chain = chain_proposal(root_tokens(state), jnp.asarray(DRAFTS), jnp.asarray(LENGTHS))
    return chain, state.drafter

  return Drafter(
    shape=DraftShape(num_nodes=4, max_depth=3, candidates=Candidates.DETERMINISTIC),
    init=stateless_init,
    prefill=stateless_prefill,
    propose=propose,
    observe=stateless_observe,
  )


@functools.cache
def _round_fn(make_rule, model):
  """Returns the compiled first round; it takes (weight, params, request)."""
  drafter, seen = _fixed_chains(), []

  def run(weight, params, request):
    rule = make_rule(weight)

    def verify(*args, **options):
      seen.append(options.get('evidence'))
      return rule.verify(*args, **options)

    state = init_state(params, request, model=model, drafter=drafter, prefill_chunk=4)
    state = prefill(params, state, model=model, drafter=drafter, prefill_chunk=4)
    recorded = rule._replace(verify=verify)
    state, info = speculative_step(params, state, model=model, drafter=drafter, verifier=recorded)
    return state, info, seen.pop()

  return Compiled(run)


def _first_round(zoo, make_rule, weight):
  """Returns (the state after the first round, what the round did, what the rule saw or None)."""
  request = decodax.make_request(
    PROMPTS, max_new_tokens=8, vocab_size=zoo.model.vocab_size, capacity=16,
    temperature=TEMPERATURES,
  )  # fmt: skip
  run = _round_fn(make_rule, zoo.model)
  return jax.device_get(run(weight, decodax.Params(zoo.params), request))


def _reflecting(weight):
  return reflective(greedy, REFLECTION, weight)


def _not_reflecting(weight):
  del weight
  return greedy._replace(exactness='lossy: not, but the loop is to treat it as such')


@functools.cache
def _read_plainly(zoo):
  """Returns, per row, f32[T, V]: the logits after each token of one text with the draft twice."""
  drafts = [row[:count].tolist() for row, count in zip(DRAFTS, LENGTHS, strict=True)]
  texts = [[*p, *d, *REFLECTION, *d] for p, d in zip(PROMPTS, drafts, strict=True)]
  size = max(map(len, texts))

  def read(params, tokens):
    cache = zoo.model.init_cache(params, len(texts), size)
    shape = (len(texts), size, size)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), shape)
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), tokens.shape)
    output, _ = zoo.model.extend(params, cache, tokens, positions, mask)
    return zoo.model.unembed(params, output.hidden)

  padded = jnp.asarray([text + [0] * (size - len(text)) for text in texts], jnp.int32)
  logits = np.asarray(Compiled(read)(zoo.params, padded))
  return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


def test_opinions_are_those_of_reading_prompt_and_draft_again(zoo):
  _, _, evidence = _first_round(zoo, _reflecting, 0.3)
  plain = zip(_read_plainly(zoo), PROMPTS, LENGTHS, strict=True)
  for row, (logits, prompt, count) in enumerate(plain):
    opinions = evidence.opinions[row, : count + 1]
    np.testing.assert_allclose(opinions, logits[len(logits) - 1 - count :], atol=2e-4)
    own, first = evidence.logits[row, : count + 1], len(prompt) - 1
    np.testing.assert_allclose(own, logits[first : first + count + 1], atol=2e-4)


def test_weight_0_is_the_base_rule_and_commits_the_same(zoo):
  expected, info, _ = _first_round(zoo, _not_reflecting, 0.0)
  actual, reflected, _ = _first_round(zoo, _reflecting, 0.0)
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.cache.length, expected.cache.length)
  jax.tree.map(np.testing.assert_array_equal, reflected.verdict, info.verdict)
  jax.tree.map(np.testing.assert_array_equal, actual.stats, expected.stats)
  for row, length in enumerate(expected.cache.length):
    for ours, theirs in zip(actual.cache[:2], expected.cache[:2], strict=True):
      np.testing.assert_allclose(ours[:, row, :, :length], theirs[:, row, :, :length], atol=1e-5)


def test_weight_1_follows_the_second_reading(zoo):
  state, info, _ = _first_round(zoo, _reflecting, 1.0)
  plain = zip(_read_plainly(zoo), PROMPTS, LENGTHS, strict=True)
  for row, (logits, prompt, count) in enumerate(plain):
    best = logits[len(logits) - 1 - count :].argmax(-1)
    accepted = int(np.cumprod(DRAFTS[row, :count] == best[:count]).sum())
    assert info.verdict.num_accepted[row] == accepted
    assert state.tokens[row, len(prompt) + accepted] == best[accepted]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('mixture', ['laws', 'logits'])
def test_mixes_before_the_base_rule(mixture):
  tables = CASES['random']
  chains = every_chain(tables, 1)
  second = jnp.log(jax.nn.softmax(-3 * chains.logits)) + 2  # logits that are not normalised
  evidence = evidence_of(chains.logits)._replace(opinions=second)
  p, other = np.exp(np.asarray(chains.logits)), np.exp(np.asarray(second))
  mixed = 0.7 * p + 0.3 * other / other.sum(-1, keepdims=True)
  if mixture == 'logits':
    mixed = p**0.7 * other**0.3
  mixed = mixed / mixed.sum(-1, keepdims=True)
  rule = reflective(typical(jnp.inf, jnp.inf), REFLECTION, 0.3, mixture=mixture)
  outcome = outcome_of(rule, chains.proposal, chains.logits, evidence=evidence)
  law = np.zeros_like(mixed[:, 0])
  np.add.at(law, (outcome.row, outcome.tokens[:, 0]), outcome.weight)
  np.testing.assert_allclose(law, mixed[:, 0], atol=1e-12)


@pytest.mark.parametrize('mixture', reflective.__globals__['MIXTURES'])
def test_weight_0_leaves_logits_as_they_are(mixture):
  mix = reflective.__globals__['MIXTURES'][mixture]
  first = jnp.asarray([[0.5, 2.0, -jnp.inf]])
  np.testing.assert_array_equal(mix(first, -first, jnp.zeros((1, 1))), first)


def test_refuses_what_it_cannot_do():
  with pytest.raises(ValueError, match='prompt'):
    reflective(greedy, ())
  with pytest.raises(ValueError, match='weight'):
    reflective(greedy, REFLECTION, 1.5)
  with pytest.raises(ValueError, match='mixture'):
    reflective(greedy, REFLECTION, mixture='votes')

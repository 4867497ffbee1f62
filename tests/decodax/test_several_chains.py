"""Chains of several models, side by side: lossless, in step with the text, and checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import decodax
from decodax import drafters
from decodax import verifiers
from models.adapter import as_model
from tests.decodax import zoo as zoo_lib
from tests.table_model import random_table
from tests.table_model import sequence_law
from tests.table_model import table_model

V = 4
MODEL = table_model(V)
TABLES = [jnp.asarray(random_table(seed, V, sharpness=1.2), jnp.float32) for seed in (5, 6, 7)]
EXPANDER = drafters.model_expander(MODEL)


def _pvalue(verifier, num_rows, num_tokens=3):
  """Returns that of a chi-square test of the emitted text against the target's law."""
  drafter = drafters.several_chains([EXPANDER, EXPANDER], num_drafts=2)
  decode = zoo_lib.Compiled(
    functools.partial(decodax.decode, model=MODEL, drafter=drafter, verifier=verifier)
  )
  request = decodax.make_request(
    np.full((num_rows, 2), [1, 2]), max_new_tokens=num_tokens, vocab_size=V, temperature=1.0,
    capacity=8,
  )  # fmt: skip
  out = decode(decodax.Params(TABLES[0], tuple(TABLES[1:])), request)
  counts = np.zeros((V,) * num_tokens)
  np.add.at(counts, tuple(np.asarray(out.tokens)[:, 2 : 2 + num_tokens].T), 1)
  law = sequence_law(np.asarray(TABLES[0], np.float64), (1, 2), num_tokens)
  return stats.chisquare(counts.ravel(), law.ravel() / law.sum() * num_rows).pvalue


def test_emitted_text_has_the_targets_law_over_rounds():
  # 100,000 runs of three tokens in one to three rounds, 63 degrees of freedom. Rejects a right rule
  # for one seed in 10,000; a law whose cells are off by 3 % is rejected with probability 0.97.
  assert _pvalue(verifiers.specinfer_drafters, 100_000) > 1e-4


def test_taking_the_second_law_for_the_first_would_be_found_out():
  def swapped(keys, proposal, target_logits, *, max_depth):
    first, second = proposal.laws[:, 1:3], proposal.laws[:, 3:5]
    laws = jnp.concatenate([proposal.laws[:, :1], second, first], axis=1)
    return verifiers.specinfer_drafters.verify(
      keys, proposal._replace(laws=laws), target_logits, max_depth=max_depth
    )

  assert _pvalue(verifiers.specinfer_drafters._replace(verify=swapped), 25_000) < 1e-12


def test_output_is_that_of_plain_decoding_and_caches_keep_up(zoo):
  transformer, _ = zoo_lib._make_transformer(0)
  exit_expander = drafters.exit_expander(as_model(transformer, exit_layer=2))
  by_model = drafters.model_expander(zoo.model)
  drafter = drafters.several_chains([exit_expander, by_model, by_model], num_drafts=3)
  params = decodax.Params(zoo.params, ((), zoo.other_params, zoo.params))

  def run(params, request):
    state = decodax.init_state(params, request, model=zoo.model, drafter=drafter)
    state = decodax.prefill(params, state, model=zoo.model, drafter=drafter)
    step = decodax.make_step_fn(model=zoo.model, drafter=drafter, verifier=verifiers.coupled)
    return decodax.generate(params, state, step_fn=step)

  compiled = zoo_lib.Compiled(run)
  for sampling in (zoo_lib.MIXED, zoo_lib.GREEDY):
    request = zoo_lib.make_request(sampling)
    state = jax.device_get(compiled(params, request))
    zoo_lib.assert_same_output(decodax.finish(state), zoo.plain('coupled', request))
    # A perfect model is among them, so every row has accepted drafts of all depths; and what the
    # models have read is a prefix of the text, at most a draft and a root behind it.
    assert np.all(state.stats.num_accepted_at.sum(0) > 0)
    for own in state.drafter[1:]:
      for row, length in enumerate(own.own.length):
        assert 0 < length <= state.length[row]
  assert compiled.num_traces == 1


def test_what_cannot_be_combined_is_refused(zoo):
  with pytest.raises(ValueError, match='at least two models, got 1'):
    drafters.several_chains([EXPANDER], num_drafts=2)
  other = drafters.model_expander(zoo.model)
  with pytest.raises(ValueError, match=r'one vocabulary, got sizes \[4, 24\]'):
    drafters.several_chains([EXPANDER, other], num_drafts=2)
  drafter = drafters.several_chains([EXPANDER, EXPANDER], num_drafts=2)
  request = decodax.make_request([[1]], max_new_tokens=2, vocab_size=V)
  with pytest.raises(ValueError, match='tuple with the parameters of each of the 2 models'):
    decodax.decode(
      decodax.Params(TABLES[0], TABLES[1]), request, model=MODEL, drafter=drafter,
      verifier=verifiers.coupled,
    )  # fmt: skip
  with pytest.raises(ValueError, match='several_drafters'):
    decodax.check_compatible(drafter, verifiers.specinfer)

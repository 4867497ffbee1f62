"""What is compiled: one program for a whole generation, and none for other values."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from tests.decodax.zoo import BATCH
from tests.decodax.zoo import CAPACITY
from tests.decodax.zoo import GREEDY
from tests.decodax.zoo import MIXED
from tests.decodax.zoo import VOCAB_SIZE
from tests.decodax.zoo import make_request

_PAIR = ('draft_model', 'speculative')


@pytest.fixture(scope='module')
def params(zoo):
  return decodax.Params(zoo.params, zoo.other_params)


def test_a_generation_moves_nothing_between_host_and_device(zoo, params):
  run = zoo.decode(*_PAIR)
  request = make_request()
  expected = run(params, request)
  with jax.transfer_guard('disallow'):
    result = run(params, request)
    jax.block_until_ready(result)
  np.testing.assert_array_equal(result.tokens, expected.tokens)
  assert int(result.stats.num_target_calls.max()) > 5  # there were rounds to tell of
  # The guard would have seen an array that is still on the host.
  host = request._replace(max_new_tokens=np.asarray(request.max_new_tokens))
  with jax.transfer_guard('disallow'), pytest.raises(Exception, match='[Dd]isallowed'):
    run(params, host)


def test_a_generation_calls_nothing_on_the_host(zoo, params):
  request = make_request()
  program = str(zoo.decode(*_PAIR).jitted.trace(params, request).jaxpr)
  assert 'while[' in program
  assert not re.search('callback|infeed|outfeed|debug_print', program)

  # A call to the host would show.
  def chatty(params, request):
    jax.debug.print('{}', request.prompt_length)
    return request

  program = str(jax.jit(chatty).trace(params, request).jaxpr)
  assert re.search('callback|infeed|outfeed|debug_print', program)


def _random_request(seed, sampling, prompt_lengths):
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(0, VOCAB_SIZE, length) for length in prompt_lengths]
  options = dict(max_new_tokens=5, eos_ids=[1, 2], vocab_size=VOCAB_SIZE, seed=seed)
  return decodax.make_request(prompts, **options, **sampling)


def test_other_values_do_not_trace_again(zoo, params):
  run = zoo.decode(*_PAIR)
  run(params, make_request())
  traces = run.num_traces
  lengths = [np.full(BATCH, 3), np.arange(1, BATCH + 1), np.full(BATCH, CAPACITY - 5)]
  others = dict(temperature=0.3, top_k=7, top_p=0.5, min_p=0.2, repetition_penalty=1.9)
  for seed, sampling in enumerate((MIXED, GREEDY, others)):
    for prompt_lengths in lengths:
      run(params, _random_request(seed, sampling, prompt_lengths))
  # Stop ids, budgets, row ids, and other parameters.
  options: dict[str, Any] = dict(
    max_new_tokens=np.arange(1, BATCH + 1), eos_ids=[[3], [4, 5]] * (BATCH // 2)
  )
  run(params, make_request(row_ids=range(10, 10 + BATCH), **options))
  run(decodax.Params(zoo.other_params, zoo.params), make_request())
  assert run.num_traces == traces


def test_what_is_static_does_trace_again(zoo):
  """The count above is able to rise. Rules that are None are left out at compile time."""
  run, params = zoo.decode('plain', 'coupled'), decodax.Params(zoo.params)
  run(params, make_request())
  traces = run.num_traces
  run.jitted.trace(params, make_request(capacity=CAPACITY + 1))
  assert run.num_traces == traces + 1
  run.jitted.trace(params, make_request(min_p=None))
  assert run.num_traces == traces + 2


def test_every_round_runs_the_same_program(zoo):
  """A Python loop compiles a step once, whatever is accepted and whichever rows have stopped."""
  step = zoo.compiled(decodax.speculative_step, 'draft_model', verifier='speculative')
  params = decodax.Params(zoo.params, zoo.other_params)
  options = dict(model=zoo.model, drafter=zoo.drafters['draft_model'])
  start = decodax.init_state(params, make_request(), **options)
  state = decodax.prefill(params, start, **options)
  types = jax.tree.map(jax.typeof, start)  # shapes, dtypes, and whether they are weak
  state, _ = step(params, state)
  traces, rounds = step.num_traces, 1
  while jnp.any(state.result == decodax.Result.RUNNING):
    assert jax.tree.map(jax.typeof, state) == types
    state, _ = step(params, state)
    rounds += 1
  assert rounds > 5
  assert step.num_traces == traces

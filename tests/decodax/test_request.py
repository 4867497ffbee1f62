"""What `make_request` makes of good input, and what it says about bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import make_request
from decodax import noise

_GOOD: dict[str, Any] = dict(prompts=[[1, 2], [3]], max_new_tokens=4, vocab_size=10)
_ARRAY: dict[str, Any] = dict(prompts=np.ones((2, 3), int))

# name: (options, what the message must say: what was given, what is allowed).
BAD: dict[str, tuple[dict[str, Any], str]] = {
  'no prompts': (dict(prompts=[]), 'prompts is empty; pass at least one prompt'),
  'no rows': (dict(prompts=np.zeros((0, 3), int)), 'prompts is empty'),
  'empty prompt': (dict(prompts=[[1], []]), 'prompt 1 is empty .* needs at least one token'),
  'empty array': (dict(prompts=np.zeros((2, 0), int)), 'prompt 0 is empty'),
  'float tokens': (dict(prompts=[[1], [1.0]]), r'prompt 1 must be a flat sequence.*float64'),
  'float array': (dict(prompts=np.ones((2, 3))), r'must be integer \[B, P\].*float64'),
  'bool tokens': (dict(prompts=[[True]]), 'prompt 0 must be a flat sequence of token ids.*bool'),
  'text': (dict(prompts=['abc']), 'prompt 0 must be a flat sequence of token ids'),
  'one flat prompt': (dict(prompts=[1, 2]), r'For one prompt pass \[prompt\]'),
  'nested prompt': (dict(prompts=[[[1]]]), r'prompt 0 must be a flat sequence.*\(1, 1\)'),
  'flat array': (dict(prompts=np.ones(3, int)), r'must be integer \[B, P\]: tokens.shape=\(3,\)'),
  'token too large': (dict(prompts=[[1], [10]]), 'prompts holds token id 10, .* vocabulary of 10'),
  'token far too large': (dict(prompts=[[2**40]]), f'prompts holds token id {2**40}'),
  'negative token': (dict(prompts=[[-1]]), 'prompts holds token id -1, outside the vocabulary'),
  'lengths of a list': (dict(prompt_lengths=[2, 1]), 'goes with an array of prompts'),
  'too few lengths': (dict(**_ARRAY, prompt_lengths=[1]), r'one length per row.*\[1\]'),
  'length beyond the array': (dict(**_ARRAY, prompt_lengths=[1, 4]), r'at most 3: .*\[1, 4\]'),
  'length 0': (dict(**_ARRAY, prompt_lengths=[1, 0]), 'prompt 1 is empty'),
  'negative length': (dict(**_ARRAY, prompt_lengths=[-2, 1]), r'prompt 0 is empty \(length -2\)'),
  'float length': (dict(**_ARRAY, prompt_lengths=[1.5, 1]), r'one length per row.*1\.5'),
  'beyond capacity': (dict(capacity=5), r'row 0 needs 2 \+ 4 = 6 token slots, capacity=5. Raise'),
  'one row beyond capacity': (
    dict(max_new_tokens=[1, 9], capacity=9), r'row 1 needs 1 \+ 9 = 10 token slots, capacity=9'
  ),
  'capacity 0': (dict(capacity=0), 'capacity=0'),
  'no budget': (dict(max_new_tokens=0), 'max_new_tokens must be at least 1: got 0'),
  'no budget in a row': (dict(max_new_tokens=[3, -1]), 'max_new_tokens must be at least 1: got -1'),
  'float budget': (dict(max_new_tokens=4.0), r'max_new_tokens must be an integer.*4\.0'),
  'huge budget': (dict(max_new_tokens=2**32 + 5), f'max_new_tokens must be within .*{2**32 + 5}'),
  'too few budgets': (dict(max_new_tokens=[1, 2, 3]), r'must be one value or 2, .*3'),
  'negative temperature': (dict(temperature=-0.1), 'temperature must be 0.*at least .*got -0.1'),
  'temperature nan': (dict(temperature=float('nan')), 'temperature must be 0.*got nan'),
  'temperature inf': (dict(temperature=[1.0, np.inf]), 'temperature must be 0.*got inf'),
  'tiny temperature': (dict(temperature=1e-9), 'temperature must be 0.* at least 1e-6: got 1e-09'),
  'huge temperature': (dict(temperature=1e39), 'temperature must be within'),
  'no temperature': (dict(temperature=None), 'temperature must be a number'),
  'temperature in words': (dict(temperature='hot'), "temperature must be a number.*'hot'"),
  'too few temperatures': (dict(temperature=[1.0]), r'temperature must be one value or 2, one per'),
  'temperature matrix': (dict(temperature=np.ones((2, 1))), 'temperature must be one value or 2'),
  'negative top_k': (dict(top_k=-1), 'top_k must be at least 0; 0 is off: got -1'),
  'float top_k': (dict(top_k=2.0), 'top_k must be an integer'),
  'huge top_k': (dict(top_k=2**40), f'top_k must be within .*{2**40}'),
  'too many top_k': (dict(top_k=[1, 2, 3]), 'top_k must be one value or 2'),
  'top_p 0': (dict(top_p=0.0), r'top_p must be in \(0, 1\]; 1 is off: got 0'),
  'top_p above 1': (dict(top_p=[0.5, 1.01]), r'top_p must be in \(0, 1\]; 1 is off: got 1.01'),
  'top_p nan': (dict(top_p=np.nan), 'top_p must be in .*got nan'),
  'negative min_p': (dict(min_p=-0.1), r'min_p must be in \[0, 1\]; 0 is off: got -0.1'),
  'min_p above 1': (dict(min_p=1.5), r'min_p must be in \[0, 1\]; 0 is off: got 1.5'),
  'min_p nan': (dict(min_p=np.nan), 'min_p must be in .*got nan'),
  'penalty 0': (dict(repetition_penalty=0.0), 'repetition_penalty must be positive; 1 is off: got'),
  'penalty nan': (dict(repetition_penalty=np.nan), 'repetition_penalty must be positive.*got nan'),
  'penalty inf': (dict(repetition_penalty=np.inf), 'repetition_penalty must be positive.*got inf'),
  'stop id too large': (dict(eos_ids=[10]), 'eos_ids holds token id 10, .* vocabulary of 10'),
  'negative stop id': (dict(eos_ids=[[1], [-1]]), 'eos_ids holds token id -1'),
  'stop ids for 3 rows': (dict(eos_ids=[[1], [2], [3]]), r'sequence per row: len\(rows\)=3'),
  'one bare stop id': (dict(eos_ids=3), 'eos_ids must be a sequence of token ids.*: 3'),
  'float stop id': (dict(eos_ids=[1.5]), r'eos_ids must be a sequence of token ids.*1\.5'),
  'mixed stop ids': (dict(eos_ids=[[1], 2]), r'eos_ids must be a sequence of token ids.*\[1\], 2'),
  'stop ids in words': (dict(eos_ids='ab'), "eos_ids must be a sequence of token ids.*'ab'"),
  'too few row ids': (dict(row_ids=[1]), r'row_ids needs one id per row: rows.shape=\(1,\)'),
  'float row ids': (dict(row_ids=[0.5, 1.0]), 'row_ids must be an integer'),
  'huge row ids': (dict(row_ids=[0, 2**33]), 'row_ids must be within'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_refused_with_its_reason(name):
  options, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    make_request(**{**_GOOD, **options})


def test_defaults():
  request = make_request(**_GOOD)
  assert request.tokens.shape == (2, 64) and request.tokens.dtype == jnp.int32
  np.testing.assert_array_equal(request.tokens[:, :3], [[1, 2, 0], [3, 0, 0]])
  assert not np.any(request.tokens[:, 3:])
  np.testing.assert_array_equal(request.prompt_length, [2, 1])
  np.testing.assert_array_equal(request.max_new_tokens, [4, 4])
  np.testing.assert_array_equal(request.sampling.temperature, [0, 0])
  assert request.sampling[1:] == (None,) * 4
  assert request.eos_ids.shape == (2, 0)
  keys = noise.row_keys(0, jnp.arange(2))
  data = jax.random.key_data(keys)
  np.testing.assert_array_equal(jax.random.key_data(request.rng_keys), data)


def test_values_per_row_and_dtypes():
  request = make_request(
    **{**_GOOD, 'max_new_tokens': [4, 5]}, temperature=[0, 1], top_k=[0, 3], top_p=[1, 0.5],
    min_p=0.25, repetition_penalty=[1, 2], eos_ids=[[1], [4, 5]], row_ids=[7, -7], seed=3,
  )  # fmt: skip
  expected = dict(
    temperature=[0, 1], top_k=[0, 3], top_p=[1, 0.5], min_p=[0.25, 0.25], repetition_penalty=[1, 2]
  )
  for name, values in expected.items():
    array = getattr(request.sampling, name)
    assert array.dtype == (jnp.int32 if name == 'top_k' else jnp.float32), name
    np.testing.assert_array_equal(array, values, err_msg=name)
  np.testing.assert_array_equal(request.max_new_tokens, [4, 5])
  np.testing.assert_array_equal(request.eos_ids, [[1, -1], [4, 5]])
  keys = noise.row_keys(3, jnp.asarray([7, -7]))
  data = jax.random.key_data(keys)
  np.testing.assert_array_equal(jax.random.key_data(request.rng_keys), data)


@pytest.mark.parametrize('needed, capacity', [(3, 64), (64, 64), (65, 128), (1000, 1024)])
def test_capacity_is_the_next_power_of_two(needed, capacity):
  request = make_request([[1, 2]], max_new_tokens=needed - 2, vocab_size=10)
  assert request.tokens.shape == (1, capacity)
  exact = make_request([[1, 2]], max_new_tokens=needed - 2, vocab_size=10, capacity=needed)
  assert exact.tokens.shape == (1, needed)


@pytest.mark.parametrize('wrap', [np.asarray, jnp.asarray])
def test_an_array_of_prompts_is_read_up_to_its_lengths(wrap):
  # The padding may hold anything, and may be wider than the capacity.
  prompts = wrap([[1, 2, -1, 99, 0, 0], [3, 10**6, -1, -1, 0, 0]])
  options: dict[str, Any] = dict(max_new_tokens=2, vocab_size=10, capacity=4)
  request = make_request(prompts, prompt_lengths=[2, 1], **options)
  ragged = make_request([[1, 2], [3]], **options)
  np.testing.assert_array_equal(request.tokens, ragged.tokens)
  np.testing.assert_array_equal(request.prompt_length, ragged.prompt_length)


def test_stop_ids_may_be_arrays_and_rows_may_have_none():
  shared = make_request(**_GOOD, eos_ids=np.asarray([4, 2]))
  np.testing.assert_array_equal(shared.eos_ids, [[4, 2], [4, 2]])
  some = make_request(**_GOOD, eos_ids=[[], jnp.asarray([3])])
  np.testing.assert_array_equal(some.eos_ids, [[-1], [3]])

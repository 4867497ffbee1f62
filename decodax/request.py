"""Turning prompts and options into a `Request`, with every check that needs their values.

This runs on the host, before anything compiles. Axes: `B` batch, `S` token slots, `E` stop ids.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decodax import noise
from decodax.types import Request
from decodax.types import Sampling

Array = np.ndarray | jax.Array
Prompts = Sequence[Sequence[int] | Array] | Array
Integers = int | Sequence[int] | Array
Numbers = float | Sequence[float] | Array


def make_request(
  prompts: Prompts,
  *,
  max_new_tokens: Integers,
  vocab_size: int,
  prompt_lengths: Sequence[int] | Array | None = None,
  temperature: Numbers = 0.0,
  top_k: Integers | None = None,
  top_p: Numbers | None = None,
  min_p: Numbers | None = None,
  repetition_penalty: Numbers | None = None,
  eos_ids: Sequence[int] | Sequence[Sequence[int] | Array] | Array = (),
  seed: int = 0,
  row_ids: Sequence[int] | Array | None = None,
  capacity: int | None = None,
) -> Request:
  """Returns a checked request of B rows.

  Every option may be one value or one per row. Rows with the same seed and row id draw the same
  random numbers, whatever stands beside them in the batch.

  Args:
    prompts: token ids: ragged sequences, or an integer array [B, P] right-padded with anything,
      whose valid lengths are `prompt_lengths`.
    max_new_tokens: how many tokens to emit at most.
    vocab_size: of the target; prompt and stop ids must be below it.
    prompt_lengths: valid tokens per row of an array of prompts; default all of it.
    temperature: 0 is greedy.
    top_k: keep the k most likely tokens; 0 is off.
    top_p: keep the most likely tokens that together have this probability; 1 is off.
    min_p: keep tokens at least this fraction as likely as the likeliest; 0 is off.
    repetition_penalty: divides (multiplies, if negative) logits of tokens seen so far; 1 is off.
    eos_ids: stop ids for all rows, or one sequence per row.
    seed: seed of the row keys.
    row_ids: what tells the rows' random numbers apart; default 0..B-1.
    capacity: token slots per row, S. Compiled code is reused for equal S. Default: the longest
      prompt plus max_new_tokens, rounded up to a power of two, at least 64.

  Raises:
    ValueError: for an empty batch or prompt, ids outside the vocabulary, a prompt and budget beyond
      `capacity`, or sampling values that make no sense.
  """
  tokens, lengths = _pad_prompts(prompts, prompt_lengths)
  batch_size = len(lengths)
  budget = _per_row('max_new_tokens', max_new_tokens, batch_size, np.int32)
  _require(budget > 0, 'max_new_tokens', budget, 'must be at least 1')
  needed = int((lengths + budget).max())
  if capacity is None:
    capacity = max(64, 1 << (needed - 1).bit_length())
  if needed > capacity:
    row = int((lengths + budget).argmax())
    raise ValueError(
      f'prompt and max_new_tokens do not fit: row {row} needs {lengths[row]} + {budget[row]} '
      f'= {needed} token slots, {capacity=}. Raise capacity, shorten the prompt, or lower '
      f'max_new_tokens.'
    )
  width = min(tokens.shape[1], capacity)
  valid = np.arange(width)[None] < lengths[:, None]
  _check_vocabulary('prompts', tokens[:, :width][valid], vocab_size)
  buffer = np.zeros((batch_size, capacity), np.int32)
  buffer[:, :width] = np.where(valid, tokens[:, :width], 0)

  rows = np.arange(batch_size) if row_ids is None else np.asarray(row_ids)
  if rows.shape != (batch_size,):
    raise ValueError(f'row_ids needs one id per row: {rows.shape=}, {batch_size=}')
  rows = _per_row('row_ids', rows, batch_size, np.int32)
  return Request(
    tokens=jnp.asarray(buffer),
    prompt_length=jnp.asarray(lengths, jnp.int32),
    rng_keys=noise.row_keys(seed, jnp.asarray(rows)),
    sampling=_make_sampling(batch_size, temperature, top_k, top_p, min_p, repetition_penalty),
    max_new_tokens=jnp.asarray(budget),
    eos_ids=jnp.asarray(_pad_eos_ids(eos_ids, batch_size, vocab_size)),
  )


def _make_sampling(batch_size, temperature, top_k, top_p, min_p, repetition_penalty) -> Sampling:
  checks = {
    'temperature': (temperature, np.float32, lambda v: (v == 0) | (v >= 1e-6),
                    'must be 0, which is greedy, or at least 1e-6'),
    'top_k': (top_k, np.int32, lambda v: v >= 0, 'must be at least 0; 0 is off'),
    'top_p': (top_p, np.float32, lambda v: (v > 0) & (v <= 1), 'must be in (0, 1]; 1 is off'),
    'min_p': (min_p, np.float32, lambda v: (v >= 0) & (v <= 1), 'must be in [0, 1]; 0 is off'),
    'repetition_penalty': (repetition_penalty, np.float32, lambda v: v > 0,
                           'must be positive; 1 is off'),
  }  # fmt: skip
  values = {}
  for name, (value, dtype, allowed, rule) in checks.items():
    if value is None and name != 'temperature':
      values[name] = None
      continue
    rows = _per_row(name, value, batch_size, dtype)
    given = np.broadcast_to(np.asarray(value), rows.shape)
    _require(np.isfinite(rows) & allowed(rows), name, given, rule)
    values[name] = jnp.asarray(rows)
  return Sampling(**values)


def _pad_prompts(prompts, prompt_lengths):
  """Returns (i32[B, P], i32[B])."""
  if isinstance(prompts, (np.ndarray, jax.Array)):
    tokens = np.asarray(prompts)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(
        f'an array of prompts must be integer [B, P]: {tokens.shape=}, {tokens.dtype=}'
      )
    lengths = np.full(tokens.shape[0], tokens.shape[1])
    if prompt_lengths is not None:
      lengths = np.asarray(prompt_lengths)
      integer = np.issubdtype(lengths.dtype, np.integer)
      if (
        lengths.shape != tokens.shape[:1] or not integer or lengths.max(initial=0) > tokens.shape[1]
      ):
        raise ValueError(
          f'prompt_lengths must be one length per row, at most {tokens.shape[1]}: {prompt_lengths=}'
        )
  else:
    if prompt_lengths is not None:
      raise ValueError('prompt_lengths goes with an array of prompts, not with a list of them')
    rows = [np.asarray(row) for row in prompts]
    for index, row in enumerate(rows):
      if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
        raise ValueError(
          f'prompt {index} must be a flat sequence of token ids: {row.shape=}, '
          f'{row.dtype=}. For one prompt pass [prompt].'
        )
    lengths = np.asarray([row.size for row in rows], np.int64)
    tokens = np.zeros((len(rows), max(lengths.max(initial=0), 1)), np.int64)
    for index, row in enumerate(rows):
      tokens[index, : row.size] = row
  if not len(lengths):
    raise ValueError('prompts is empty; pass at least one prompt')
  if lengths.min() < 1:
    raise ValueError(
      f'prompt {int(lengths.argmin())} is empty (length {lengths.min()}); it needs at least one '
      f'token, such as the beginning-of-sequence id'
    )
  return tokens, lengths


def _pad_eos_ids(eos_ids, batch_size, vocab_size):
  """Returns i32[B, E], padded with -1."""
  given = [np.asarray(item) for item in eos_ids] if np.iterable(eos_ids) else [np.asarray(None)]
  integer = all(item.size == 0 or np.issubdtype(item.dtype, np.integer) for item in given)
  ranks = {item.ndim for item in given}
  if not integer or ranks not in (set(), {0}, {1}):
    raise ValueError(f'eos_ids must be a sequence of token ids, or one per row: {eos_ids!r}')
  rows = given if ranks == {1} else [np.asarray(given, np.int64)] * batch_size
  if len(rows) != batch_size:
    raise ValueError(f'eos_ids needs one sequence per row: {len(rows)=}, {batch_size=}')
  _check_vocabulary('eos_ids', np.concatenate(rows).astype(np.int64), vocab_size)
  padded = np.full((batch_size, max(map(len, rows))), -1, np.int32)
  for index, row in enumerate(rows):
    padded[index, : len(row)] = row
  return padded


def _per_row(name, value, batch_size, dtype):
  given = np.asarray(value)
  whole = np.issubdtype(dtype, np.integer)
  if given.dtype.kind not in ('iu' if whole else 'iuf'):
    kind = 'an integer' if whole else 'a number'
    raise ValueError(f'{name} must be {kind}, or one per row: {value!r}')
  if given.shape not in ((), (batch_size,)):
    raise ValueError(f'{name} must be one value or {batch_size}, one per row: {given.shape=}')
  limit = np.iinfo(dtype).max if whole else np.finfo(dtype).max
  if np.any(np.isfinite(given) & (np.abs(given) > limit)):
    raise ValueError(f'{name} must be within {limit}: {value!r}')
  return np.broadcast_to(given.astype(dtype), (batch_size,))


def _require(ok, name, values, rule):
  if not np.all(ok):
    raise ValueError(f'{name} {rule}: got {values[int(np.argmin(ok))]}')


def _check_vocabulary(name, ids, vocab_size):
  wrong = ids[(ids < 0) | (ids >= vocab_size)]
  if wrong.size:
    raise ValueError(
      f'{name} holds token id {wrong[0]}, outside the vocabulary of {vocab_size}; '
      f'is this the tokenizer of this model?'
    )

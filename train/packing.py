"""Documents packed into rows of one length, stored as arrays that are read from disk as needed.

Axes: `R` rows, `T` tokens of a row.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np

from models.registry import load_model
from models.tokenizer import Tokenizer
from models.tokenizer import tokenizer_from_directory
from train.config import DataConfig
from train.sources import fingerprint
from train.sources import read_sources
from train.tape import Batch
from train.tokenize import Encoded
from train.tokenize import encode
from train.tokenize import train_tokenizer

_VERSION = 1
_OPEN_ROWS = 32  # rows that still take documents
_MIN_PIECE = 8  # tokens; a shorter end of a long document is not worth a place


class Corpus(NamedTuple):
  """Packed rows and what was held out of them."""

  tokens: np.ndarray  # i32[R, T]
  segments: np.ndarray  # i32[R, T], 0 at padding
  loss_mask: np.ndarray  # bool[R, T]
  held_out: list[Encoded]
  token_counts: np.ndarray  # i64[V] of supervised tokens
  facts: dict  # counts, for a person

  def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Batch:
    """Returns the batch of a step: a pure function of step and seed.

    Every epoch goes once over all rows, in an order of its own.

    Args:
      step: from 0.
      batch_size: rows of the whole batch.
      seed: of the order.
      rows: which rows of the batch: a process takes its own.
    """
    return self.gather(self.row_ids(step, batch_size, seed)[rows])

  def row_ids(self, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns i64[batch_size], the rows of a step's batch."""
    places = step * batch_size + np.arange(batch_size)
    epochs, index = np.divmod(places, len(self.tokens))
    found = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
      order = np.random.default_rng((seed, int(epoch))).permutation(len(self.tokens))
      here = epochs == epoch
      found[here] = order[index[here]]
    return found

  def gather(self, ids: np.ndarray) -> Batch:
    """Returns the batch of these rows, in NumPy."""
    segments = np.asarray(self.segments[ids], np.int32)
    arrays: Any = (
      np.asarray(self.tokens[ids], np.int32),
      positions_of(segments),
      segments,
      np.asarray(self.loss_mask[ids], bool),
    )
    return Batch(*arrays)


def positions_of(segments: np.ndarray) -> np.ndarray:
  """Returns i32[R, T], the place of each token in its document; 0 at padding."""
  index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
  starts = np.ones_like(segments, bool)
  starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
  first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  return np.where(segments > 0, index - first, 0).astype(np.int32)


def pack(documents: Iterable[Encoded], length: int) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields rows (tokens i32[T], segments i32[T], loss_mask bool[T]): first fit, in order.

  A document longer than a row is cut into pieces that count as documents of their own. Pieces
  without a supervised token after their first are left out: nothing could be learnt from them.

  Raises:
    ValueError: if length is too short to hold anything.
  """
  if length < _MIN_PIECE:
    raise ValueError(f'a row must have at least {_MIN_PIECE} tokens: {length=}')
  rows: list[_Row] = []
  for document in documents:
    for tokens, mask in _pieces(document, length):
      row = next((row for row in rows if row.room >= len(tokens)), None)
      if row is None:
        if len(rows) == _OPEN_ROWS:
          fullest = min(range(len(rows)), key=lambda i: rows[i].room)
          yield rows.pop(fullest).arrays()
        row = _Row(length)
        rows.append(row)
      row.add(tokens, mask)
      if row.room < _MIN_PIECE:
        rows.remove(row)
        yield row.arrays()
  for row in rows:
    yield row.arrays()


def _pieces(document, length):
  for start in range(0, len(document.tokens), length):
    tokens = document.tokens[start : start + length]
    mask = document.loss_mask[start : start + length]
    if len(tokens) >= min(_MIN_PIECE, len(document.tokens)) and any(mask[1:]):
      yield tokens, mask


class _Row:
  """A row being filled."""

  def __init__(self, length):
    self.length, self.tokens, self.segments, self.mask, self.count = length, [], [], [], 0

  @property
  def room(self):
    return self.length - len(self.tokens)

  def add(self, tokens, mask):
    self.count += 1
    self.tokens += tokens
    self.mask += mask
    self.segments += [self.count] * len(tokens)

  def arrays(self):
    filled = len(self.tokens)
    tokens, segments = np.zeros((2, self.length), np.int32)
    mask = np.zeros(self.length, bool)
    tokens[:filled], segments[:filled], mask[:filled] = self.tokens, self.segments, self.mask
    return tokens, segments, mask


# --- On disk -------------------------------------------------------------------------------------


def prepare_tokenizer(
  config: DataConfig, directory: pathlib.Path, own: Tokenizer | None
) -> Tokenizer:
  """Returns the tokenizer of a run: the target's, the one named, or one trained for it.

  Args:
    config: of the data.
    directory: where a trained one is kept.
    own: the target's; None if there is no target.
  """
  if own is not None:
    return own
  if config.tokenizer:
    return named_tokenizer(config.tokenizer)
  if not (directory / 'tokenizer.json').exists():
    return train_tokenizer(read_sources(config.sources), config.vocab_size, directory)
  return named_tokenizer(str(directory))


def named_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer of a folder, or of a model by name.

  Raises:
    ValueError: if the name means nothing.
    OSError: if it cannot be read.
  """
  if (pathlib.Path(name) / 'tokenizer.json').exists():
    return tokenizer_from_directory(name)
  # A known model's tokenizer comes with its weights.
  return load_model(name).tokenizer


def prepare(
  config: DataConfig, tokenizer: Tokenizer, vocab_size: int, directory: pathlib.Path
) -> Corpus:
  """Returns the packed corpus, from `directory` if it is there and was made of the same things.

  Args:
    config: what to read and how to pack it.
    tokenizer: text to ids.
    vocab_size: V of the model; ids must be below it.
    directory: written as a whole or not at all.

  Raises:
    ValueError: if a source is malformed, or holds too little.
  """
  wanted = _signature(config, tokenizer, vocab_size)
  found = directory / 'facts.json'
  if not found.exists() or json.loads(found.read_text())['signature'] != wanted:
    temporary = directory.with_name(directory.name + '.partial')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(config, tokenizer, vocab_size, temporary, wanted)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
  return load_corpus(directory)


def load_corpus(directory: pathlib.Path) -> Corpus:
  """Returns a prepared corpus; its rows stay on disk until they are used."""
  facts = json.loads((directory / 'facts.json').read_text())
  names = ('tokens', 'segments', 'loss_mask')
  arrays = [np.load(directory / f'{name}.npy', mmap_mode='r') for name in names]
  counts = np.load(directory / 'token_counts.npy')
  held_out = [
    Encoded(each['tokens'], each['loss_mask'], each['where'])
    for each in json.loads((directory / 'held_out.json').read_text())
  ]
  return Corpus(*arrays, held_out=held_out, token_counts=counts, facts=facts)


def _signature(config, tokenizer, vocab_size):
  settings = dataclasses.asdict(config)
  settings.pop('directory')
  probe = tokenizer.encode('The quick brown fox: 0123 naïve\n  def f(x):')
  about = [_VERSION, settings, vocab_size, probe, tokenizer.chat_template, tokenizer.vocab_size]
  about.append(fingerprint(config.sources))
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _write(config, tokenizer, vocab_size, directory, signature):
  examples = [
    encoded
    for document in read_sources(config.sources)
    for encoded in encode(document, tokenizer)
    if any(encoded.loss_mask[1:])
  ]
  _check(examples, vocab_size)
  held_out, rest = _hold_out(examples, config.num_held_out)
  taken = list(_take(rest, config.max_tokens))
  rows = list(pack(taken, config.sequence_length))
  if not rows:
    raise ValueError(
      f'nothing is left to train on: {len(examples)} examples, {config.num_held_out=}'
    )
  arrays = [np.stack(each) for each in zip(*rows, strict=True)]
  for name, array in zip(('tokens', 'segments', 'loss_mask'), arrays, strict=True):
    np.save(directory / f'{name}.npy', array)
  counts = np.bincount(arrays[0][arrays[2]], minlength=vocab_size)
  np.save(directory / 'token_counts.npy', counts)
  kept = [
    {'tokens': list(map(int, e.tokens)), 'loss_mask': list(map(bool, e.loss_mask)),
     'where': e.where}
    for e in held_out
  ]  # fmt: skip
  (directory / 'held_out.json').write_text(json.dumps(kept))
  real, supervised = int((arrays[1] > 0).sum()), int(arrays[2].sum())
  facts = {
    'signature': signature,
    'num_documents': len(taken),
    'num_held_out': len(held_out),
    'num_rows': len(rows),
    'num_tokens': real,
    'num_supervised': supervised,
    'filled': real / arrays[0].size,
  }
  (directory / 'facts.json').write_text(json.dumps(facts, indent=2))


def _check(examples, vocab_size):
  for each in examples:
    worst = max(each.tokens)
    if worst >= vocab_size:
      raise ValueError(
        f'{each.where}: token id {worst} is outside the vocabulary of {vocab_size}; is this the '
        "model's tokenizer?"
      )


def _hold_out(examples, num):
  """Returns (examples held out, the rest): which ones depends on nothing but their number."""
  if num >= len(examples):
    raise ValueError(
      f'{num} documents are to be held out, and there are only {len(examples)}; set '
      'data.num_held_out'
    )
  chosen = set(np.random.default_rng(0).permutation(len(examples))[:num].tolist())
  order = [examples[i] for i in sorted(chosen)]
  return order, [each for i, each in enumerate(examples) if i not in chosen]


def _take(examples, max_tokens):
  """Yields examples in a shuffled order until they hold max_tokens."""
  order = np.random.default_rng(1).permutation(len(examples))
  total = 0
  for index in order:
    if max_tokens is not None and total >= max_tokens:
      return
    total += len(examples[index].tokens)
    yield examples[index]


def prompts_of(
  examples: Iterable[Encoded], num: int, prompt_length: int, *, longest: int
) -> list[list[int]]:
  """Returns prompts for decoding from documents that were held out.

  A conversation gives what comes before the assistant's first turn. A text gives `prompt_length`
  tokens that start somewhere in it.

  Args:
    examples: held-out documents.
    num: how many prompts at most.
    prompt_length: tokens taken from a text.
    longest: conversations with a longer prompt are left out.
  """
  rng, found = np.random.default_rng(2), []
  for example in examples:
    if len(found) == num:
      break
    mask = np.asarray(example.loss_mask, bool)
    if mask[0]:
      last = len(example.tokens) - 2 * prompt_length
      start = int(rng.integers(0, last)) if last > 0 else 0
      prompt = list(example.tokens[start : start + prompt_length])
    else:
      prompt = list(example.tokens[: int(mask.argmax())])
    if 0 < len(prompt) <= longest:
      found.append(prompt)
  return found

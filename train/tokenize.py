"""From documents to token ids and loss masks, and a small tokenizer for small models."""

from collections.abc import Iterable, Iterator, Sequence
import json
import pathlib
from typing import NamedTuple

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from models.tokenizer import Tokenizer
from models.tokenizer import tokenizer_from_directory
from train.sources import Document

END_OF_TEXT, START_OF_TURN, END_OF_TURN = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
_TEMPLATE = (
  '{% for message in messages %}'
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Encoded(NamedTuple):
  """A document as token ids."""

  tokens: Sequence[int]
  loss_mask: Sequence[bool]  # is the token worth predicting?
  where: str = ''


def train_tokenizer(
  documents: Iterable[Document], vocab_size: int, directory: str | pathlib.Path
) -> Tokenizer:
  """Trains a byte-level BPE on documents, writes it as a Hugging Face folder, and returns it.

  Args:
    documents: what it is trained on.
    vocab_size: at least 300: the bytes and the special tokens are among them.
    directory: created if need be.

  Raises:
    ValueError: if vocab_size is too small.
  """
  if vocab_size < 300:
    raise ValueError(f'a byte-level tokenizer needs vocab_size of at least 300: {vocab_size=}')
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator((_plain_text(each) for each in documents), trainer)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  backend.save(str(directory / 'tokenizer.json'))
  about = {'eos_token': END_OF_TEXT, 'chat_template': _TEMPLATE}
  (directory / 'tokenizer_config.json').write_text(json.dumps(about, indent=2), encoding='utf-8')
  return tokenizer_from_directory(directory)


def _plain_text(document):
  if document.messages is not None:
    return '\n'.join(message['content'] for message in document.messages)
  return document.text or ''


def encode(document: Document, tokenizer: Tokenizer) -> Iterator[Encoded]:
  """Yields a document as token ids: mostly once, else once for every turn of the assistant's.

  A text is supervised whole, its end included. Of a conversation only the assistant's turns are,
  each from its first token to the one that ends the turn; headers and line breaks that the
  template writes are not.

  Raises:
    ValueError: if the template refuses the conversation, or nobody answers in it.
  """
  if document.token_ids is not None and document.loss_mask is not None:
    yield Encoded(document.token_ids, document.loss_mask, document.where)
  elif document.text is not None:
    tokens = tokenizer.encode(document.text) + list(tokenizer.eos_ids[:1])
    yield Encoded(tokens, [True] * len(tokens), document.where)
  elif document.messages is not None:
    try:
      yield from _encode_conversation(document, tokenizer)
    except ValueError as error:
      raise ValueError(f'{document.where}: {error}') from error


def _encode_conversation(document, tokenizer):
  """Yields one example if every turn's rendering continues the one before it, else one a turn.

  Some templates rewrite earlier turns (they drop old reasoning): then each turn of the assistant's
  must be learnt after the history that it will be shown.
  """
  messages = document.messages
  turns = [index for index, each in enumerate(messages) if each['role'] == 'assistant']
  if not turns:
    raise ValueError(
      "no turn of the assistant's, so there is nothing to learn; `train.regenerate` writes them"
    )
  whole = tokenizer.encode_chat(messages[: turns[-1] + 1], add_generation_prompt=False)
  mask, one_text = [False] * len(whole), True
  examples = []
  for index in turns:
    tokens, start, end = _locate_turn(messages[: index + 1], tokenizer)
    own = [start <= i < end for i in range(len(tokens))]
    examples.append(Encoded(tokens[:end], own[:end], document.where))
    one_text = one_text and whole[:end] == list(tokens[:end])
    mask[start:end] = [True] * (end - start)
  if one_text:
    last = len(examples[-1].tokens)
    yield Encoded(whole[:last], mask[:last], document.where)
  else:
    yield from examples


def _locate_turn(messages, tokenizer):
  """Returns (ids of the conversation, where the last turn's content starts, where it ends)."""
  before = tokenizer.encode_chat(messages[:-1], add_generation_prompt=True)
  tokens = tokenizer.encode_chat(messages, add_generation_prompt=False)
  start = 0
  while start < min(len(before), len(tokens)) and before[start] == tokens[start]:
    start += 1
  ends = [i for i in range(start, len(tokens)) if tokens[i] in tokenizer.eos_ids]
  if tokenizer.chat_template is None:
    tokens = tokens + list(tokenizer.eos_ids[:1])
    return tokens, start, len(tokens)
  return tokens, start, ends[-1] + 1 if ends else len(tokens)

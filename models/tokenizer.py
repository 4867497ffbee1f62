"""Text to token ids and back, and chat templates, from whatever a checkpoint brings along.

A tokenizer is read from a Hugging Face directory (`tokenizer.json`), from the metadata of a GGUF
file, or from the `tokenizer.bin` of llama2.c, and always ends up in the `tokenizers` library.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import datetime
import functools
import json
import pathlib
import struct
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers.models import BPE

Message = Mapping[str, Any]  # {'role': 'user', 'content': 'text'}

# Tokens that end a turn or a text in the families supported here. Where a vocabulary has one as a
# special token it stops decoding, whether or not the checkpoint says so.
_END_TOKENS = (
  '<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<end_of_turn>', '<|end_of_text|>', '<|endoftext|>',
)  # fmt: skip

# How text is cut before byte pairs are merged, by the name GGUF gives it: every expression cuts
# the pieces that the one before has left.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_PRE_TOKENIZERS = {
  'default': (r'[\p{P}\$\+<=>\^~\|]+', _GPT2, r'\p{N}+', '[0-9][0-9][0-9]'),
  'gpt-2': (_GPT2,),
  'llama-bpe': (_WORDS % '{1,3}',),
  'qwen2': (_WORDS % '',),
  'smollm': (r'\p{N}', _GPT2),
}
_PRE_TOKENIZERS |= {
  'llama-v3': _PRE_TOKENIZERS['llama-bpe'],
  'llama3': _PRE_TOKENIZERS['llama-bpe'],
  'starcoder': _PRE_TOKENIZERS['smollm'],
  'deepseek-r1-qwen': _PRE_TOKENIZERS['qwen2'],
}

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # GGUF token types


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer with its stop tokens and its chat template."""

  backend: tokenizers.Tokenizer | None  # None: the checkpoint has none, and `missing` says so
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()  # every id that ends a text or a turn
  chat_template: str | None = None  # Jinja
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)  # 'bos_token': ...
  missing: str = ''

  @property
  def vocab_size(self) -> int:
    """Number of tokens, added ones included. The model's vocabulary may be padded beyond it."""
    return self._need().get_vocab_size()

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns the ids of a text, with what the checkpoint puts around it (mostly BOS, or nothing).

    Raises:
      ValueError: if the checkpoint has no tokenizer.
    """
    return self._need().encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of some ids; bytes that are no UTF-8 come out as U+FFFD.

    Raises:
      ValueError: if the checkpoint has no tokenizer.
    """
    return self._need().decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def stream(self, *, skip_special_tokens: bool = True) -> 'TextStream':
    """Returns a decoder that is fed ids as they come."""
    return TextStream(self, skip_special_tokens)

  def apply_chat_template(
    self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables
  ) -> str:
    """Returns a conversation as the text that the model was trained on.

    Without a template (a base model) it is the contents, parted by blank lines.

    Args:
      messages: `{'role': 'user', 'content': 'text'}` and so on, oldest first.
      add_generation_prompt: end with the opening of the assistant's turn.
      **variables: more for the template, for example `tools` or `enable_thinking`.

    Raises:
      ValueError: if the template is broken or refuses these messages.
    """
    for message in messages:
      if not {'role', 'content'} <= set(message):
        raise ValueError(f"a message needs 'role' and 'content': {message!r}")
    if self.chat_template is None:
      return '\n\n'.join(str(message['content']) for message in messages)
    known = {'tools': None, 'documents': None, **self.special_tokens, **variables}
    try:
      return _compile_template(self.chat_template).render(
        messages=list(messages), add_generation_prompt=add_generation_prompt, **known
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f'the chat template does not take these messages: {error}') from error

  def encode_chat(
    self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables
  ) -> list[int]:
    """Returns the ids of `apply_chat_template`. A template writes BOS; plain text is given it."""
    text = self.apply_chat_template(messages, add_generation_prompt, **variables)
    return self.encode(text, add_special_tokens=self.chat_template is None)

  def _need(self):
    if self.backend is None:
      raise ValueError(self.missing or 'this model came without a tokenizer')
    return self.backend


class TextStream:
  """Turns ids into text as they come, never showing half a character.

  All pieces joined are what `Tokenizer.decode` returns for all ids, unless the ids spell invalid
  UTF-8. Only a short tail is decoded each time, so the cost does not grow with the text.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
    self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    self._ids = []  # a tail of the ids, long enough that what comes next decodes as in context
    self._old = 0  # how many of them were shown before the last piece
    self._shown = 0  # characters of their text that were shown

  def push(self, ids: Iterable[int]) -> str:
    """Returns the text that these ids add; '' while a character is incomplete."""
    self._ids += [int(i) for i in ids]
    text = self._decode(self._ids)
    held = min(len(text) - len(text.rstrip('\ufffd')), 3)  # may yet become one character
    piece = self._show(text[: len(text) - held])
    if not held:
      self._slide()
    return piece

  def finish(self) -> str:
    """Returns what was still held back."""
    return self._show(self._decode(self._ids))

  def _show(self, text):
    piece = text[self._shown :]
    self._shown = max(self._shown, len(text))
    return piece

  def _slide(self):
    """Forgets ids before the last piece: some decoders drop a space at the start of a text."""
    tail = self._ids[self._old :]
    text = self._decode(tail)
    if text:
      self._ids, self._old, self._shown = tail, len(tail), len(text)


# --- Hugging Face directories ------------------------------------------------------------------


def tokenizer_from_directory(directory: str | pathlib.Path) -> Tokenizer:
  """Returns the tokenizer of a Hugging Face directory, or of one with llama2.c's `tokenizer.bin`.

  A directory without either gives a tokenizer that raises when it is used: a draft model needs
  none. Stop ids are those of `generation_config.json`, `config.json` and `tokenizer_config.json`,
  and the vocabulary's special tokens that end a turn.

  Raises:
    ValueError: if a file is damaged.
  """
  directory = pathlib.Path(directory)
  configs = [read_json(directory / f'{name}.json') for name in ('config', 'generation_config')]
  configs += [config['text_config'] for config in configs if 'text_config' in config]
  if (directory / 'tokenizer.json').exists():
    backend = _read_backend(directory / 'tokenizer.json')
  elif binary := sorted(directory.glob('tok*.bin')):
    found = tokenizer_from_llama2c(binary[0])
    stops = tuple(dict.fromkeys((*_declared_ids(configs), *found.eos_ids)))
    return dataclasses.replace(found, eos_ids=stops)
  else:
    return Tokenizer(
      None,
      eos_ids=_declared_ids(configs),
      missing=f'{directory} has no tokenizer: put its tokenizer.json there. (The older '
      'tokenizer.model or vocab.json can be turned into one with transformers: '
      'AutoTokenizer.from_pretrained(directory).save_pretrained(directory).)',
    )
  special = _special_tokens(directory)
  declared = _declared_ids(configs)
  if 'eos_token' in special:
    declared += _ids_of(backend, [special['eos_token']])
  return Tokenizer(
    backend,
    bos_id=next(iter(_ids_of(backend, [special.get('bos_token')])), None),
    eos_ids=_stop_ids(backend, declared),
    chat_template=_read_template(directory),
    special_tokens=special,
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; {} if there is no such file.

  Raises:
    ValueError: if it is not a JSON object.
  """
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} must hold a JSON object, not a {type(value).__name__}')
  return value


def _read_backend(path):
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises plain `Exception`
    raise ValueError(f'{path} cannot be read as a tokenizer: {error}') from error


def _special_tokens(directory):
  """Returns {'bos_token': '<s>', ...}, from the newer of the two files that may say so."""
  both = {
    **read_json(directory / 'special_tokens_map.json'),
    **read_json(directory / 'tokenizer_config.json'),
  }
  found = {}
  for key, value in both.items():
    text = value.get('content') if isinstance(value, dict) else value
    if key.endswith('_token') and isinstance(text, str):
      found[key] = text
  return found


def _read_template(directory):
  if (path := directory / 'chat_template.jinja').exists():
    return path.read_text(encoding='utf-8')
  for name in ('chat_template.json', 'tokenizer_config.json'):
    template = read_json(directory / name).get('chat_template')
    if isinstance(template, list):  # several, each with a name
      named = {entry['name']: entry['template'] for entry in template}
      template = named.get('default')
    if template:
      return template
  return None


def _declared_ids(configs):
  ids = []
  for config in configs:
    value = config.get('eos_token_id')
    ids += value if isinstance(value, list) else [value]
  return tuple(dict.fromkeys(i for i in ids if i is not None))


def _ids_of(backend, names):
  ids = (backend.token_to_id(name) for name in names if name)
  return tuple(i for i in ids if i is not None)


def _stop_ids(backend, declared):
  added = {token.content for token in backend.get_added_tokens_decoder().values()}
  known = _ids_of(backend, [name for name in _END_TOKENS if name in added])
  return tuple(dict.fromkeys((*declared, *known)))


# --- GGUF --------------------------------------------------------------------------------------


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  """Returns the tokenizer described by the `tokenizer.*` keys of a GGUF file.

  Raises:
    ValueError: if its kind or its pre-tokenizer is not known.
  """
  get = functools.partial(_gguf_value, metadata)
  kind, tokens = get('model'), get('tokens')
  if tokens is None:
    return Tokenizer(None, missing='the GGUF file holds no tokenizer (tokenizer.ggml.tokens)')
  if kind == 'gpt2':
    pre = get('pre', 'default')
    backend = _byte_level_bpe(tokens, get('merges', []), pre)
    add_bos = pre in ('llama-bpe', 'llama-v3', 'llama3')
  elif kind == 'llama':
    backend = _scored_bpe(
      tokens, get('scores'), get('unknown_token_id', 0), get('add_space_prefix', True)
    )
    add_bos = True
  else:
    raise ValueError(f"tokenizer.ggml.model must be 'gpt2' or 'llama': {kind!r}")
  types = get('token_type') or [_NORMAL] * len(tokens)
  _add_special(backend, tokens, types)
  bos, eos = get('bos_token_id'), get('eos_token_id')
  if get('add_bos_token', add_bos) and bos is not None:
    _prepend_bos(backend, tokens[bos], bos)
  declared = [get(f'{which}_token_id') for which in ('eos', 'eot', 'eom')]
  special = {'bos_token': bos, 'eos_token': eos}
  return Tokenizer(
    backend,
    bos_id=bos,
    eos_ids=_stop_ids(backend, [i for i in declared if i is not None]),
    chat_template=metadata.get('tokenizer.chat_template'),
    special_tokens={key: tokens[i] for key, i in special.items() if i is not None},
  )


def _gguf_value(metadata, key, default=None):
  return metadata.get(f'tokenizer.ggml.{key}', default)


def _byte_level_bpe(tokens, merges, pre):
  if pre not in _PRE_TOKENIZERS:
    raise ValueError(
      f'tokenizer.ggml.pre is {pre!r}, known are {", ".join(sorted(_PRE_TOKENIZERS))}. '
      'Load the model from its Hugging Face directory instead, which has a tokenizer.json.'
    )
  backend = tokenizers.Tokenizer(
    BPE(
      {token: i for i, token in enumerate(tokens)},
      [tuple(merge.split(' ')) for merge in merges],
      ignore_merges=_PRE_TOKENIZERS[pre] == _PRE_TOKENIZERS['llama-bpe'],
    )
  )
  if _PRE_TOKENIZERS[pre] == _PRE_TOKENIZERS['qwen2']:
    backend.normalizer = normalizers.NFC()
  cuts = [
    pre_tokenizers.Split(tokenizers.Regex(expression), 'isolated')
    for expression in _PRE_TOKENIZERS[pre]
  ]
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
  backend.decoder = decoders.ByteLevel()
  return backend


def _add_special(backend, tokens, types):
  added = [
    tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
    for token, kind in zip(tokens, types, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  backend.add_special_tokens([token for token in added if token.special])
  backend.add_tokens([token for token in added if not token.special])


def _prepend_bos(backend, token, token_id):
  backend.post_processor = processors.TemplateProcessing(
    single=f'{token} $A', pair=f'{token} $A {token} $B', special_tokens=[(token, token_id)]
  )


# --- SentencePiece vocabularies ----------------------------------------------------------------


def tokenizer_from_llama2c(path: str | pathlib.Path) -> Tokenizer:
  """Returns the tokenizer in a llama2.c `tokenizer.bin`: ids 0, 1, 2 are unknown, BOS and EOS.

  The file holds an int32 (longest piece), then for each id a float32 score, an int32 length and
  that many bytes.

  Raises:
    ValueError: if the file ends early.
  """
  data = pathlib.Path(path).read_bytes()
  tokens, scores, at = [], [], 4
  try:
    while at < len(data):
      score, length = struct.unpack_from('<fi', data, at)
      (piece,) = struct.unpack_from(f'{length}s', data, at + 8)
      tokens.append(piece.decode('utf-8').replace(' ', '▁'))
      scores.append(score)
      at += 8 + length
  except (struct.error, UnicodeDecodeError) as error:
    raise ValueError(f'{path} is not a llama2.c tokenizer, or is cut short: {error}') from error
  if len(tokens) < 3:
    raise ValueError(f'{path} holds {len(tokens)} tokens; a llama2.c tokenizer has at least 3')
  tokens[:3] = special = ['<unk>', '<s>', '</s>']
  backend = _scored_bpe(tokens, scores, 0, True)
  backend.add_special_tokens(special)
  _prepend_bos(backend, '<s>', 1)
  special = {'bos_token': '<s>', 'eos_token': '</s>'}
  # llama2.c stops at BOS: its stories follow each other with nothing else between them.
  return Tokenizer(backend, bos_id=1, eos_ids=(2, 1), special_tokens=special)


def _scored_bpe(tokens, scores, unknown_id, add_space_prefix):
  """Returns a SentencePiece BPE model: the pair that makes the piece of highest score merges first.

  Bytes outside the vocabulary fall back to the tokens <0x00> to <0xFF>.
  """
  vocab = {token: i for i, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(
    BPE(
      vocab,
      _merges_by_score(vocab, scores),
      unk_token=tokens[unknown_id],
      fuse_unk=True,
      byte_fallback=all(f'<0x{byte:02X}>' in vocab for byte in range(256)),
    )
  )
  spaces = normalizers.Replace(' ', '▁')
  prefix = [normalizers.Prepend('▁')] if add_space_prefix else []
  backend.normalizer = normalizers.Sequence([*prefix, spaces])
  strip = [decoders.Strip(' ', 1, 0)] if add_space_prefix else []
  backend.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  return backend


def _merges_by_score(vocab, scores):
  ranked = sorted(vocab, key=lambda piece: -scores[vocab[piece]])
  return [
    (piece[:cut], piece[cut:])
    for piece in ranked
    for cut in range(1, len(piece))
    if piece[:cut] in vocab and piece[cut:] in vocab
  ]


# --- Chat templates ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _compile_template(source):
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda text: datetime.datetime.now().strftime(text)
  return environment.from_string(source)


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _to_json(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
  """Jinja's own filter escapes for HTML, which is wrong in a prompt."""
  return json.dumps(
    value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
  )

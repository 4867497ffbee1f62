"""Tokenizers from every source, streaming, stop ids and chat templates."""

import json
import random
import shutil
import struct

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
from tokenizers import pre_tokenizers

from models.tokenizer import Tokenizer
from models.tokenizer import tokenizer_from_directory
from models.tokenizer import tokenizer_from_gguf
from models.tokenizer import tokenizer_from_llama2c
from tests.models.make_golden import TOKENIZER

_EXPECTED = json.loads((TOKENIZER / 'expected.json').read_text(encoding='utf-8'))
_TEXTS = [row['text'] for row in _EXPECTED['texts']]


@pytest.fixture(scope='module')
def chatml():
  return tokenizer_from_directory(TOKENIZER)


def gguf_metadata(pre='smollm', **changes):
  """Returns the tiny golden tokenizer as GGUF metadata."""
  data = json.loads((TOKENIZER / 'tokenizer.json').read_text())['model']
  tokens = sorted(data['vocab'], key=data['vocab'].get)
  fields = {
    'model': 'gpt2',
    'pre': pre,
    'tokens': tokens,
    'merges': [' '.join(merge) for merge in data['merges']],
    'token_type': [3] * 3 + [1] * (len(tokens) - 3),
    'bos_token_id': 1,
    'eos_token_id': 2,
    **changes,
  }
  return {f'tokenizer.ggml.{key}': value for key, value in fields.items()}


# --- Hugging Face directories ------------------------------------------------------------------


def test_ids_equal_transformers(chatml):
  assert [chatml.encode(text) for text in _TEXTS] == [row['ids'] for row in _EXPECTED['texts']]


def test_round_trip(chatml):
  for text in _TEXTS:
    assert chatml.decode(chatml.encode(text), skip_special_tokens=False) == text


def test_special_ids(chatml):
  assert chatml.bos_id == 1
  assert chatml.eos_ids == (2, 0)  # declared; <|endoftext|> ends a text in every vocabulary
  assert chatml.vocab_size == 400
  assert chatml.decode([2, 43, 1]) == chatml.decode([43])


def test_stop_ids_come_from_every_file(tmp_path):
  shutil.copy(TOKENIZER / 'tokenizer.json', tmp_path)
  (tmp_path / 'config.json').write_text('{"eos_token_id": 7}')
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [9, 7]}')
  assert tokenizer_from_directory(tmp_path).eos_ids == (7, 9, 2, 0)


def test_directory_without_a_tokenizer(tmp_path):
  (tmp_path / 'config.json').write_text('{"eos_token_id": 7}')
  found = tokenizer_from_directory(tmp_path)
  assert found.eos_ids == (7,)
  with pytest.raises(ValueError, match='has no tokenizer: put its tokenizer.json there'):
    found.decode([1])


def test_damaged_files(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(ValueError, match='cannot be read as a tokenizer'):
    tokenizer_from_directory(tmp_path)
  shutil.copy(TOKENIZER / 'tokenizer.json', tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('[]')
  with pytest.raises(ValueError, match='must hold a JSON object, not a list'):
    tokenizer_from_directory(tmp_path)


# --- Chat templates ----------------------------------------------------------------------------


@pytest.mark.parametrize('chat', _EXPECTED['chats'])
def test_chat_templates_equal_transformers(chatml, chat):
  found = chatml.apply_chat_template(chat['messages'], chat['add_generation_prompt'])
  assert found == chat['text']


def test_encode_chat_does_not_add_special_tokens_twice():
  found = tokenizer_from_gguf(
    {**gguf_metadata(add_bos_token=True), 'tokenizer.chat_template': '{{ bos_token }}x'}
  )
  assert found.encode('x')[0] == 1
  assert found.encode_chat([{'role': 'user', 'content': 'a'}]) == found.encode('x')


def test_templates_may_come_from_three_places(tmp_path):
  shutil.copy(TOKENIZER / 'tokenizer.json', tmp_path)
  messages = [{'role': 'user', 'content': 'a'}]
  named = [{'name': 'tool_use', 'template': 'no'}, {'name': 'default', 'template': 'named'}]
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': named}))
  assert tokenizer_from_directory(tmp_path).apply_chat_template(messages) == 'named'
  (tmp_path / 'chat_template.json').write_text('{"chat_template": "json"}')
  assert tokenizer_from_directory(tmp_path).apply_chat_template(messages) == 'json'
  (tmp_path / 'chat_template.jinja').write_text('{{ strftime_now("%Y")[:2] }}')
  assert tokenizer_from_directory(tmp_path).apply_chat_template(messages) == '20'


def test_without_a_template_contents_are_joined():
  messages = [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': 'b'}]
  assert Tokenizer(None).apply_chat_template(messages) == 'a\n\nb'


@pytest.mark.parametrize(
  ('template', 'messages', 'error'),
  [
    ("{{ raise_exception('no system turn') }}", [], 'no system turn'),
    ('{% for %}', [], 'does not take these messages'),
    ("{{ ''.__class__.__mro__ }}", [], 'unsafe'),
    ('{{ messages.append(1) }}', [], 'does not take'),
    (None, [{'role': 'user'}], "needs 'role' and 'content'"),
  ],
)
def test_refused_messages_and_templates(template, messages, error):
  with pytest.raises(ValueError, match=error):
    Tokenizer(None, chat_template=template).apply_chat_template(messages)


# --- Streaming ---------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [1, 2, 5])
@pytest.mark.parametrize('text', _TEXTS)
def test_stream_equals_decode_and_shows_whole_characters(chatml, text, size):
  ids, stream = chatml.encode(text), chatml.stream()
  pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
  assert '\ufffd' not in ''.join(pieces)
  assert ''.join(pieces) + stream.finish() == chatml.decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30))
def test_stream_of_any_ids_equals_decode(ids):
  tokenizer = tokenizer_from_directory(TOKENIZER)
  stream = tokenizer.stream()
  text = ''.join(stream.push([i]) for i in ids) + stream.finish()
  assert text == tokenizer.decode(ids)


def test_stream_holds_an_unfinished_character(chatml):
  ids = chatml.encode('😀')
  stream = chatml.stream()
  assert len(ids) == 3
  assert [stream.push([i]) for i in ids] == ['', '', '😀']
  stream = chatml.stream()
  assert stream.push(ids[:2]) == ''
  assert stream.finish() == chatml.decode(ids[:2])


def test_stream_keeps_spaces_of_sentencepiece_after_special_tokens(tmp_path):
  tokenizer = tokenizer_from_llama2c(write_llama2c(tmp_path))
  ids = tokenizer.encode('ab b ab', add_special_tokens=False)
  ids.insert(2, 1)
  stream = tokenizer.stream()
  assert ''.join(stream.push([i]) for i in ids) == tokenizer.decode(ids) == 'ab b ab'


# --- GGUF --------------------------------------------------------------------------------------


def test_gguf_equals_the_same_tokenizer_json(chatml):
  found = tokenizer_from_gguf(gguf_metadata())
  assert [found.encode(text) for text in _TEXTS] == [row['ids'] for row in _EXPECTED['texts']]
  assert (found.bos_id, found.eos_ids, found.vocab_size) == (1, (2, 0), 400)


def pre_tokenizer(tokenizer):
  assert tokenizer.backend is not None
  return tokenizer.backend.pre_tokenizer


def pieces(tokenizer, text):
  cut = pre_tokenizer(tokenizer).pre_tokenize_str(text)
  return [text[start:end] for _, (start, end) in cut]


def test_gpt2_pre_tokenizer_equals_the_library_one():
  tokenizer = tokenizer_from_gguf(gguf_metadata('gpt-2'))
  reference = pre_tokenizers.ByteLevel(add_prefix_space=False)
  for text in _TEXTS:
    assert pre_tokenizer(tokenizer).pre_tokenize_str(text) == reference.pre_tokenize_str(text)


@pytest.mark.parametrize(
  ('pre', 'text', 'expected'),
  [
    ('smollm', "it's 123", ['it', "'s", ' ', '1', '2', '3']),
    ('llama-bpe', "IT'S 12345!\n\nok", ['IT', "'S", ' ', '123', '45', '!\n\n', 'ok']),
    ('llama3', 'a  b', ['a', ' ', ' b']),
    ('qwen2', 'x12\n y', ['x', '1', '2', '\n', ' y']),
    ('default', 'a+b 1234', ['a', '+', 'b', ' ', '123', '4']),
  ],
)
def test_pre_tokenizers(pre, text, expected):
  assert pieces(tokenizer_from_gguf(gguf_metadata(pre)), text) == expected


def test_llama3_style_vocabularies_start_with_bos():
  assert tokenizer_from_gguf(gguf_metadata('llama-bpe')).encode('a')[0] == 1
  assert tokenizer_from_gguf(gguf_metadata('qwen2')).encode('a')[0] != 1


def test_turn_ends_of_gguf_metadata_are_stop_ids():
  metadata = gguf_metadata(eot_token_id=50, eom_token_id=51)
  assert tokenizer_from_gguf(metadata).eos_ids == (2, 50, 51, 0)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'pre': 'unheard-of'}, "tokenizer.ggml.pre is 'unheard-of', known are .*smollm"),
    ({'model': 'bert'}, "tokenizer.ggml.model must be 'gpt2' or 'llama': 'bert'"),
  ],
)
def test_unknown_gguf_tokenizers(changes, message):
  with pytest.raises(ValueError, match=message):
    tokenizer_from_gguf(gguf_metadata(**changes))


def test_gguf_without_a_tokenizer():
  with pytest.raises(ValueError, match='holds no tokenizer'):
    tokenizer_from_gguf({}).encode('a')


# --- SentencePiece -----------------------------------------------------------------------------

_PIECES = ['a', 'b', 'c', ' ', 'ab', ' a', 'bc', ' ab', 'abc', 'é', ' abc', 'cc']


def spm_vocabulary():
  tokens = ['<unk>', '\n<s>\n', '\n</s>\n', *(f'<0x{byte:02X}>' for byte in range(256)), *_PIECES]
  return tokens, [0.0] * 259 + random.Random(1).sample([-float(i) for i in range(20)], len(_PIECES))


def write_llama2c(folder):
  data = struct.pack('<i', 27)
  for token, score in zip(*spm_vocabulary(), strict=True):
    raw = token.encode()
    data += struct.pack('<fi', score, len(raw)) + raw
  (folder / 'tokenizer.bin').write_bytes(data)
  return folder / 'tokenizer.bin'


def merged_by_score(text):
  """Returns ids by the definition: again and again, join the pair that makes the best piece."""
  tokens, scores = spm_vocabulary()
  index = {token: i for i, token in enumerate(tokens)}
  ids = [1]
  for character in ' ' + text:
    raw = character.encode()
    ids += [index[character]] if character in index else [byte + 3 for byte in raw]
  while True:
    found = [
      (scores[index[pair]], -i, index[pair])
      for i in range(len(ids) - 1)
      if (pair := tokens[ids[i]] + tokens[ids[i + 1]]) in index
    ]
    if not found:
      return ids
    _, at, best = max(found)
    ids[-at : -at + 2] = [best]


@pytest.mark.parametrize('text', ['abc', 'ab c bc', 'abcabc é 你a', 'ccc', '', '  ab', 'a\nb'])
def test_llama2c_tokenizer_merges_by_score(tmp_path, text):
  tokenizer = tokenizer_from_llama2c(write_llama2c(tmp_path))
  assert tokenizer.encode(text) == (merged_by_score(text) if text else [1])
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2, 1))


def test_llama2c_tokenizer_in_a_directory(tmp_path):
  write_llama2c(tmp_path)
  (tmp_path / 'config.json').write_text('{"eos_token_id": 7}')
  found = tokenizer_from_directory(tmp_path)
  assert found.encode('abc') == merged_by_score('abc')
  assert found.eos_ids == (7, 2, 1)


def test_truncated_llama2c_tokenizer(tmp_path):
  path = write_llama2c(tmp_path)
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(ValueError, match='is not a llama2.c tokenizer, or is cut short'):
    tokenizer_from_llama2c(path)


def test_sentencepiece_in_gguf_with_and_without_a_leading_space():
  tokens, scores = spm_vocabulary()
  tokens = ['<unk>', '<s>', '</s>', *(token.replace(' ', '▁') for token in tokens[3:])]
  types = [2, 3, 3] + [6] * 256 + [1] * len(_PIECES)
  fields = {
    'model': 'llama',
    'tokens': tokens,
    'scores': scores,
    'token_type': types,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'unknown_token_id': 0,
  }
  metadata = {f'tokenizer.ggml.{key}': value for key, value in fields.items()}
  assert tokenizer_from_gguf(metadata).encode('abc é') == merged_by_score('abc é')
  bare = tokenizer_from_gguf({**metadata, 'tokenizer.ggml.add_space_prefix': False})
  assert bare.encode('abc') == [1, tokens.index('abc')]
  assert bare.decode(bare.encode(' abc')) == ' abc'
  assert bare.encode('</s>', add_special_tokens=False) == [2]

"""What is read, what is supervised, how it is packed, and what bad input says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from models.tokenizer import tokenizer_from_directory
from tests.train.conftest import LENGTH
from tests.train.conftest import VOCAB_SIZE
from train import inspect_data
from train import packing
from train.config import DataConfig
from train.sources import CORPORA
from train.sources import Document
from train.sources import parse_record
from train.sources import read_sources
from train.tokenize import Encoded
from train.tokenize import encode
from train.tokenize import train_tokenizer

_TURNS = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'word1?'},
  {'role': 'assistant', 'content': 'It is 3.'},
  {'role': 'user', 'content': 'And word2?'},
  {'role': 'assistant', 'content': 'It is 5.'},
  {'role': 'user', 'content': 'Thanks.'},
]


@pytest.fixture(scope='module')
def tokenizer(tokenizer_folder):
  return tokenizer_from_directory(tokenizer_folder)


def test_only_the_assistants_turns_are_supervised(tokenizer):
  document = Document('here', messages=tuple(_TURNS))
  (example,) = encode(document, tokenizer)
  text = inspect_data.supervised_text(example, tokenizer)
  assert text == 'It is 3.<|im_end|> | It is 5.<|im_end|>'
  whole = tokenizer.decode(example.tokens, skip_special_tokens=False)
  assert whole.startswith('<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nword1?')
  assert whole.endswith('It is 5.<|im_end|>')


def test_a_template_that_rewrites_history_gives_one_example_a_turn(tokenizer):
  template = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n'
    "{{ m.content if loop.last or m.role != 'assistant' else 'cut' }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
  )
  other = dataclasses.replace(tokenizer, chat_template=template)
  examples = list(encode(Document('here', messages=tuple(_TURNS)), other))
  texts = [inspect_data.supervised_text(each, other) for each in examples]
  assert texts == ['It is 3.<|im_end|>', 'It is 5.<|im_end|>']
  assert 'cut' in other.decode(examples[1].tokens)


def test_without_a_template_the_answer_is_supervised(tokenizer):
  bare = dataclasses.replace(tokenizer, chat_template=None)
  messages = ({'role': 'user', 'content': 'word1'}, {'role': 'assistant', 'content': 'is 3'})
  (example,) = encode(Document('here', messages=messages), bare)
  assert inspect_data.supervised_text(example, bare).strip() == 'is 3<|endoftext|>'


def test_a_conversation_that_nobody_answers_is_refused(tokenizer):
  asked = Document('chats.jsonl, line 7', messages=({'role': 'user', 'content': 'word1'},))
  with pytest.raises(ValueError, match="chats.jsonl, line 7: no turn of the assistant's"):
    list(encode(asked, tokenizer))


def test_a_text_is_supervised_whole(tokenizer):
  (example,) = encode(Document('here', text='word1 is 3'), tokenizer)
  assert all(example.loss_mask)
  assert tokenizer.decode(example.tokens, skip_special_tokens=False) == 'word1 is 3<|endoftext|>'


def test_the_viewer_shows_what_is_supervised(tokenizer_folder, tmp_path, capsys):
  path = tmp_path / 'chats.jsonl'
  path.write_text(json.dumps({'messages': _TURNS}))
  arguments = ['--data', str(path), '--tokenizer', str(tokenizer_folder)]
  assert inspect_data.main(arguments) == 0
  shown = capsys.readouterr().out
  assert "supervised: 'It is 3.<|im_end|> | It is 5.<|im_end|>'" in shown
  assert 'chats.jsonl, line 1:' in shown and 'Be brief.' in shown
  assert inspect_data.main(['--data', 'nowhere.jsonl']) == 2
  assert 'no such file or folder: nowhere.jsonl' in capsys.readouterr().err


# --- Files ---------------------------------------------------------------------------------------

_SAME = (
  {'prompt': 'word1?', 'response': 'It is 3.'},
  {
    'messages': [
      {'role': 'user', 'content': 'word1?'},
      {'role': 'assistant', 'content': 'It is 3.'},
    ]
  },
  {'conversations': [{'from': 'human', 'value': 'word1?'}, {'from': 'gpt', 'value': 'It is 3.'}]},
)


def test_the_ways_to_write_a_conversation_are_one():
  first, *others = (parse_record(record, 'here') for record in _SAME)
  assert others == [first, first]


def test_parquet_is_read_as_json_lines_are(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  rows = [_SAME[1], {'messages': _TURNS}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'chats.parquet')
  (tmp_path / 'chats.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  from_parquet = read_sources([str(tmp_path / 'chats.parquet')])
  from_lines = read_sources([str(tmp_path / 'chats.jsonl')])
  assert [each.messages for each in from_parquet] == [each.messages for each in from_lines]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"text": ', 'line 2: not valid JSON'),
    ('[1]', 'line 2: expected an object'),
    ('{"title": "x"}', 'line 2: has title; need text'),
    ('{"messages": []}', 'line 2: a conversation must be a list of turns'),
    ('{"messages": [{"role": "boss", "content": "x"}]}', "line 2: turn 0 needs 'role', one of"),
    ('{"token_ids": [1, 2], "loss_mask": [1]}', 'line 2: token_ids must be ids'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / 'bad.jsonl'
  path.write_text('{"text": "fine"}\n' + line)
  with pytest.raises(ValueError, match=f'bad.jsonl, {message}'):
    list(read_sources([str(path)]))


def test_bad_sources_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='Corpora known by name: stdlib, pydoc'):
    list(read_sources(['wikipedia']))
  (tmp_path / 'a.bin').write_bytes(b'x')
  with pytest.raises(ValueError, match='of no kind that is read'):
    list(read_sources([str(tmp_path / 'a.bin')]))
  (tmp_path / 'a.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match='not UTF-8'):
    list(read_sources([str(tmp_path / 'a.txt')]))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='holds no documents'):
    list(read_sources([str(tmp_path / 'empty')]))


def test_the_corpora_of_every_machine_are_there():
  first = {name: next(iter(read())) for name, read in CORPORA.items()}
  contents = [(document.text, document.token_ids) for document in first.values()]
  assert all(map(any, contents))


def test_a_tokenizer_needs_room_for_the_bytes(tmp_path):
  with pytest.raises(ValueError, match='vocab_size of at least 300'):
    train_tokenizer([], 100, tmp_path)


# --- Packing -------------------------------------------------------------------------------------


def _documents(sizes):
  rng = np.random.default_rng(0)
  for index, size in enumerate(sizes):
    tokens = (1 + rng.integers(0, 9, size) + 10 * index).tolist()
    yield Encoded(tokens, [True] * size, str(index))


def test_packing_keeps_every_document_whole_and_in_order():
  sizes = [20, 30, 9, 64, 12, 40, 31, 10]
  rows = list(packing.pack(_documents(sizes), 64))
  found = {}
  for tokens, segments, mask in rows:
    assert mask[segments > 0].all() and not mask[segments == 0].any()
    for segment in range(1, segments.max() + 1):
      piece = tokens[segments == segment]
      assert (np.diff(np.flatnonzero(segments == segment)) == 1).all()
      found[int(piece[0] - 1) // 10] = piece.tolist()
  assert found == {i: d.tokens for i, d in enumerate(_documents(sizes))}
  assert len(rows) <= 5  # 216 tokens: four rows would hold them at best


def test_a_long_document_is_cut_into_pieces():
  (document,) = _documents([150])
  rows = list(packing.pack([document], 64))
  joined = np.concatenate([tokens[segments > 0] for tokens, segments, _ in rows])
  assert sorted(joined.tolist()) == sorted(document.tokens)
  assert [int(segments.max()) for _, segments, _ in rows] == [1, 1, 1]


def test_pieces_without_anything_to_learn_are_left_out():
  document = Encoded(list(range(1, 41)), [False] * 40)
  assert list(packing.pack([document], 16)) == []


def test_positions_start_anew_in_every_document():
  segments = np.array([[1, 1, 2, 2, 2, 0]])
  np.testing.assert_array_equal(packing.positions_of(segments), [[0, 1, 0, 1, 2, 0]])


def test_a_corpus_is_a_pure_function_of_step_and_seed(corpus, tokenizer, tmp_path):
  config = DataConfig(sources=(str(corpus),), sequence_length=LENGTH, num_held_out=4)
  made = packing.prepare(config, tokenizer, VOCAB_SIZE, tmp_path / 'data')
  again = packing.prepare(config, tokenizer, VOCAB_SIZE, tmp_path / 'data')
  assert made.facts == again.facts and len(made.held_out) == 4
  num = len(made.tokens)
  epoch = np.concatenate([made.row_ids(step, 1, seed=5) for step in range(num)])
  assert sorted(epoch) == list(range(num))  # every row once
  for step in (0, 3, num):
    jax.tree.map(np.testing.assert_array_equal, made.batch(step, 4, 1), again.batch(step, 4, 1))
  halves = [made.batch(3, 4, 1, rows=slice(i, i + 2)) for i in (0, 2)]
  both = jax.tree.map(lambda *x: np.concatenate(x), *halves)
  jax.tree.map(np.testing.assert_array_equal, both, made.batch(3, 4, 1))
  assert made.token_counts.sum() == made.facts['num_tokens']


def test_prepared_data_is_made_anew_when_its_source_changes(tokenizer, tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for index in range(3):
    (folder / f'{index}.txt').write_text('word1 is 3. ' * 30)
  config = DataConfig(sources=(str(folder),), sequence_length=LENGTH, num_held_out=1)
  first = packing.prepare(config, tokenizer, VOCAB_SIZE, tmp_path / 'data')
  (folder / '3.txt').write_text('word2 is 5. ' * 30)
  second = packing.prepare(config, tokenizer, VOCAB_SIZE, tmp_path / 'data')
  assert second.facts['num_documents'] == first.facts['num_documents'] + 1


def test_prompts_are_the_beginnings_of_answers_or_stretches_of_texts():
  chat = Encoded(list(range(1, 21)), [False] * 8 + [True] * 12)
  text = Encoded(list(range(100, 200)), [True] * 100)
  long_chat = Encoded(list(range(1, 90)), [False] * 80 + [True] * 9)
  prompts = packing.prompts_of([chat, text, long_chat], 3, 10, longest=40)
  assert prompts[0] == list(range(1, 9))
  assert len(prompts) == 2 and len(prompts[1]) == 10
  assert prompts[1] == list(range(prompts[1][0], prompts[1][0] + 10))


def test_what_does_not_fit_the_model_is_named(corpus, tokenizer, tmp_path):
  config = DataConfig(sources=(str(corpus),), sequence_length=LENGTH, num_held_out=4)
  with pytest.raises(ValueError, match='outside the vocabulary of 100'):
    packing.prepare(config, tokenizer, 100, tmp_path / 'data')
  with pytest.raises(ValueError, match='only 24; set data.num_held_out'):
    packing.prepare(
      DataConfig(sources=(str(corpus),), num_held_out=30), tokenizer, VOCAB_SIZE, tmp_path / 'data'
    )
  assert not (tmp_path / 'data').exists()

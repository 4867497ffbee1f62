"""The target writes its own training data: resumable, batched, rows apart, masks right."""

import json

import numpy as np
import pytest

from models.registry import load_model
from train import regenerate
from train.sources import Document
from train.sources import read_sources
from train.tokenize import encode

_CHATS = (
  [('user', 'word1?'), ('assistant', 'old answer')],
  [('system', 'Short.'), ('user', 'word2?'), ('assistant', 'old'), ('user', 'And word3?'),
   ('assistant', 'old too')],
  [('user', 'word4?'), ('assistant', 'x')],
)  # fmt: skip


@pytest.fixture(scope='module')
def loaded(target_folder):
  return load_model(target_folder)


@pytest.fixture(scope='module')
def writer(loaded):
  options = regenerate.Options(
    max_new_tokens=6, temperature=1.0, top_p=None, seed=0, batch_size=2, longest=256
  )
  return regenerate.Writer(loaded, options)


def _documents():
  for index, chat in enumerate(_CHATS):
    turns = tuple({'role': role, 'content': content} for role, content in chat)
    yield Document(f'chat {index}', messages=turns)
  yield Document('text', text='word1 is 3. ' * 12)


def _tasks(loaded):
  return list(regenerate.make_tasks(_documents(), loaded, 8, 20))


def test_every_turn_is_answered_anew_and_only_answers_are_supervised(loaded, writer, tmp_path):
  out = tmp_path / 'own.jsonl'
  tasks = _tasks(loaded)
  written = regenerate.regenerate(tasks, writer, out, show=False)
  records = {record['id']: record for record in map(json.loads, out.read_text().splitlines())}
  assert written == len(tasks) == len(records)
  chat = records['1']
  assert [m['role'] for m in chat['messages']] == [
    'system', 'user', 'assistant', 'user', 'assistant'
  ]  # fmt: skip
  assert 'old' not in [m['content'] for m in chat['messages']]
  assert 6 >= sum(records['0']['loss_mask']) >= 1
  text = records['3.0']
  assert text['loss_mask'][:8] == [0] * 8 and 'messages' not in text
  documents = list(read_sources([str(out)]))
  (example,) = encode(documents[0], loaded.tokenizer)
  assert len(example.tokens) == len(example.loss_mask) and not example.loss_mask[0]


def test_it_goes_on_after_the_last_whole_line(loaded, writer, tmp_path):
  tasks, out = _tasks(loaded), tmp_path / 'own.jsonl'
  regenerate.regenerate(tasks, writer, out, show=False)
  whole = out.read_bytes()
  lines = whole.splitlines(keepends=True)
  out.write_bytes(b''.join(lines[:2]) + lines[2][:20])  # killed while writing
  regenerate.regenerate(tasks, writer, out, show=False)
  assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
  assert regenerate.regenerate(tasks, writer, out, show=False) == 0


def test_an_answer_does_not_depend_on_its_neighbours(writer):
  prompts = [[5, 6, 7], [8, 9, 10, 11]]
  both = writer.answer(prompts, [3, 4])
  assert writer.answer(prompts[1:], [4]) == both[1:]
  assert writer.answer(prompts[1:], [5]) != both[1:]


def test_prompts_without_room_are_left_out(loaded):
  options = regenerate.Options(6, 0.0, None, 0, 2, longest=10)
  tight = regenerate.Writer(loaded, options)
  assert regenerate.write_batch([_tasks(loaded)[1]], tight, [0]) == []


def test_bad_input_is_named(loaded, tmp_path, capsys):
  ids = Document('here', token_ids=(1, 2), loss_mask=(True, True))
  with pytest.raises(ValueError, match='here: token ids cannot be answered anew'):
    list(regenerate.make_tasks([ids], loaded, 8, 20))
  (tmp_path / 'other.jsonl').write_text('{"x": 1}\n')
  with pytest.raises(ValueError, match='was not written by this command'):
    regenerate.finished_records(tmp_path / 'other.jsonl')
  arguments = ['--model', 'nowhere/', '--data', 'stdlib', '--out', str(tmp_path / 'o.jsonl')]
  assert regenerate.main(arguments) == 2
  assert 'regenerate:' in capsys.readouterr().err


def test_the_command_writes_what_was_asked(target_folder, corpus, tmp_path):
  out = tmp_path / 'own.jsonl'
  arguments = ['--model', str(target_folder), '--data', str(corpus), '--out', str(out), '--quiet',
               '--num', '3', '--batch-size', '2', '--max-new-tokens', '6', '--prompt-length', '8',
               '--temperature', '1']  # fmt: skip
  assert regenerate.main(arguments) == 0
  lengths = [len(json.loads(line)['token_ids']) for line in out.read_text().splitlines()]
  assert len(lengths) == 3 and np.max(lengths) <= 14

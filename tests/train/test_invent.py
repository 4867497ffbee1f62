"""A chat model invents what users say: whole turns, each once, the same ones after a restart."""

import dataclasses
import json

import pytest

from models.registry import load_model
from train import invent
from train import regenerate
from train.sources import read_sources


@pytest.fixture(scope='module')
def loaded(target_folder):
  loaded = load_model(target_folder)
  half = frozenset(range(0, loaded.transformer.config.vocab_size, 2))
  return loaded._replace(eos_ids=tuple(sorted(half)))  # else a random model never ends


@pytest.fixture(scope='module')
def writer(loaded):
  options = regenerate.Options(
    max_new_tokens=4, temperature=1.0, top_p=None, seed=0, batch_size=3, longest=256
  )
  return regenerate.Writer(loaded, options)


def test_the_prefix_ends_where_the_user_speaks(loaded):
  tokenizer = loaded.tokenizer
  prefix = invent.user_prefix(tokenizer, 'word1')
  shown = tokenizer.decode(prefix, skip_special_tokens=False)
  assert shown == '<|im_start|>user\nword1'
  whole = tokenizer.encode_chat([{'role': 'user', 'content': 'word1 is'}])
  assert whole[: len(prefix)] == prefix


def test_without_a_template_nothing_is_invented(loaded):
  with pytest.raises(ValueError, match='by a model with a chat template only'):
    invent.user_prefix(dataclasses.replace(loaded.tokenizer, chat_template=None))


def test_half_of_the_turns_begin_freely():
  openings = [invent.choose_opening(number, seed=1) for number in range(400)]
  assert 150 < openings.count('') < 250
  assert set(openings) == {'', *invent.OPENINGS}


def test_turns_are_whole_and_different_and_can_be_answered(loaded, writer, tmp_path):
  out = tmp_path / 'asked.jsonl'
  assert invent.invent_to_file(writer, out, 7, show=False) >= 7
  records = [json.loads(line) for line in out.read_text().splitlines()]
  said = [record['messages'][0]['content'] for record in records]
  assert len(set(said)) == len(said) == 7 and all(said)
  tasks = list(regenerate.make_tasks(read_sources([str(out)]), loaded, 8, 20))
  answered = regenerate.write_batch(tasks[:3], writer, [0, 1, 2])
  assert [m['role'] for m in answered[0]['messages']] == ['user', 'assistant']


def test_it_goes_on_after_the_last_whole_line(writer, tmp_path):
  out = tmp_path / 'asked.jsonl'
  invent.invent_to_file(writer, out, 7, show=False)
  whole = out.read_bytes()
  lines = whole.splitlines(keepends=True)
  out.write_bytes(b''.join(lines[:4]) + lines[4][:9])  # killed while writing
  invent.invent_to_file(writer, out, 7, show=False)
  assert out.read_bytes() == whole
  assert invent.invent_to_file(writer, out, 7, show=False) == 0


def test_a_model_that_never_ends_is_given_up(loaded, writer, tmp_path):
  endless = regenerate.Writer(loaded._replace(eos_ids=()), writer.options)
  with pytest.raises(ValueError, match='30 attempts in a row gave no turn'):
    invent.invent_to_file(endless, tmp_path / 'asked.jsonl', 1, show=False)


def test_bad_input_is_one_line(tmp_path, capsys):
  assert invent.main(['--model', 'nowhere/', '--out', str(tmp_path / 'o.jsonl')]) == 2
  assert capsys.readouterr().err.startswith('invent: ')

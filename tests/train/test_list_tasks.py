"""List tasks: right answers are right, others are not, and ids are those of the tokenizer."""

import numpy as np
import pytest

from models.tokenizer import tokenizer_from_directory
from train import list_tasks
from train.sources import read_sources


def test_every_example_fits_and_its_answer_is_right():
  for example in list_tasks.examples(300, 0):
    assert list_tasks.is_right(example, example.answer)
    canvas = list_tasks.canvas_of(example)
    assert len(canvas) == list_tasks.CANVAS and canvas[-1] == list_tasks.EOS_ID
    assert list_tasks.to_words(canvas) == example.answer
    if example.task != 'copy':
      assert not list_tasks.is_right(example, example.line) or example.task == 'sort'
    assert not list_tasks.is_right(example, example.answer[:-1])
    assert not list_tasks.is_right(example, ('a',) * len(example.answer))


def test_what_leaves_a_choice_takes_any_of_them():
  rng = np.random.default_rng(0)
  example = list_tasks.make_example('insert_random', rng, 4)
  answers = list_tasks.possible_answers(example)
  assert len(set(answers)) == 5 and all(list_tasks.is_right(example, a) for a in answers)
  line = example.line
  shuffle = list_tasks.make_example('shuffle', rng, 4)
  assert list_tasks.is_right(shuffle, shuffle.line[::-1])
  assert not list_tasks.is_right(shuffle, shuffle.line[:2] * 2)
  assert example.item is not None
  two = (example.item, *line, example.item)
  assert not list_tasks.is_right(example, two)


def test_ids_are_the_tokenizers():
  tokenizer = tokenizer_from_directory(list_tasks.TOKENIZER)
  assert tokenizer.vocab_size == len(list_tasks.VOCABULARY)
  assert tokenizer.eos_ids == (list_tasks.EOS_ID,)
  for example in list_tasks.examples(20, 1):
    ids = list_tasks.to_ids(example.prompt)
    assert list(tokenizer.encode(' '.join(example.prompt))) == ids


def test_the_corpus_has_every_task(monkeypatch):
  monkeypatch.setattr(list_tasks, 'NUM_DOCUMENTS', 20)
  documents = list(read_sources(['list_tasks']))
  assert len(documents) == 20
  for document in documents:
    assert document.token_ids is not None and document.loss_mask is not None
    assert sum(document.loss_mask) == list_tasks.CANVAS


def test_an_unknown_task_is_refused():
  with pytest.raises(ValueError, match='task'):
    list_tasks.make_example('juggle', np.random.default_rng(0))

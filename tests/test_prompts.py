"""The prompt file that the experiments use by default is well-formed."""

import collections
import json
import pathlib

import pytest

_PATH = pathlib.Path(__file__).resolve().parent.parent / 'experiments' / 'prompts' / 'default.jsonl'
_CATEGORIES = (
  'chat',
  'code-writing',
  'code-editing',
  'summarising',
  'extraction',
  'translation',
  'maths',
  'structured-output',
)
_PER_CATEGORY = 6
_MAX_CHARACTERS = 1700  # about 420 tokens


@pytest.fixture(scope='module')
def prompts():
  lines = _PATH.read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


def test_each_category_has_its_prompts(prompts):
  counts = collections.Counter(prompt['category'] for prompt in prompts)
  assert counts == dict.fromkeys(_CATEGORIES, _PER_CATEGORY)


def test_categories_take_turns(prompts):
  # So that the first N prompts are a fair sample of all of them.
  assert tuple(p['category'] for p in prompts) == _CATEGORIES * _PER_CATEGORY


def test_each_prompt_is_well_formed(prompts):
  for prompt in prompts:
    assert prompt.keys() == {'question_id', 'category', 'turns'}
    assert isinstance(prompt['question_id'], int)
    assert prompt['turns'] and all(isinstance(turn, str) for turn in prompt['turns'])
    assert all(turn == turn.strip() != '' for turn in prompt['turns'])


def test_prompts_are_distinct(prompts):
  ids = [prompt['question_id'] for prompt in prompts]
  assert ids == sorted(set(ids))
  assert len({tuple(prompt['turns']) for prompt in prompts}) == len(prompts)


def test_prompts_are_short_enough_to_prefill_quickly(prompts):
  too_long = {
    prompt['question_id']: length
    for prompt in prompts
    if (length := sum(map(len, prompt['turns']))) > _MAX_CHARACTERS
  }
  assert too_long == {}


def test_prompts_to_copy_from_hold_what_is_copied(prompts):
  for prompt in prompts:
    text = prompt['turns'][0]
    if prompt['category'] == 'summarising':
      assert len(text.split()) >= 120, prompt['question_id']
    elif prompt['category'] == 'extraction':
      assert len(text.split()) >= 80, prompt['question_id']
    elif prompt['category'] == 'code-editing':
      _, fence, code = text.partition('```')
      assert fence and len(code.splitlines()) >= 15, prompt['question_id']

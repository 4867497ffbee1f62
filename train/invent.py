"""Has a chat model invent the users' turns itself, for training data that begins with nothing.

  python -m train.invent --model smollm2-135m-instruct --num 1400 --out asked.jsonl
  python -m train.regenerate --model smollm2-135m-instruct --data asked.jsonl --out own.jsonl

The model is given its template up to where a user speaks, and goes on from there; every other time
from an opening, so that code, translation and the like come up too. What does not end by itself, is
empty or was asked before is left out. A line of the result is a conversation with one turn, which
`train.regenerate` answers. Started again, it goes on after the last line that is whole.

Source: Magpie, arXiv:2406.08464, section 2, without its filters by a second model.
"""

from collections.abc import Iterator, Sequence
import json
import pathlib
import sys

import numpy as np

from models.registry import load_model
from models.tokenizer import Tokenizer
from train.command import exit_code
from train.command import writer_parser
from train.regenerate import Options
from train.regenerate import Progress
from train.regenerate import Writer
from train.regenerate import finished_records

OPENINGS = (
  'Write a Python function that', 'Here is some code:\n```python\ndef', 'Fix the bug in this',
  'Summarize the following text:', 'Read this passage and answer the question.', 'Translate the',
  'How many', 'A store sells', 'Give me a JSON object', 'Make a table of', 'Explain how', 'What is',
  'Write a short story about', 'Write an email to', 'List five', 'Why do',
)  # fmt: skip
MAX_BARREN = 10  # batches without a new turn, until it is given up
_MARK = '\N{OBJECT REPLACEMENT CHARACTER}'  # stands for what the user says


def user_prefix(tokenizer: Tokenizer, opening: str = '') -> list[int]:
  """Returns the ids of the chat template up to where a user speaks, then of the opening.

  Raises:
    ValueError: if the template does not show what the user says.
  """
  text = tokenizer.apply_chat_template([{'role': 'user', 'content': _MARK}], True)
  before, mark, _ = text.partition(_MARK)
  if not mark or tokenizer.chat_template is None:
    raise ValueError("users' turns can be invented by a model with a chat template only")
  return tokenizer.encode(before + opening, add_special_tokens=False)


def choose_opening(number: int, seed: int) -> str:
  """Returns the opening of the invention of this number: none half of the time."""
  rng = np.random.default_rng((seed, number))
  return '' if rng.random() < 0.5 else OPENINGS[rng.integers(len(OPENINGS))]


def invent(writer: Writer, first: int, num: int) -> Iterator[dict | None]:
  """Yields for each number from `first` on a conversation of one turn, or None if it never ended.

  Args:
    writer: the model; its options say how turns are drawn.
    first: the first number. A number and the seed decide what is invented.
    num: how many, at most the writer's batch size.
  """
  tokenizer, stops = writer.loaded.tokenizer, set(writer.loaded.eos_ids)
  numbers = range(first, first + num)
  openings = [choose_opening(number, writer.options.seed) for number in numbers]
  said = writer.answer([user_prefix(tokenizer, opening) for opening in openings], numbers)
  for number, opening, ids in zip(numbers, openings, said, strict=True):
    text = (opening + tokenizer.decode(ids)).strip()
    whole = ids[-1] in stops and len(text) > len(opening)
    yield {'id': number, 'messages': [{'role': 'user', 'content': text}]} if whole else None


def invent_to_file(writer: Writer, out: pathlib.Path, num: int, *, show: bool = True) -> int:
  """Appends to `out` until it holds `num` different turns; returns how many attempts that took.

  Raises:
    ValueError: if the file is not this command's, or hardly any attempt gives a new turn.
  """
  records = finished_records(out)
  known = {record['messages'][0]['content'] for record in records}
  start = 1 + max((record['id'] for record in records), default=-1)
  number, size, barren = start, writer.options.batch_size, 0
  progress = Progress(num, len(known), show)
  out.parent.mkdir(parents=True, exist_ok=True)
  with open(out, 'a', encoding='utf-8') as file:
    while len(known) < num:
      before = len(known)
      for record in invent(writer, number, size):
        text = record and record['messages'][0]['content']
        if text and text not in known and len(known) < num:
          known.add(text)
          file.write(json.dumps(record) + '\n')
      file.flush()
      number += size
      barren = barren + 1 if len(known) == before else 0
      if barren == MAX_BARREN:
        raise ValueError(f'{barren * size} attempts in a row gave no turn that was new and whole')
      progress.show(len(known))
  progress.end()
  return number - start


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('invent', lambda: _invent(args))


def _invent(args):
  loaded = load_model(args.model)
  user_prefix(loaded.tokenizer)
  options = Options(
    args.max_new_tokens, args.temperature, args.top_p, args.seed, args.batch_size,
    loaded.transformer.config.max_position,
  )  # fmt: skip
  invent_to_file(Writer(loaded, options), args.out, args.num, show=not args.quiet)


def _parser():
  parser = writer_parser('invent', "Have a model invent the users' turns itself.", batch_size=64)
  parser.add_argument('--num', type=int, default=1000, help='how many different turns')
  parser.add_argument('--max-new-tokens', type=int, default=80, help='longer ones are left out')
  parser.add_argument('--temperature', type=float, default=0.9)
  parser.add_argument('--top-p', type=float, help='costs a sort of the vocabulary a token')
  return parser


if __name__ == '__main__':
  sys.exit(main())

"""Shows what a model is trained on: token by token, the supervised ones highlighted.

  python -m train.inspect_data --config tiny_target
  python -m train.inspect_data --data chats.jsonl --tokenizer smollm2-135m-instruct --num 3

Look at it before a long run. In a conversation only the assistant's turns must be marked, each with
the token that ends it. A supervised fraction near 1 on conversations is a wrong mask.
"""

import argparse
from collections.abc import Iterator, Sequence
import itertools
import sys
import tempfile

import rich.console
import rich.text

from models.tokenizer import Tokenizer
from train import packing
from train.command import exit_code
from train.config import DEFAULT_SOURCES
from train.config import DataConfig
from train.config import load_config
from train.config import override
from train.sources import read_sources
from train.tokenize import Encoded
from train.tokenize import encode
from train.tokenize import train_tokenizer

_SUPERVISED, _CONTEXT = 'black on green', 'dim'


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('inspect_data', lambda: _inspect(args))


def _inspect(args):
  console = rich.console.Console(highlight=False)
  data, tokenizer = _load(args)
  shown = itertools.islice(_examples(data, tokenizer), args.skip, args.skip + args.num)
  for example in shown:
    show(console, example, tokenizer, args.max_tokens)


def show(
  console: rich.console.Console, example: Encoded, tokenizer: Tokenizer, max_tokens: int
) -> None:
  """Prints one example: where it is from, its counts, its tokens."""
  supervised = sum(map(bool, example.loss_mask))
  console.print(
    f'{example.where}: {len(example.tokens)} tokens, {supervised} supervised '
    f'({supervised / len(example.tokens):.0%})',
    style='bold', markup=False, soft_wrap=True,
  )  # fmt: skip
  console.print(render(example, tokenizer, max_tokens), soft_wrap=True)
  if len(example.tokens) > max_tokens:
    console.print(f'... {len(example.tokens) - max_tokens} more tokens', style=_CONTEXT)
  if console.color_system is None:  # no colours: say it in words
    console.print(f'supervised: {supervised_text(example, tokenizer)!r}', markup=False)


def render(example: Encoded, tokenizer: Tokenizer, max_tokens: int) -> rich.text.Text:
  """Returns the text of the first tokens, the supervised ones in another style."""
  text = rich.text.Text()
  pairs = zip(example.tokens[:max_tokens], example.loss_mask, strict=False)
  for supervised, group in itertools.groupby(pairs, key=lambda pair: bool(pair[1])):
    ids = [token for token, _ in group]
    piece = tokenizer.decode(ids, skip_special_tokens=False)
    text.append(piece, style=_SUPERVISED if supervised else _CONTEXT)
  return text


def supervised_text(example: Encoded, tokenizer: Tokenizer) -> str:
  """Returns the text of the supervised tokens, stretches of them parted by ' | '."""
  pieces = []
  pairs = zip(example.tokens, example.loss_mask, strict=True)
  for supervised, group in itertools.groupby(pairs, key=lambda pair: bool(pair[1])):
    if supervised:
      pieces.append(tokenizer.decode([token for token, _ in group], skip_special_tokens=False))
  return ' | '.join(pieces)


def _load(args) -> tuple[DataConfig, Tokenizer]:
  if args.config:
    config = override(load_config(args.config), args.set)
    data, name = config.data, args.tokenizer or config.data.tokenizer or config.target
  else:
    data, name = DataConfig(sources=tuple(args.data or DEFAULT_SOURCES)), args.tokenizer
  if name:
    return data, packing.named_tokenizer(name)
  with tempfile.TemporaryDirectory() as folder:  # as the run would, trained on the data itself
    return data, train_tokenizer(read_sources(data.sources), data.vocab_size, folder)


def _examples(data, tokenizer) -> Iterator[Encoded]:
  for document in read_sources(data.sources):
    yield from encode(document, tokenizer)


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m train.inspect_data', description='Show training data and its loss mask.'
  )
  parser.add_argument('--config', metavar='NAME|FILE.py', help='the data of a configuration')
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE')
  parser.add_argument('--data', nargs='+', metavar='PATH', help='files, folders, or named corpora')
  parser.add_argument('--tokenizer', default='', metavar='NAME|DIR', help="a model's")
  parser.add_argument('--num', type=int, default=3, help='examples to show (default 3)')
  parser.add_argument('--skip', type=int, default=0, help='examples to skip (default 0)')
  parser.add_argument('--max-tokens', type=int, default=400, help='of each (default 400)')
  return parser


if __name__ == '__main__':
  sys.exit(main())

"""What the command lines share: options, models and prompts by name, errors, interruption."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import difflib
import functools
import json
import os
import pathlib
import shlex
import signal
import sys
import threading
from typing import Any, NamedTuple, NoReturn
import zlib

import jax

from experiments.errors import UserError as UserError
from experiments.methods import METHODS
from experiments.methods import Setup
from experiments.methods import default_methods
from models.heads import head_for_decoding
from models.registry import DEFAULT_MODEL
from models.registry import KNOWN_MODELS
from models.registry import load_model
from train.export import load_head

HEADS_DIRECTORY = pathlib.Path(__file__).parent / 'heads'
PROMPTS_DIRECTORY = pathlib.Path(__file__).parent / 'prompts'
DEFAULT_PROMPTS = PROMPTS_DIRECTORY / 'default.jsonl'
USAGE_EXIT = 2
_MAX_ROW_ID = 2**31 - 1
_MAX_SEED = 2**31 - 1


class Prompt(NamedTuple):
  """A prompt as its file has it."""

  id: int | str
  category: str
  text: str
  row_id: int  # tells its random numbers from those of the others


# --- Running -----------------------------------------------------------------------------------


def run(program: str, main: Callable[[], int]) -> int:
  """Returns the exit code of `main`; errors a user can mend become one line on stderr."""
  try:
    with _signals_interrupt():
      return main()
  except UserError as error:
    print(f'{program}: {" ".join(str(error).split())}', file=sys.stderr)
    return USAGE_EXIT
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    print(
      f'{program}: out of memory; lower --batch-size or --max-new-tokens, or take a smaller model',
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt as interrupt:
    print(f'\n{program}: interrupted', file=sys.stderr)
    return exit_code_of(interrupt)
  except BrokenPipeError:  # the reader went away: nobody is left to tell
    sys.stdout = open(os.devnull, 'w')
    return 128 + signal.SIGPIPE


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
  """Returns 128 plus the number of the signal that interrupted, as shells do."""
  return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _signals_interrupt():
  """SIGTERM interrupts as Ctrl-C does, and both do so in background jobs too."""

  def interrupt(number, frame):
    del frame
    raise KeyboardInterrupt(number)

  return _handling(interrupt)


def uninterrupted() -> contextlib.AbstractContextManager[None]:
  """Returns a context that ignores SIGINT and SIGTERM: for the moments of writing results."""
  return _handling(signal.SIG_IGN)


@contextlib.contextmanager
def _handling(handler):
  if threading.current_thread() is not threading.main_thread():  # only that one gets signals
    yield
    return
  numbers = (signal.SIGINT, signal.SIGTERM)
  old = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, before in old.items():
      signal.signal(number, before)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Turns what loaders and checks raise about their input into a `UserError`."""
  try:
    yield
  except (ValueError, OSError) as error:
    if isinstance(error, BrokenPipeError):
      raise
    raise UserError(str(error)) from error


# --- Options -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are one line and name what was probably meant."""

  def error(self, message: str) -> NoReturn:
    """Raises `UserError`."""
    raise UserError(f'{message}. See --help.')

  def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Returns the options; unknown ones are an error with the nearest known name."""
    known, unknown = self.parse_known_args(args, namespace)
    if unknown:
      options = [option for action in self._actions for option in action.option_strings]
      name = unknown[0].split('=')[0]
      raise UserError(f'unknown argument {name!r}{nearest_text(name, options)}. See --help.')
    return known


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that say how tokens are drawn."""
  group = parser.add_argument_group('sampling')
  group.add_argument(
    '--temperature', type=at_least(0.0), default=0.0, metavar='T', help='0 is greedy (default 0)'
  )
  group.add_argument(
    '--top-p', type=_probability, metavar='P', help='keep the likeliest tokens of this mass'
  )
  group.add_argument('--top-k', type=at_least(1), metavar='K', help='keep the K likeliest tokens')
  group.add_argument(
    '--seed', type=at_least(0, _MAX_SEED), default=0, metavar='S', help='default 0'
  )


def add_model_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that name models."""
  parser.add_argument(
    '--model',
    default=DEFAULT_MODEL,
    metavar='NAME|DIR|FILE.gguf',
    help=f"a known name, a Hugging Face directory or Hub id 'org/name', or a GGUF file "
    f'(default {DEFAULT_MODEL})',
  )
  parser.add_argument(
    '--draft', metavar='NAME|DIR|FILE.gguf', help='a draft model, for draft-model'
  )
  parser.add_argument(
    '--head',
    metavar='DIR',
    help='a head trained for the model (train.main), for methods that need one and for trees (for '
    'the first one comes along with the default model)',
  )
  parser.add_argument(
    '--num-drafts', type=at_least(1), metavar='N', help="tokens drafted a round (each method's own)"
  )
  parser.add_argument(
    '--exit-layer', type=at_least(1), metavar='L', help='layers that draft, for early-exit (3/4)'
  )


def at_least(least: int | float, most: float = float('inf')) -> Callable[[str], Any]:
  """Returns an argparse type: finite numbers of the kind of `least`, from `least` to `most`."""
  kind = type(least)

  def parse(text):
    try:
      value = kind(text)
    except ValueError:
      value = None
    if value is None or not least <= value <= most or value == float('inf'):
      name = 'an integer' if kind is int else 'a number'
      limits = f'of at least {least:g}' if most == float('inf') else f'from {least:g} to {most}'
      raise argparse.ArgumentTypeError(f'{text!r} is not {name} {limits}')
    return value

  return parse


def _probability(text):
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value <= 1:
    raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0 and at most 1')
  return value


def nearest_text(name: str, valid: Iterable[str], *, show_all: bool = False) -> str:
  """Returns '; nearest: a, b', or '' if nothing is near (with `show_all`, all that is valid)."""
  valid = list(valid)
  near = difflib.get_close_matches(name, valid, cutoff=0.6)
  if near:
    return f'; nearest: {", ".join(near)}'
  return f'; valid are: {", ".join(valid)}' if show_all and valid else ''


def choose_methods(names: str | None, args: argparse.Namespace) -> list[str]:
  """Returns the methods asked for, or the default ones; each once.

  Args:
    names: comma-separated; None is the default ones.
    args: the options of `add_model_options`, and the temperature.

  Raises:
    UserError: for an unknown method, or one whose weights are missing.
  """
  has_draft = args.draft is not None
  has_head = args.head is not None or shipped_head(args.model) is not None
  if names is None:
    return default_methods(args.temperature, has_draft=has_draft, has_head=has_head)
  chosen = list(dict.fromkeys(name.strip() for name in names.split(',') if name.strip()))
  if not chosen:
    raise UserError(f'no method named; valid are: {", ".join(METHODS)}')
  for name in chosen:
    if name not in METHODS:
      raise UserError(f'unknown method {name!r}{nearest_text(name, METHODS, show_all=True)}')
    if METHODS[name].needs_draft and not has_draft:
      raise UserError(f'method {name!r} needs the weights of a draft model: give --draft')
    if METHODS[name].needs_head and not has_head:
      raise UserError(f'method {name!r} needs a head trained for the model: give --head')
  return chosen


# --- Models and prompts ------------------------------------------------------------------------


def load_setup(args: argparse.Namespace, progress: Callable[[str], None]) -> Setup:
  """Returns what methods are built from, as the options of `add_model_options` say.

  Args:
    args: the options.
    progress: called with the name of each stage.

  Raises:
    UserError: if a model is unknown, missing or damaged.
  """
  target = _load(args.model, progress)
  draft = None if args.draft is None else _load(args.draft, progress)
  shipped = shipped_head(args.model)
  head = None if args.head is None else _load_head(args.head, target.transformer)
  own = shipped and functools.cache(functools.partial(_load_head, shipped, target.transformer))
  texts = functools.partial(_sample_texts, target)
  return Setup(target, draft, args.num_drafts, args.exit_layer, head, own, texts)


def _load_head(folder, target):
  with user_errors():
    loaded = load_head(folder, target)
    return loaded._replace(head=head_for_decoding(loaded.head, target))


def shipped_head(model: str) -> pathlib.Path | None:
  """Returns the folder of the head that comes along for a model known by name, or None."""
  folder = HEADS_DIRECTORY / model.lower()
  return folder if model.lower() in KNOWN_MODELS and folder.is_dir() else None


def _sample_texts(target):
  """Returns the project's own prompts as token ids, as far as they fit the model."""
  texts = [encode_prompt(target.tokenizer, prompt.text) for prompt in read_prompts(DEFAULT_PROMPTS)]
  return [text for text in texts if len(text) <= target.transformer.config.max_position]


def _load(name, progress):
  try:
    with user_errors():
      return load_model(name, progress=lambda stage: progress(f'{name}: {stage}'))
  except UserError as error:
    path = pathlib.Path(name).expanduser()
    if path.exists() or not isinstance(error.__cause__, FileNotFoundError):
      raise
    raise UserError(f'{error}{_nearest_path(path, _looks_like_model)}') from error


def _looks_like_model(path):
  return path.suffix == '.gguf' or (path / 'config.json').exists()


def _nearest_path(path, accept):
  """Returns '; nearest: ...' with files of the folder that `path` would be in."""
  folder = path.parent
  found = sorted(folder.iterdir()) if folder.is_dir() else []
  names = {str(each.name): str(each) for each in found if accept(each)}
  near = difflib.get_close_matches(path.name, names, cutoff=0.4)
  return f'; nearest: {", ".join(names[name] for name in near)}' if near else ''


def read_prompts(path: str | pathlib.Path, limit: int | None = None) -> list[Prompt]:
  """Returns the prompts of a JSONL file: the first turn of each, the first `limit` of them.

  A line is an object with `turns` (a list of texts) and, if wanted, `question_id` and `category`.

  Raises:
    UserError: if there is no such file, or a line of it is malformed.
  """
  path = pathlib.Path(path).expanduser()
  try:
    lines = path.read_text(encoding='utf-8-sig').split('\n')  # not at U+2028, as splitlines does
  except FileNotFoundError:
    near = _nearest_path(path, lambda each: each.suffix == '.jsonl')
    near = near or _nearest_path(PROMPTS_DIRECTORY / path.name, lambda e: e.suffix == '.jsonl')
    near = near or f'; the prompts that come along are {DEFAULT_PROMPTS}'
    raise UserError(f'no such prompt file: {path}{near}') from None
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read the prompts {path}: {error}') from error
  prompts, first_line = [], {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    if limit is not None and len(prompts) == limit:
      break
    prompt = _parse_prompt(line, f'{path}, line {number}', number)
    if prompt.id in first_line:
      raise UserError(
        f'{path}, line {number}: question_id {prompt.id!r} is already on line '
        f'{first_line[prompt.id]}; ids must differ'
      )
    first_line[prompt.id] = number
    prompts.append(prompt)
  if not prompts:
    raise UserError(f'{path} holds no prompts')
  return prompts


def _parse_prompt(line, where, number):
  try:
    record = json.loads(line)
  except ValueError as error:
    raise UserError(f'{where}: not valid JSON ({error})') from error
  turns = record.get('turns') if isinstance(record, dict) else None
  if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
    raise UserError(f'{where}: expected an object with "turns", a list of texts')
  if not turns[0].strip():
    raise UserError(f'{where}: the first turn is empty')
  prompt_id = record.get('question_id', number)
  if not isinstance(prompt_id, (int, str)) or isinstance(prompt_id, bool):
    raise UserError(f'{where}: question_id must be an integer or a text: {prompt_id!r}')
  category = record.get('category') or 'uncategorised'
  return Prompt(prompt_id, str(category), turns[0], _row_id(prompt_id))


def _row_id(prompt_id):
  """Returns an i32 that depends on nothing but the prompt's id."""
  if isinstance(prompt_id, int) and 0 <= prompt_id <= _MAX_ROW_ID:
    return prompt_id
  return zlib.crc32(str(prompt_id).encode()) & _MAX_ROW_ID


def check_length(where: str, num_tokens: int, max_new_tokens: int, max_position: int) -> None:
  """Checks that a prompt and its answer fit the model.

  Raises:
    UserError: if they do not.
  """
  if num_tokens + max_new_tokens > max_position:
    room = max_position - num_tokens
    mend = f'--max-new-tokens to at most {room}' if room > 0 else 'the prompt itself'
    raise UserError(
      f'{where} is too long: {num_tokens} tokens and --max-new-tokens {max_new_tokens} make '
      f'{num_tokens + max_new_tokens}, but the model has {max_position} positions. Shorten {mend}, '
      'or take a model with more positions.'
    )


def encode_prompt(tokenizer, text: str) -> list[int]:
  """Returns the token ids of a user's turn, in the model's chat template if it has one.

  Raises:
    UserError: if the model has no tokenizer, or its template refuses.
  """
  with user_errors():
    return tokenizer.encode_chat([{'role': 'user', 'content': text}])


def command_line(module: str, argv: Sequence[str] | None) -> str:
  """Returns the command that starts a module with these arguments."""
  return shlex.join(['python', '-m', module, *(sys.argv[1:] if argv is None else argv)])

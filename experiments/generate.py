"""Streams a model's answer to one prompt, decoded by any method.

  python -m experiments.generate "Write a haiku about the sea."
  python -m experiments.generate --method ngram --max-new-tokens 300 < prompt.txt

The answer goes to stdout; everything else, the closing line of statistics included, to stderr.
"""

from collections.abc import Iterator, Sequence
import shutil
import signal
import sys
import time
from typing import NamedTuple

import jax
import numpy as np

import decodax
from decodax.types import DecodeState
from decodax.types import Params
from decodax.types import Request
from decodax.types import Result
from decodax.types import Verifier
from experiments import cli
from experiments.methods import METHODS
from experiments.methods import PLAIN
from experiments.methods import Decoder

_DEFAULT_NEW_TOKENS = 256


class Round(NamedTuple):
  """What one round of the loop gave."""

  tokens: list[int]
  result: Result
  seconds: float


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 if decoding failed, 2 for wrong options, 128 + signal if cut."""
  return cli.run('generate', lambda: _main(argv))


def _main(argv):
  args = _parser().parse_args(argv)
  name = _one_method(args)
  text = _read_prompt(args.prompt)
  try:
    return _answer(args, name, text)
  except BaseException:
    _tell('')
    raise


def _answer(args, name, text):
  _tell('loading the model')
  setup = cli.load_setup(args, _tell)
  target = setup.target
  with cli.user_errors():
    tokens = (
      target.tokenizer.encode(text) if args.raw else cli.encode_prompt(target.tokenizer, text)
    )
  request = _make_request(args, tokens, target)
  method = METHODS[name]
  with cli.user_errors():
    decoder = method.build(setup)
  _tell('compiling')
  rounds = stream(decoder, method.verifier_for(setup), request)
  return _print_stream(rounds, target.tokenizer.stream(), name)


def _parser():
  parser = cli.Parser(
    prog='python -m experiments.generate',
    description="Stream a model's answer to one prompt, decoded by any method.",
  )
  parser.add_argument('prompt', nargs='?', help='default: read from stdin')
  cli.add_model_options(parser)
  parser.add_argument(
    '--method', default=PLAIN, metavar='NAME', help=f'{", ".join(METHODS)} (default {PLAIN})'
  )
  parser.add_argument(
    '--max-new-tokens', type=cli.at_least(1), metavar='N',
    help=f'default {_DEFAULT_NEW_TOKENS}, or what the model has room for',
  )  # fmt: skip
  parser.add_argument('--raw', action='store_true', help='leave out the chat template')
  cli.add_sampling_options(parser)
  return parser


def _one_method(args):
  names = cli.choose_methods(args.method, args)
  if len(names) > 1:
    raise cli.UserError(f'--method takes one method: {args.method!r}')
  return names[0]


def _read_prompt(text):
  if text is None:
    if sys.stdin.isatty():
      print('Type a prompt, then Ctrl-D on a line of its own:', file=sys.stderr)
    text = sys.stdin.read()
  if not text.strip():
    raise cli.UserError('the prompt is empty')
  return text


def _make_request(args, tokens, target):
  config = target.transformer.config
  room = config.max_position - len(tokens)
  budget = args.max_new_tokens or max(1, min(_DEFAULT_NEW_TOKENS, room))
  cli.check_length('the prompt', len(tokens), budget, config.max_position)
  with cli.user_errors():
    return decodax.make_request(
      [tokens],
      max_new_tokens=budget,
      vocab_size=config.vocab_size,
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      eos_ids=target.eos_ids,
      seed=args.seed,
    )


def stream(decoder: Decoder, verifier: Verifier, request: Request) -> Iterator[Round]:
  """Yields the rounds of decoding a request of one row, as they come.

  The first item says how long reading the prompt took and has no tokens. Nothing compiles after it.
  """
  model, drafter, params = decoder
  step_fn = decodax.make_step_fn(model=model, drafter=drafter, verifier=verifier)

  def step(params: Params, state: DecodeState):
    state, info = step_fn(params, state)
    # Copies: the state is given up to the next round.
    return state, (info.tokens[0], info.num_emitted[0], state.result[0])

  compiled_read = jax.jit(decoder.read).lower(params, request).compile()
  blank = jax.eval_shape(decoder.read, params, request)
  compiled_step = jax.jit(step, donate_argnums=1).lower(params, blank).compile()

  start = time.perf_counter()
  state = jax.block_until_ready(compiled_read(params, request))
  result = Result.RUNNING
  yield Round([], result, time.perf_counter() - start)
  while result == Result.RUNNING:
    start = time.perf_counter()
    state, shown = compiled_step(params, state)
    tokens, num_emitted, code = jax.device_get(shown)
    result = Result(int(code))
    yield Round(np.asarray(tokens[:num_emitted]).tolist(), result, time.perf_counter() - start)


def _print_stream(rounds, text_stream, name):
  """Prints the answer and its statistics; returns the exit code."""
  tokens, calls, seconds, prefill = 0, 0, 0.0, None
  result, code = Result.RUNNING, 0
  try:
    for each in rounds:
      if prefill is None:
        prefill = each.seconds
        _tell('')
        continue
      tokens, calls, seconds = tokens + len(each.tokens), calls + 1, seconds + each.seconds
      result = each.result
      print(text_stream.push(each.tokens), end='', flush=True)
  except KeyboardInterrupt as interrupt:
    code = cli.exit_code_of(interrupt)
  _tell('')
  print(text_stream.finish(), flush=True)
  if prefill is None:
    raise KeyboardInterrupt(code - 128)
  rates = f', {tokens / calls:.2f} tokens/call, {tokens / seconds:.1f} tokens/s' if calls else ''
  print(
    f'[{name}: {tokens} tokens, {calls} calls{rates}; prompt read in {prefill:.2f} s; '
    f'{_ending(result, code)}]',
    file=sys.stderr,
  )
  return 1 if result == Result.NON_FINITE else code


def _ending(result, code):
  if code:
    return f'interrupted by {signal.Signals(code - 128).name}'
  return {
    Result.EOS: 'the model ended its answer',
    Result.LENGTH: 'cut at --max-new-tokens',
    Result.CAPACITY: 'cut: no room left',
    Result.NON_FINITE: 'FAILED: the logits were not finite',
  }.get(result, '')


def _tell(text):
  """Shows a stage on one line of stderr that the next one overwrites; '' clears it."""
  if sys.stderr.isatty():
    text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps is not cleared
    print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)


if __name__ == '__main__':
  sys.exit(main())

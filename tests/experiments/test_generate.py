"""Streaming one answer: the text of plain decoding, piece by piece, then one line of numbers."""

import io
import re
import sys

import pytest

from experiments import cli
from experiments import generate
from models.tokenizer import TextStream

PROMPT = 'abc abc abc'


def ask(model, capsys, *more):
  """Returns (exit code, the answer, the line of statistics)."""
  code = generate.main(['--model', str(model), '--max-new-tokens', '24', *more])
  captured = capsys.readouterr()
  return code, captured.out, captured.err.strip()


def test_every_method_streams_the_same_text(tiny_model, capsys):
  code, answer, line = ask(tiny_model, capsys, PROMPT)
  assert code == 0 and answer.endswith('\n') and len(answer) > 1
  found = re.fullmatch(
    r'\[plain: (\d+) tokens, (\d+) calls, 1\.00 tokens/call, [\d.]+ tokens/s; '
    r'prompt read in [\d.]+ s; (cut at --max-new-tokens|the model ended its answer)\]',
    line,
  )
  assert found and found[1] == found[2]
  code, again, line = ask(tiny_model, capsys, '--method', 'ngram', PROMPT)
  assert (code, again) == (0, answer)
  assert line.startswith('[ngram: ')


def test_the_prompt_may_come_from_stdin(tiny_model, capsys, monkeypatch):
  _, answer, _ = ask(tiny_model, capsys, PROMPT)
  monkeypatch.setattr(sys, 'stdin', io.StringIO(PROMPT))
  assert ask(tiny_model, capsys)[:2] == (0, answer)


def test_the_template_can_be_left_out(tiny_model, capsys, monkeypatch):
  seen = []
  make_request = generate._make_request
  monkeypatch.setattr(
    generate, '_make_request', lambda args, tokens, target: seen.append(len(tokens))
    or make_request(args, tokens, target),
  )  # fmt: skip
  ask(tiny_model, capsys, PROMPT)
  ask(tiny_model, capsys, '--raw', PROMPT)
  assert seen[1] == len(PROMPT) < seen[0]


def test_a_prompt_that_does_not_fit(tiny_model, capsys):
  code, _, line = ask(tiny_model, capsys, 'x' * 300)
  assert code == 2 and 'the prompt is too long' in line and len(line.splitlines()) == 1


def test_half_a_character_is_never_printed():
  class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids, *, skip_special_tokens):
      del skip_special_tokens
      return bytes(ids).decode(errors='replace')

  stream = TextStream(Bytes())  # pyright: ignore[reportArgumentType]
  text = 'naïve 漢字 🙂.'
  rounds = [generate.Round([], generate.Result.RUNNING, 0.1)]
  rounds += [generate.Round([byte], generate.Result.RUNNING, 0.1) for byte in text.encode()]
  out = Recorder()
  stdout, sys.stdout = sys.stdout, out
  try:
    assert generate._print_stream(iter(rounds), stream, 'test') == 0
  finally:
    sys.stdout = stdout
  assert ''.join(out.pieces) == text + '\n'
  assert not any('\ufffd' in piece for piece in out.pieces)


class Recorder(io.StringIO):
  """A stream that keeps what was written, write by write."""

  def __init__(self):
    super().__init__()
    self.pieces = []

  def write(self, text):
    self.pieces.append(text)
    return len(text)


def test_interruption_ends_with_the_statistics(tiny_model, capsys, monkeypatch):
  stream = generate.stream

  def interrupted(*args):
    for index, each in enumerate(stream(*args)):
      if index == 4:
        raise KeyboardInterrupt
      yield each

  monkeypatch.setattr(generate, 'stream', interrupted)
  code, answer, line = ask(tiny_model, capsys, PROMPT)
  assert code == 130 and answer.endswith('\n')
  assert line.startswith('[plain: 3 tokens, 3 calls') and line.endswith('interrupted by SIGINT]')


@pytest.mark.parametrize('index', [0, 1])
def test_a_model_without_room_is_refused(index, tiny_model, capsys):
  budget = (['--max-new-tokens', '1000'], ['--max-new-tokens', '246'])[index]
  code = generate.main(['--model', str(tiny_model), *budget, '--raw', PROMPT])
  assert code == cli.USAGE_EXIT
  assert 'Shorten --max-new-tokens to at most 245' in capsys.readouterr().err

"""Has the target answer prompts itself, so that a drafter learns from what it will be asked for.

  python -m train.regenerate --model smollm2-135m-instruct --data chats.jsonl --out own.jsonl
  python -m train.regenerate --model runs/tiny_target/export --data stdlib pydoc --out own.jsonl

Every turn of the assistant's is written anew, each after the history of the new ones; a text is cut
into stretches, each continued from its first tokens. A line of the result holds the token ids, as
decoded, with their loss mask, and for conversations the messages too; `train.sources` reads it.
Started again, it goes on after the last line that is whole. A batch is decoded by decodax itself.
"""

from collections.abc import Iterable, Iterator, Sequence
import functools
import itertools
import json
import pathlib
import sys
import time
from typing import NamedTuple

from flax import nnx
import jax
import numpy as np

import decodax
from decodax import drafters
from decodax import verifiers
from models.adapter import as_model
from models.registry import load_model
from models.weights import LoadedModel
from train.command import exit_code
from train.command import writer_parser
from train.export import load_head
from train.sources import Document
from train.sources import read_sources


class Task(NamedTuple):
  """One thing to write: the user's turns of a conversation, or the start of a text."""

  id: str
  history: tuple[dict, ...] = ()  # system and user turns in order, for a conversation
  prompt: tuple[int, ...] = ()  # token ids, for a text


class Options(NamedTuple):
  """How answers are drawn."""

  max_new_tokens: int
  temperature: float
  top_p: float | None
  seed: int
  batch_size: int
  longest: int  # tokens of prompt and answer


class Writer:
  """The target, compiled, answering batches of prompts."""

  def __init__(self, loaded: LoadedModel, options: Options, head: str | None = None):
    self.loaded, self.options = loaded, options
    target = loaded.transformer
    params, drafter, model, verifier = self._method(target, head)
    self._params, self._vocab_size = params, model.vocab_size
    self._decode = jax.jit(
      functools.partial(decodax.decode, model=model, drafter=drafter, verifier=verifier)
    )

  def _method(self, target, head):
    if head is None:
      params = decodax.Params(nnx.state(target))
      return params, drafters.plain(), as_model(target), verifiers.coupled
    found = load_head(head, target)
    objective = found.objective
    if objective.make_drafter is None:
      raise ValueError(f'{head} holds no drafter')
    params = objective.place(nnx.state(target), nnx.state(found.head))
    model = as_model(target, taps=objective.taps(target.config))
    return params, objective.make_drafter(found.head, target), model, objective.verifier

  def answer(self, prompts: Sequence[Sequence[int]], row_ids: Sequence[int]) -> list[list[int]]:
    """Returns what the target writes after each prompt, its stop token included.

    A row's answer depends on its prompt, its id and the seed, not on its neighbours.

    Args:
      prompts: token ids, at most `batch_size` of them.
      row_ids: what tells their random numbers apart.
    """
    options = self.options
    idle = options.batch_size - len(prompts)  # one shape: nothing compiles twice
    request = decodax.make_request(
      [*prompts, *[prompts[0][:1]] * idle],
      max_new_tokens=[options.max_new_tokens] * len(prompts) + [1] * idle,
      vocab_size=self._vocab_size,
      temperature=options.temperature,
      top_p=options.top_p,
      eos_ids=self.loaded.eos_ids,
      seed=options.seed,
      row_ids=[*row_ids, *[0] * idle],
      capacity=_capacity(max(map(len, prompts)) + options.max_new_tokens),
    )
    result = jax.device_get(self._decode(self._params, request))
    return [
      result.tokens[row, result.prompt_length[row] : result.length[row]].tolist()
      for row in range(len(prompts))
    ]


def _capacity(needed):
  return max(128, -(-needed // 128) * 128)


# --- Tasks ---------------------------------------------------------------------------------------


def make_tasks(
  documents: Iterable[Document], loaded: LoadedModel, prompt_length: int, stretch: int
) -> Iterator[Task]:
  """Yields what is to be written, in an order that never changes.

  Args:
    documents: texts and conversations.
    loaded: the target, for its tokenizer.
    prompt_length: tokens of a text that are given.
    stretch: tokens of a text from one start to the next.

  Raises:
    ValueError: for token ids: they have no turns that could be answered anew.
  """
  for index, document in enumerate(documents):
    if document.messages is not None:
      kept = tuple(dict(m) for m in document.messages if m['role'] != 'assistant')
      yield Task(str(index), history=kept)
    elif document.text is not None:
      tokens = loaded.tokenizer.encode(document.text)
      for part, start in enumerate(range(0, max(len(tokens) - prompt_length, 0), stretch)):
        prompt = tuple(tokens[start : start + prompt_length])
        yield Task(f'{index}.{part}', prompt=prompt)
    else:
      raise ValueError(f'{document.where}: token ids cannot be answered anew; give texts')


def write_batch(tasks: Sequence[Task], writer: Writer, row_ids: Sequence[int]) -> list[dict]:
  """Returns one record for every task, turn by turn; a text has one turn."""
  messages = [list[dict]() for _ in tasks]
  tokens: list[list[int]] = [list(task.prompt) for task in tasks]
  masks = [[False] * len(task.prompt) for task in tasks]
  open_turns = [_turns(task) for task in tasks]
  for turn in itertools.count():
    live = [i for i, turns in enumerate(open_turns) if turn < len(turns)]
    live = [
      i for i in live if _prepare(i, turn, tasks, open_turns, messages, tokens, masks, writer)
    ]
    if not live:
      break
    answers = writer.answer([tokens[i] for i in live], [row_ids[i] * 64 + turn for i in live])
    for i, answer in zip(live, answers, strict=True):
      tokens[i] += answer
      masks[i] += [True] * len(answer)
      text = writer.loaded.tokenizer.decode(answer)
      messages[i].append({'role': 'assistant', 'content': text})
  return [
    {'id': task.id, 'token_ids': tokens[i], 'loss_mask': [int(each) for each in masks[i]]}
    | ({'messages': messages[i]} if task.history else {})
    for i, task in enumerate(tasks)
    if any(masks[i])
  ]


def _turns(task):
  """Returns the turns to answer: for each, the messages that come before the answer."""
  if not task.history:
    return [()]
  groups, group = [], []
  for message in task.history:
    group.append(message)
    if message['role'] == 'user':
      groups.append(tuple(group))
      group = []
  return groups


def _prepare(i, turn, tasks, open_turns, messages, tokens, masks, writer):
  """Brings a conversation up to its next answer; returns whether there is room for one."""
  options = writer.options
  if tasks[i].history:
    after = [*messages[i], *open_turns[i][turn]]
    ids = writer.loaded.tokenizer.encode_chat(after)
    if len(ids) + options.max_new_tokens > options.longest:
      return False
    messages[i].extend(open_turns[i][turn])
    same = ids[: len(tokens[i])] == tokens[i]  # else a template rewrote it: only the last counts
    old = masks[i] if same else [False] * min(len(tokens[i]), len(ids))
    masks[i] = (old + [False] * (len(ids) - len(old)))[: len(ids)]
    tokens[i] = ids
  return len(tokens[i]) + options.max_new_tokens <= options.longest


# --- The command ---------------------------------------------------------------------------------


def regenerate(
  tasks: Sequence[Task], writer: Writer, out: pathlib.Path, *, show: bool = True
) -> int:
  """Appends a record to `out` for every task that has none yet; returns how many were written.

  Tasks are taken by length, so that a batch has little padding.
  """
  done = {record['id'] for record in finished_records(out)}
  numbers = {task.id: number for number, task in enumerate(tasks)}
  left = [task for task in tasks if task.id not in done]
  left.sort(key=lambda task: len(task.prompt) or sum(len(m['content']) for m in task.history))
  size, written, tokens = writer.options.batch_size, 0, 0
  progress = Progress(len(tasks), len(done), show)
  out.parent.mkdir(parents=True, exist_ok=True)
  with open(out, 'a', encoding='utf-8') as file:
    for first in range(0, len(left), size):
      batch = left[first : first + size]
      records = write_batch(batch, writer, [numbers[task.id] for task in batch])
      file.writelines(json.dumps(record) + '\n' for record in records)
      file.flush()
      written += len(records)
      tokens += sum(sum(record['loss_mask']) for record in records)
      progress.show(len(done) + first + len(batch), tokens)
  progress.end()
  return written


class Progress:
  """One line of the terminal that says how far a command is."""

  def __init__(self, total: int, done: int, show: bool):
    self._total, self._first, self._shown = total, done, show
    self._start = time.monotonic()

  def show(self, done: int, tokens: int | None = None):
    """Shows how many of all are done, and how long the rest will take at this pace."""
    if not self._shown:
      return
    passed = time.monotonic() - self._start
    left = passed * (self._total - done) / max(done - self._first, 1)
    speed = '' if tokens is None else f', {tokens} tokens, {tokens / passed:.0f} tokens/s'
    print(f'\r{done}/{self._total}{speed}, {left / 60:.0f} min left ', end='', flush=True)

  def end(self):
    """Ends the line."""
    if self._shown:
      print()


def finished_records(out: pathlib.Path) -> list[dict]:
  """Returns the records of a file that has ids, after cutting off a last line that is not whole.

  Raises:
    ValueError: if it holds anything else.
  """
  if not out.exists():
    return []
  data = out.read_bytes()
  whole = data[: data.rfind(b'\n') + 1]
  try:
    records = [json.loads(line) for line in whole.splitlines()]
    if not all('id' in record for record in records):
      raise ValueError('a line has no id')
  except (ValueError, TypeError) as error:
    raise ValueError(f'{out} was not written by this command: {error}') from error
  if len(whole) < len(data):
    out.write_bytes(whole)
  return records


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('regenerate', lambda: _regenerate(args))


def _regenerate(args):
  loaded = load_model(args.model)
  longest = loaded.transformer.config.max_position
  options = Options(
    args.max_new_tokens, args.temperature, args.top_p, args.seed, args.batch_size, longest
  )
  documents = read_sources(args.data)
  stretch = args.stretch or args.prompt_length + args.max_new_tokens
  tasks = list(make_tasks(documents, loaded, args.prompt_length, stretch))
  if args.num is not None and args.num < len(tasks):
    chosen = np.random.default_rng(args.seed).permutation(len(tasks))[: args.num]
    tasks = [tasks[i] for i in sorted(chosen)]
  writer = Writer(loaded, options, args.head)
  regenerate(tasks, writer, args.out, show=not args.quiet)


def _parser():
  parser = writer_parser(
    'regenerate', "Write training data in the target's own words.", batch_size=16
  )
  parser.add_argument('--data', required=True, nargs='+', metavar='PATH', help='prompts')
  parser.add_argument('--head', metavar='DIR', help='an exported head that drafts')
  parser.add_argument('--num', type=int, metavar='N', help='only N of the prompts, drawn at random')
  parser.add_argument('--max-new-tokens', type=int, default=128)
  parser.add_argument('--prompt-length', type=int, default=64, help='tokens given of a text')
  parser.add_argument('--stretch', type=int, help='tokens from one start in a text to the next')
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--top-p', type=float)
  return parser


if __name__ == '__main__':
  sys.exit(main())

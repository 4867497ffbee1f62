"""Has the target decode by Jacobi iteration, and keeps the states it goes through.

  python -m train.trajectories --model runs/tiny_target/export --data stdlib pydoc \
    --num 1200 --out runs/tiny_trajectories.jsonl

A text is cut to a prompt, and the target continues it window by window. Of each window's trajectory
y(0), .., y(K) of states of n tokens, from guesses to the fixed point, one state is kept. A line of
the result is a document for `train.objectives.consistency`: the prompt, then for every window the
state and the fixed point, 2 n tokens. Only these are supervised.

  --choose random       any state before the fixed point (CLLM)
  --choose progressive  window j of w has a share of j / (w - 1) of its tokens unsettled, as near as
                        its trajectory comes to that (Jacobi Forcing)

With --labels demonstration the one window has n more tokens: what the text itself has there, for
targets whose answers may be corrected (CEED-VLA).

Started again, it goes on after the last batch that is whole.

The loop is decodax's own, `drafters.jacobi`: what is trained on is what is decoded.
"""

from collections.abc import Iterator, Sequence
import functools
import json
import pathlib
import sys
import time
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.types import Model
from decodax.types import Params
from decodax.types import Request
from decodax.types import Result
from models.adapter import as_model
from models.registry import load_model
from models.weights import LoadedModel
from train.command import exit_code
from train.command import writer_parser
from train.sources import read_sources
from train.tokenize import encode


class Trajectories(NamedTuple):
  """The states of one window in each row."""

  states: jax.Array  # i32[B, n + 1, n] state by state; from the fixed point on they repeat
  num_rounds: jax.Array  # i32[B] K, the number of calls until the window was settled


class Options(NamedTuple):
  """What is kept."""

  window: int  # n
  num_windows: int
  prompt_length: int
  choose: str = 'random'
  noise_windows: int = 4  # w of the progressive schedule
  demonstrate: bool = False


def trajectories(params: Params, request: Request, *, model: Model, window: int) -> Trajectories:
  """Returns the Jacobi states of the next `window` tokens of every row, greedy.

  State r is what has been settled after r rounds with the drafts behind it, cut to the window; no
  token behind the window can have changed it. The request's budget must be `window` tokens.

  Source: CLLMs, arXiv:2403.00835, section 3.2.1.
  """
  drafter = drafters.jacobi(num_drafts=window)
  step_fn = decodax.make_step_fn(model=model, drafter=drafter, verifier=verifiers.greedy)
  state = decodax.init_state(params, request, model=model, drafter=drafter)
  state = decodax.prefill(params, state, model=model, drafter=drafter)
  batch_size = request.tokens.shape[0]
  guesses, own = drafter.propose(params, state, noise_fn=None, with_laws=False)
  state = state._replace(drafter=own)
  first = guesses.tokens[:, 1:]

  def seen(state):
    """Returns i32[B, n], the emitted tokens of the window and the drafts behind them."""
    index = jnp.broadcast_to(jnp.arange(window)[None], (batch_size, window))
    settled = state.length - state.prompt_length
    start = state.prompt_length[:, None] + index
    text = jnp.take_along_axis(state.tokens, start, axis=1, mode='clip')
    behind = jnp.maximum(index - settled[:, None], 0)
    drafts = jnp.take_along_axis(state.drafter.drafts, behind, axis=1)
    return jnp.where(index < settled[:, None], text, drafts)

  def body(carry):
    state, states, index = carry
    state, _ = step_fn(params, state)
    return state, lax.dynamic_update_slice_in_dim(states, seen(state)[:, None], index, 1), index + 1

  states = jnp.zeros((batch_size, window + 1, window), jnp.int32).at[:, 0].set(first)
  start = (state, states, jnp.int32(1))
  state, states, index = lax.while_loop(
    lambda carry: jnp.any(carry[0].result == Result.RUNNING), body, start
  )
  last = lax.dynamic_index_in_dim(states, index - 1, 1)
  written = (jnp.arange(window + 1) < index)[None, :, None]
  return Trajectories(jnp.where(written, states, last), state.stats.num_target_calls)


def noise_ratios(states: np.ndarray) -> np.ndarray:
  """Returns f64[B, n + 1], for each state the fraction of its tokens from its first wrong one on.

  Args:
    states: i[B, n + 1, n], the last being the fixed point.
  """
  right = np.cumprod(states == states[:, -1:], axis=-1).sum(-1)
  return 1 - right / states.shape[-1]


def choose_states(
  states: np.ndarray, wanted: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
  """Returns i[B, n], one state of each trajectory.

  Args:
    states: i[B, n + 1, n].
    wanted: f64[B], the noise ratio to come near to; None: any state before the fixed point.
    rng: chooses.
  """
  ratios, rows = noise_ratios(states), np.arange(len(states))
  if wanted is not None:
    return states[rows, np.abs(ratios - wanted[:, None]).argmin(-1)]
  unsettled = np.maximum((ratios > 0).sum(-1), 1)
  return states[rows, rng.integers(0, unsettled)]


class Collector:
  """The target, compiled, and what it is asked for."""

  def __init__(self, loaded: LoadedModel, options: Options, batch_size: int, seed: int):
    target = loaded.transformer
    self.options, self.batch_size = options, batch_size
    self._eos, self._vocab_size = set(loaded.eos_ids), target.config.vocab_size
    self._params, self._seed = Params(nnx.state(target)), seed
    self._run = jax.jit(
      functools.partial(trajectories, model=as_model(target), window=options.window)
    )
    self.num_rounds = self.num_collected = 0

  def collect(self, texts: Sequence[Sequence[int]], first: int) -> list[dict]:
    """Returns a document for every text; one whose continuation ends early has fewer windows.

    Args:
      texts: token ids, at most `batch_size` of them.
      first: the number of the first text among all, on which random choices depend.
    """
    options, size = self.options, self.options.window
    rng = np.random.default_rng((self._seed, first))
    prompts = [list(text[: options.prompt_length]) for text in texts]
    documents = [list(prompt) for prompt in prompts]
    alive = [True] * len(texts)
    phase = rng.integers(0, options.noise_windows, len(texts))
    for index in range(options.num_windows):
      states = self._window(prompts, seed=int(rng.integers(2**31)))
      kept = choose_states(states, self._wanted(phase + index), rng)
      for row, text in enumerate(texts):
        fixed = states[row, -1].tolist()
        alive[row] &= not self._eos & set(fixed)
        if not alive[row]:
          continue
        documents[row] += kept[row].tolist() + fixed
        if options.demonstrate:
          documents[row] += list(text[options.prompt_length :][:size])
        prompts[row] += fixed
    return [
      {
        'id': first + row,
        'token_ids': document,
        'loss_mask': [0] * options.prompt_length + [1] * (len(document) - options.prompt_length),
      }
      for row, document in enumerate(documents)
      if len(document) > options.prompt_length
    ]

  def _wanted(self, turn):
    options = self.options
    if options.choose == 'random':
      return None
    schedule = np.linspace(0, 1, options.noise_windows)
    return schedule[turn % options.noise_windows]

  def _window(self, prompts, seed):
    """Returns i[len(prompts), n + 1, n], the trajectories of the next window."""
    options = self.options
    idle = self.batch_size - len(prompts)
    request = decodax.make_request(
      [*prompts, *[prompts[0]] * idle],
      max_new_tokens=options.window,
      vocab_size=self._vocab_size,
      seed=seed,
      capacity=options.prompt_length + (options.num_windows + 2) * options.window,
    )
    found = jax.device_get(self._run(self._params, request))
    self.num_rounds += int(found.num_rounds[: len(prompts)].sum())
    self.num_collected += len(prompts)
    return found.states[: len(prompts)]


def collect_all(
  texts: Sequence[Sequence[int]], collector: Collector, path: pathlib.Path, *, show: bool
) -> None:
  """Writes the documents of all texts; until they are whole, to a file with another name."""
  partial, start = path.with_name(path.name + '.partial'), time.perf_counter()
  path.parent.mkdir(parents=True, exist_ok=True)
  lines, done = _whole_batches(partial, collector.batch_size)
  with open(partial, 'w', encoding='utf-8') as file:
    file.writelines(lines)
    for first in range(done, len(texts), collector.batch_size):
      records = collector.collect(texts[first : first + collector.batch_size], first)
      file.write(''.join(json.dumps(record) + '\n' for record in records))
      file.flush()
  partial.replace(path)
  if show:
    size, calls = collector.options.window, collector.num_rounds
    rate = collector.num_collected * size / max(calls, 1)
    print(
      f'{path}: {len(texts)} prompts; now {collector.num_collected} windows of {size} tokens in '
      f'{calls} calls ({rate:.2f} tokens/call), {time.perf_counter() - start:.0f} s'
    )


def _whole_batches(partial, batch_size):
  """Returns (the lines to keep of an earlier start, the number of texts that they cover)."""
  if not partial.exists():
    return [], 0
  lines = partial.read_text(encoding='utf-8').splitlines(keepends=True)
  lines = [line for line in lines if line.endswith('\n')]
  ids = [json.loads(line)['id'] for line in lines]
  done = (ids[-1] + 1) // batch_size * batch_size if ids else 0
  return [line for line, number in zip(lines, ids, strict=True) if number < done], done


def cut_texts(
  sources: Sequence[str], loaded: LoadedModel, length: int, num: int, seed: int
) -> list[list[int]]:
  """Returns `num` stretches of `length` tokens of the documents, from places drawn at random.

  Raises:
    ValueError: if there are fewer.
  """
  stretches = list(_stretches(sources, loaded, length))
  if len(stretches) < num:
    raise ValueError(f'the data has {len(stretches)} stretches of {length} tokens, not {num}')
  chosen = np.random.default_rng(seed).permutation(len(stretches))[:num]
  return [stretches[index] for index in sorted(chosen)]


def _stretches(sources, loaded, length) -> Iterator[list[int]]:
  for document in read_sources(sources):
    for example in encode(document, loaded.tokenizer):
      tokens = list(example.tokens)
      for start in range(0, len(tokens) - length, length):
        yield tokens[start : start + length]


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('trajectories', lambda: _collect(args))


def _collect(args):
  options = Options(
    args.window, args.num_windows, args.prompt_length, args.choose, args.noise_windows,
    args.labels == 'demonstration',
  )  # fmt: skip
  if options.demonstrate and options.num_windows > 1:
    raise ValueError('a demonstration is of one window: give --num-windows 1')
  loaded = load_model(args.model)
  length = args.prompt_length + (args.num_windows * args.window if options.demonstrate else 0)
  texts = cut_texts(args.data, loaded, length, args.num, args.seed)
  collector = Collector(loaded, options, args.batch_size, args.seed)
  collect_all(texts, collector, args.out, show=not args.quiet)


def _parser():
  parser = writer_parser('trajectories', 'Collect the states of Jacobi decoding.', batch_size=32)
  parser.add_argument('--data', required=True, nargs='+', metavar='PATH', help='where prompts are')
  parser.add_argument('--num', type=int, default=1000, metavar='N', help='prompts')
  parser.add_argument('--window', type=int, default=16, metavar='n')
  parser.add_argument('--num-windows', type=int, default=7)
  parser.add_argument('--prompt-length', type=int, default=32)
  parser.add_argument('--choose', choices=('random', 'progressive'), default='random')
  parser.add_argument('--noise-windows', type=int, default=4, metavar='w')
  parser.add_argument('--labels', choices=('own', 'demonstration'), default='own')
  return parser


if __name__ == '__main__':
  sys.exit(main())

"""Trains the filter of Learn2PD: which predictions of a diffusion network are already final?

  python -m train.learn2pd --model runs/tiny_diffusion/export --out runs/tiny_filter/filter.npz
  python -m train.learn2pd --answers runs/tiny_answers.jsonl

Lets the network answer list tasks, one slot per forward; then once more with an oracle that fills
all slots whose prediction is already that answer, and notes every slot's confidence and whether it
was right. The filter learns the one from the other. The network stays as it is. With --answers only
the network's own answers are written, as training data for `tiny_dparallel`.

It prints precision and recall on steps that were held out.

Source: Learn2PD, arXiv:2509.25188, section 3.
"""

import argparse
from collections.abc import Sequence
import functools
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decodax
from decodax import diffusion
from decodax.diffusion import loop
from decodax.diffusion import policies
from decodax.diffusion.policies import Filter
from decodax.types import Request
from models.diffusion import LoadedDiffusion
from models.diffusion import load_diffusion
from train import list_tasks
from train.command import exit_code

TINY = 'runs/tiny_diffusion/export'
BATCH = 256  # rows of a request


class Traces(NamedTuple):
  """Steps of oracle decoding, one row for each step of each answer."""

  confidence: np.ndarray  # f32[N, W]
  right: np.ndarray  # bool[N, W]
  eligible: np.ndarray  # bool[N, W]


class Trained(NamedTuple):
  """A filter, and how it does on steps that it was not trained on."""

  params: Filter
  precision: float  # of what it lets pass at the threshold
  recall: float
  num_steps: int


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('learn2pd', lambda: _answer(args) if args.answers is not None else _train(args))


def _answer(args):
  write_answers(load_diffusion(args.model), args.answers, args.num_examples, args.seed)
  print(f'{args.num_examples} answers written to {args.answers}')


def _train(args):
  loaded = load_diffusion(args.model)
  traces = collect(loaded, args.num_examples, args.seed, args.block_size)
  found = fit(traces, seed=args.seed, threshold=args.threshold)
  save(args.out, found.params)
  print(
    f'{len(traces.confidence)} steps; on a tenth that was held out, at {args.threshold:g}: '
    f'precision {found.precision:.3f}, recall {found.recall:.3f}. Written to {args.out}'
  )


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m train.learn2pd', description='Train a filter for parallel decoding.'
  )
  parser.add_argument('--model', default=TINY, metavar='DIR', help=f'default {TINY}')
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('runs/tiny_filter/filter.npz')
  )
  parser.add_argument('--answers', type=pathlib.Path, metavar='FILE.jsonl', help='write only these')
  parser.add_argument('--num-examples', type=int, default=4096, metavar='N')
  parser.add_argument(
    '--block-size', type=int, default=list_tasks.CANVAS, metavar='S', help='of the decoding'
  )
  parser.add_argument('--threshold', type=float, default=0.96, metavar='P')
  parser.add_argument('--seed', type=int, default=1000, metavar='N', help='of the examples')
  return parser


def save(path: pathlib.Path, params: NamedTuple) -> None:
  """Writes a filter to a file of numpy arrays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    np.savez(file, *(np.asarray(each) for each in params))


# --- Traces ---------------------------------------------------------------------------------------


def requests(num, seed, vocab_size):
  """Yields (some of `num` examples, the request of them), all requests of one shape."""
  for index, start in enumerate(range(0, num, BATCH)):
    some = list(list_tasks.examples(min(BATCH, num - start), seed + index))
    yield some, make_request(some, vocab_size)


def make_request(some: Sequence[list_tasks.Example], vocab_size: int) -> Request:
  """Returns the request of up to `BATCH` examples, whose first one fills it up to that number."""
  padded = [*some, *[some[0]] * (BATCH - len(some))]
  return decodax.make_request(
    [list_tasks.to_ids(example.prompt) for example in padded],
    max_new_tokens=list_tasks.CANVAS,
    vocab_size=vocab_size,
    capacity=list_tasks.LONGEST_PROMPT + list_tasks.CANVAS,
  )


def make_answerer(loaded: LoadedDiffusion, block_size: int):
  """Returns (params, request) -> the network's answers, one slot per forward, jitted.

  No stop ids are set: every slot of the canvas is filled.
  """
  return jax.jit(
    functools.partial(
      diffusion.denoise,
      net=loaded.net,
      policy=policies.llada(block_size),
      blocks=diffusion.fixed_blocks(block_size),
    )
  )


def collect(loaded: LoadedDiffusion, num: int, seed: int, block_size: int) -> Traces:
  """Returns what an oracle sees while it decodes the network's own answers to `num` examples."""
  answer = make_answerer(loaded, block_size)
  setup = diffusion.Setup(loaded.net, policies.oracle(), diffusion.fixed_blocks(block_size))
  start = jax.jit(lambda params, request: loop.init_denoising(params, request, setup))

  @jax.jit
  def step(params, state):
    new = diffusion.denoise_step(params, state, setup=setup)
    return new, new.policy

  found = []
  for some, request in requests(num, seed, loaded.net.model.vocab_size):
    final = answer(diffusion.Params(loaded.params), request).tokens
    params = diffusion.Params(loaded.params, final)
    state = start(params, request)
    while bool(jnp.any(state.result == decodax.Result.RUNNING)):
      state, seen = step(params, state)
      rows = np.flatnonzero(np.asarray(seen.eligible.any(-1))[: len(some)])
      found.append(jax.tree.map(lambda array, rows=rows: np.asarray(array)[rows], seen))
  return Traces(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def write_answers(loaded: LoadedDiffusion, path: pathlib.Path, num: int, seed: int) -> None:
  """Writes the network's own answers to `num` examples as documents of token ids."""
  answer = make_answerer(loaded, list_tasks.CANVAS)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', encoding='utf-8') as file:
    for some, request in requests(num, seed, loaded.net.model.vocab_size):
      result = jax.device_get(answer(diffusion.Params(loaded.params), request))
      for tokens, start, end in zip(
        result.tokens[: len(some)], result.prompt_length, result.length, strict=False
      ):
        mask = [False] * int(start) + [True] * int(end - start)
        record = {'token_ids': tokens[:end].tolist(), 'loss_mask': mask}
        file.write(json.dumps(record) + '\n')


# --- The filter -----------------------------------------------------------------------------------


def fit(
  traces: Traces, *, seed: int = 0, threshold: float = 0.96, num_steps: int = 2000
) -> Trained:
  """Returns a filter trained on nine tenths of the traces, by all of them in every step.

  Args:
    traces: what an oracle saw.
    seed: of the split and of the initial parameters.
    threshold: at which precision and recall are told.
    num_steps: of AdamW at 3e-3, as published.
  """
  order = np.random.default_rng(seed).permutation(len(traces.confidence))
  held_out, kept = np.split(order, [max(len(order) // 10, 1)])
  train, test = (jax.tree.map(lambda a, rows=rows: jnp.asarray(a[rows]), traces)
                 for rows in (kept, held_out))  # fmt: skip
  params = policies.init_filter(jax.random.key(seed), traces.confidence.shape[1])
  optimizer = optax.adamw(3e-3)

  def loss(params, data: Any):
    logits = policies.filter_logits(params, data.confidence)
    found = optax.sigmoid_binary_cross_entropy(logits, data.right.astype(jnp.float32))
    return jnp.sum(found * data.eligible) / jnp.maximum(data.eligible.sum(), 1)

  @jax.jit
  def run(params):
    def body(_, carry):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params, train), state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, num_steps, body, (params, optimizer.init(params)))[0]

  params = run(params)
  passes = jax.nn.sigmoid(policies.filter_logits(params, test.confidence)) >= threshold
  passes = np.asarray(passes & test.eligible)
  right = np.asarray(test.right & test.eligible)
  hits = float((passes & right).sum())
  return Trained(
    params=params,
    precision=hits / max(passes.sum(), 1),
    recall=hits / max(right.sum(), 1),
    num_steps=num_steps,
  )


if __name__ == '__main__':
  sys.exit(main())

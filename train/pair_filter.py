"""Trains a `PairFilter`: which predictions are final, judged by how those of two slots go together.

  python -m train.pair_filter --model runs/tiny_diffusion/export

An extension of Learn2PD that is ours. The network decodes list tasks with a threshold of its own in
every row, from careful to bold; what the static sampler would make of each canvas on the way says
which of its predictions were final. A filter is fitted to that, decodes in its turn, and is fitted
again to all canvases, so that it learns from where it leads itself. The network stays as it is.

It prints how much of what is final it finds at a given precision, on answers that were held out,
beside what a threshold on the confidence finds.

Source: labels, after Learn2PD, arXiv:2509.25188, section 3; learning from one's own path, after
DAgger, arXiv:1011.0686.
"""

import argparse
from collections.abc import Callable, Sequence
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import decodax
from decodax import diffusion
from decodax.diffusion import loop
from decodax.diffusion import policies
from decodax.diffusion.policies import Evidence
from decodax.diffusion.policies import PairFilter
from decodax.types import Request
from models.diffusion import LoadedDiffusion
from models.diffusion import load_diffusion
from train import learn2pd
from train import list_tasks
from train.command import exit_code

LOWEST = 0.35  # of the thresholds that canvases come from


class PairTraces(NamedTuple):
  """Canvases on the way, one row for each step of each answer."""

  evidence: Evidence  # f32[N, W, F], f32[N, W, W, P]
  right: np.ndarray  # bool[N, W] what the static sampler would write there from this canvas on?
  eligible: np.ndarray  # bool[N, W]


class _Seen(NamedTuple):
  """What a policy saw in its last step."""

  evidence: Evidence
  candidates: jax.Array  # i32[B, W]
  eligible: jax.Array  # bool[B, W]


class _Step(NamedTuple):
  """A step of decoding, and the canvas before it, which is the window."""

  seen: _Seen
  canvas: jax.Array  # i32[B, W]


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for what the user can mend."""
  args = _parser().parse_args(argv)
  return exit_code('pair_filter', lambda: _train(args))


def _train(args):
  loaded = load_diffusion(args.model)
  *kept, held_out = _split(args.num_examples, args.num_rounds)
  collect = make_collector(loaded)
  fitted: PairFilter | None = None
  parts = []
  for number, num in enumerate(kept):
    parts.append(collect(fitted, num, args.seed + 1000 * number))
    traces = join(parts)
    fitted = fit(traces, seed=args.seed, num_steps=args.num_steps, num_messages=args.num_messages)
    print(f'round {number + 1}: {len(traces.right)} canvases', flush=True)
  assert fitted is not None
  learn2pd.save(args.out, fitted)
  test = collect(fitted, held_out, args.seed + 500)
  for name, score in (('the filter', score_of(fitted, test)), ('confidence alone', _odds(test))):
    found = recall_at(score, test, args.precision)
    print(f'{name}: {found:.3f} of what is final, at a precision of {args.precision:g}')
  print(f'on {held_out} answers that were held out. Written to {args.out}')


def _split(num, rounds):
  """Returns how many examples each round takes, and how many are held out."""
  held_out = max(num // 10, 1)
  return [*(len(part) for part in np.array_split(np.arange(num - held_out), rounds)), held_out]


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m train.pair_filter', description='Train a filter that sees pairs of slots.'
  )
  parser.add_argument('--model', default=learn2pd.TINY, metavar='DIR', help='default %(default)s')
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('runs/tiny_filter/pairs.npz')
  )
  parser.add_argument('--num-examples', type=int, default=8192, metavar='N')
  parser.add_argument('--num-rounds', type=int, default=2, metavar='N', help='of collecting')
  parser.add_argument('--num-steps', type=int, default=2000, metavar='N', help='of each fit')
  parser.add_argument(
    '--num-messages', type=int, default=2, metavar='N',
    help='that slots exchange; with 0 each is judged by itself',
  )  # fmt: skip
  parser.add_argument('--precision', type=float, default=0.99, metavar='P', help='to report at')
  parser.add_argument('--seed', type=int, default=5000, metavar='N', help='of the examples')
  return parser


# --- Canvases -------------------------------------------------------------------------------------


def make_collector(
  loaded: LoadedDiffusion,
) -> Callable[[PairFilter | None, int, int], PairTraces]:
  """Returns (filter, number of examples, seed) -> canvases that decoding comes by, jitted inside.

  Without a filter a threshold on the confidence decodes. Knobs are uniform from `LOWEST` to 1, and
  the canvas is one block.
  """
  blocks = diffusion.fixed_blocks(list_tasks.CANVAS)

  def setup(params, knob):
    own = isinstance(params.policy, PairFilter)
    policy = policies.learned_filter(knob, joint=True) if own else policies.threshold(knob)
    return diffusion.Setup(loaded.net, _watched(policy), blocks)

  @jax.jit
  def start(params, request, knob):
    return loop.init_denoising(params, request, setup(params, knob))

  @jax.jit
  def step(params, state, knob):
    return diffusion.denoise_step(params, state, setup=setup(params, knob))

  @jax.jit
  def finish(params, request, canvas):
    static = policies.llada(list_tasks.CANVAS)
    result = diffusion.denoise(
      params, request, net=loaded.net, policy=static, blocks=blocks, template=canvas
    )
    return _canvas_of(result.tokens, request)

  def watch(fitted, num, seed):
    """Yields what was seen in each step, of rows that had something to fill."""
    rng = np.random.default_rng(seed)
    params = diffusion.Params(loaded.params, () if fitted is None else fitted)
    for some, request in learn2pd.requests(num, seed, loaded.net.model.vocab_size):
      knob = jnp.asarray(rng.uniform(LOWEST, 1, len(request.tokens)), jnp.float32)
      state = start(params, request, knob)
      while bool(jnp.any(state.result == decodax.Result.RUNNING)):
        canvas = _canvas_of(state.tokens, request)
        state = step(params, state, knob)
        found = jax.device_get(_Step(state.policy[1], canvas))
        rows = np.flatnonzero(found.seen.eligible.any(-1)[: len(some)])
        kept = jax.tree.map(lambda array, rows=rows: array[rows], found)
        yield kept, [some[row] for row in rows]

  def finish_all(canvas, examples):
    """Returns i32[N, W]; canvases with as many masks go together, as each takes a forward."""
    final = np.zeros_like(canvas)
    order = np.argsort((canvas == loaded.net.mask_id).sum(-1), kind='stable')
    for rows in np.split(order, range(learn2pd.BATCH, len(order), learn2pd.BATCH)):
      request = learn2pd.make_request([examples[row] for row in rows], loaded.net.model.vocab_size)
      padded = canvas[np.pad(rows, (0, learn2pd.BATCH - len(rows)), mode='edge')]
      done = finish(diffusion.Params(loaded.params), request, padded)
      final[rows] = np.asarray(done)[: len(rows)]
    return final

  def collect(fitted, num, seed):
    steps, examples = zip(*watch(fitted, num, seed), strict=True)
    seen, canvas = jax.tree.map(lambda *arrays: np.concatenate(arrays), *steps)
    final = finish_all(canvas, [example for some in examples for example in some])
    return PairTraces(seen.evidence, seen.candidates == final, seen.eligible)

  return collect


def join(parts: Sequence[PairTraces]) -> PairTraces:
  """Returns all traces as one."""
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _watched(policy: diffusion.Policy) -> diffusion.Policy:
  """Returns the policy with what it sees in its state, behind its own."""

  def init(batch_size, width, vocab_size):
    zeros = jnp.zeros((batch_size, width))
    evidence = Evidence(
      jnp.zeros((batch_size, width, policies.NUM_SLOT_FACTS)),
      jnp.zeros((batch_size, width, width, policies.NUM_PAIR_FACTS)),
    )
    seen = _Seen(evidence, zeros.astype(jnp.int32), zeros.astype(bool))
    return policy.init(batch_size, width, vocab_size), seen

  def select(params, state, view):
    selection = policy.select(params, state[0], view)
    seen = _Seen(policies.gather_evidence(view), view.candidates, view.eligible)
    return selection._replace(state=(selection.state, seen))

  return policy._replace(init=init, select=select)


def _canvas_of(tokens: jax.Array, request: Request) -> jax.Array:
  """Returns i32[B, W], the canvas of each row, as a template to go on from."""
  where = request.prompt_length[:, None] + jnp.arange(list_tasks.CANVAS)[None]
  return jnp.take_along_axis(tokens, where, axis=1)


# --- The filter -----------------------------------------------------------------------------------


def fit(
  traces: PairTraces,
  *,
  seed: int = 0,
  num_steps: int = 2000,
  num_messages: int = 2,
  batch_size: int = 512,
) -> PairFilter:
  """Returns a filter trained on traces.

  Args:
    traces: canvases, and what was final in them.
    seed: of the initial parameters and of the batches.
    num_steps: of AdamW, at 3e-3 falling to 0.
    num_messages: rounds of messages between slots.
    batch_size: canvases in a step.
  """
  data = jax.tree.map(jnp.asarray, traces)
  key = jax.random.key(seed)
  schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, min(50, num_steps // 2), num_steps)
  optimizer = optax.adamw(schedule)

  def loss(params, rows):
    evidence, right, eligible = jax.tree.map(lambda a: a[rows], data)
    logits = policies.pair_filter_logits(params, evidence)
    found = optax.sigmoid_binary_cross_entropy(logits, right.astype(jnp.float32))
    return jnp.sum(found * eligible) / jnp.maximum(eligible.sum(), 1)

  @jax.jit
  def run(params):
    def body(number, carry):
      params, state = carry
      rows = jax.random.randint(
        jax.random.fold_in(key, number), (batch_size,), 0, len(traces.right)
      )  # fmt: skip
      updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, num_steps, body, (params, optimizer.init(params)))[0]

  return run(policies.init_pair_filter(key, num_rounds=num_messages))


def score_of(params: PairFilter, traces: PairTraces) -> np.ndarray:
  """Returns f32[N, W], the filter's logits."""
  evidence = jax.tree.map(jnp.asarray, traces.evidence)
  return np.asarray(jax.jit(policies.pair_filter_logits)(params, evidence))


def _odds(traces):
  """Returns f32[N, W], each candidate's own log odds."""
  return np.asarray(traces.evidence.slots[..., 2])


def recall_at(score: np.ndarray, traces: PairTraces, precision: float) -> float:
  """Returns which share of the final predictions a threshold finds that errs as often as allowed.

  Args:
    score: f32[N, W], the larger, the likelier final.
    traces: what was final.
    precision: of what passes the threshold; the lowest one that keeps to it is taken.
  """
  order = np.argsort(-score[traces.eligible], kind='stable')
  hits = np.cumsum(traces.right[traces.eligible][order])
  keeps = np.flatnonzero(hits >= precision * np.arange(1, len(hits) + 1))
  return float(hits[keeps[-1]] / max(hits[-1], 1)) if len(keeps) else 0.0


if __name__ == '__main__':
  sys.exit(main())

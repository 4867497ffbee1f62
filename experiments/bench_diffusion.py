"""What a denoising step costs, as ratios within one run.

    python -m experiments.bench_diffusion --out results/bench-diffusion

Measures, with random weights:

* a step of a block-causal network with its exact cache, by the length already decoded, beside the
  same step without a cache, and beside reading the keys and values of that length alone;
* best token, probability, runner-up and entropy of a row of logits in one pass over them, beside
  the same numbers each by a pass of its own, for a vocabulary of 126464.

Things compared take turns, and the best of the turns counts. Expect two minutes on two cores.
"""

import argparse
from collections.abc import Sequence
import functools
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import decodax
from decodax import diffusion
from decodax.diffusion import loop
from decodax.diffusion import policies
from decodax.diffusion.scores import summarize
from experiments import cli
from experiments import files
from experiments.bench_loop import best_seconds
from models.config import TransformerConfig
from models.diffusion import as_masked_model
from models.transformer import Transformer

BLOCK_SIZE = 16
LENGTHS = (128, 512, 1024, 2048)
VOCABULARY, SLOTS = 126_464, 32
_STEPS = 4  # of a block, in one timed loop
_CONFIG = TransformerConfig(
  vocab_size=2048, hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64,
  intermediate_size=768, max_position=4096, tie_embeddings=True,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code."""
  return cli.run('bench_diffusion', lambda: _main(argv))


def _main(argv):
  parser = argparse.ArgumentParser(prog='python -m experiments.bench_diffusion')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('results/bench-diffusion'))
  options = parser.parse_args(argv)
  results = {'steps': time_steps(options.repeats), 'summary': time_summary(options.repeats)}
  files.write_whole(options.out / 'results.json', files.to_json(results))
  for row in results['steps']:
    print(
      f'{row["length"]:>5} tokens decoded: step {row["cached_ms"]:.1f} ms with the exact cache, '
      f'{row["uncached_ms"]:.1f} ms without; above the shortest by {row["growth_ms"]:.1f} ms, '
      f'attention reads alone {row["reads_ms"]:.1f} ms'
    )
  found = results['summary']
  print(
    f'one pass over {SLOTS} x {VOCABULARY} logits {found["one_pass_ms"]:.1f} ms, '
    f'a pass for each number {found["passes_ms"]:.1f} ms, a plain maximum {found["max_ms"]:.1f} ms'
  )
  return 0


def time_steps(repeats: int) -> list[dict[str, Any]]:
  """Returns the time of a step by the length already decoded."""
  transformer = Transformer(_CONFIG, rngs=nnx.Rngs(0))
  net = as_masked_model(transformer, _CONFIG.vocab_size - 1, block_size=BLOCK_SIZE)
  params = diffusion.Params(nnx.state(transformer))
  jobs = {}
  for length in LENGTHS:
    for name, cache in (
      ('cached', diffusion.block_causal_cache()), ('uncached', diffusion.no_cache())
    ):  # fmt: skip
      jobs[name, length] = _step_job(net, params, length, cache)
    jobs['reads', length] = _reads_job(length)
  best = best_seconds(jobs, repeats)
  ms = lambda name, length: 1e3 * best[name, length] / _STEPS  # noqa: E731
  return [
    {
      'length': length,
      'cached_ms': ms('cached', length),
      'uncached_ms': ms('uncached', length),
      'reads_ms': ms('reads', length) - ms('reads', LENGTHS[0]),
      'growth_ms': ms('cached', length) - ms('cached', LENGTHS[0]),
    }
    for length in LENGTHS
  ]


def _step_job(net, params, length, cache):
  """Returns a job of `_STEPS` steps of one block behind `length` tokens."""
  rng = np.random.default_rng(0)
  request = decodax.make_request(
    rng.integers(0, net.mask_id, (1, length)), max_new_tokens=BLOCK_SIZE,
    vocab_size=_CONFIG.vocab_size, capacity=length + BLOCK_SIZE,
  )  # fmt: skip
  setup = diffusion.Setup(
    net, policies.llada(BLOCK_SIZE), diffusion.fixed_blocks(BLOCK_SIZE), cache
  )
  state = jax.jit(lambda p, r: loop.init_denoising(p, r, setup))(params, request)

  @jax.jit
  def steps(params, state):
    body = lambda _, state: diffusion.denoise_step(params, state, setup=setup)  # noqa: E731
    return lax.fori_loop(0, _STEPS, body, state).tokens

  return functools.partial(_wait, steps, params, state)


def _reads_job(length):
  """Returns a job that reads keys and values of `length` tokens as attention does, per step."""
  shape = (_CONFIG.num_layers, _CONFIG.num_kv_heads, length, _CONFIG.head_dim)
  keys = values = jnp.ones(shape)
  group = _CONFIG.group_size * BLOCK_SIZE
  queries = jnp.ones((*shape[:2], group, _CONFIG.head_dim))

  @jax.jit
  def attend(queries, keys, values):
    def step(_, queries):
      def layer(each):
        q, k, v = each
        scores = jnp.einsum('htd,hsd->hts', q, k)
        return jnp.einsum('hts,hsd->htd', jax.nn.softmax(scores, -1), v)

      return lax.map(layer, (queries, keys, values))

    return lax.fori_loop(0, _STEPS, step, queries)

  return functools.partial(_wait, attend, queries, keys, values)


def time_summary(repeats: int) -> dict[str, float]:
  """Returns milliseconds of gathering what policies want to know of large laws."""
  logits = jax.random.normal(jax.random.key(0), (SLOTS, VOCABULARY))

  def one_by_one(logits):
    """Returns the same numbers, each by reading the logits again."""
    best = jnp.argmax(logits, axis=-1)
    wide = lax.optimization_barrier(logits)
    law = jax.nn.softmax(wide, axis=-1)
    again = lax.optimization_barrier(law)
    two, _ = lax.top_k(again, 2)
    entropy = -jnp.sum(jnp.where(law > 0, law * jnp.log(law), 0), axis=-1)
    return best, two, entropy

  jobs = {
    'one_pass_ms': functools.partial(_wait, jax.jit(summarize), logits),
    'passes_ms': functools.partial(_wait, jax.jit(one_by_one), logits),
    'max_ms': functools.partial(_wait, jax.jit(lambda x: x.max(-1)), logits),
  }
  return {name: 1e3 * seconds for name, seconds in best_seconds(jobs, repeats).items()}


def _wait(function, *args):
  return jax.block_until_ready(function(*args))


if __name__ == '__main__':
  sys.exit(main())

"""What a decoding step of a whole model costs, as a fraction of what memory allows.

    python -m experiments.bench_decode --config llama-8b --out results/bench-decode

Random weights of a model's shape; a step is the forward pass over T tokens of every row, the
logits of all of them, and the commit of the first: T = 1 is plain decoding, a larger T verifies a
tree. The limit is the time to read the weights and the keys and values of the prefix once, at the
bandwidth of a copy measured in the same run. What does not fit into the device's memory is left
out, and said so. On a CPU the default is a model of SmolLM2-135M's size at a short prefix.
"""

import argparse
import functools
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from decodax import sampling
from experiments import files
from experiments.timing import Ceilings
from experiments.timing import measure_ceilings
from experiments.timing import seconds_per_call
from models.adapter import as_model
from models.config import TransformerConfig
from models.transformer import Transformer
from models.transformer import for_decoding

CONFIGS = {
  'llama-8b': TransformerConfig(
    vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, intermediate_size=14336,
  ),
  'llama-1b': TransformerConfig(
    vocab_size=128256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8,
    head_dim=64, intermediate_size=8192, tie_embeddings=True,
  ),
  'smollm2-135m': TransformerConfig(
    vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, intermediate_size=1536, tie_embeddings=True,
  ),
}  # fmt: skip


class Row(NamedTuple):
  """One step."""

  prefix: int
  batch: int
  tokens: int  # T
  ms: float | None  # None: it does not fit
  limit_ms: float
  why: str = ''

  @property
  def share(self) -> float | None:
    """Returns the fraction of the memory-bound limit."""
    return None if self.ms is None else self.limit_ms / self.ms


def make_params(transformer: Transformer, dtype):
  """Returns random parameters made on the device, one array at a time, for an abstract module."""
  state = nnx.state(transformer)
  leaves, layout = jax.tree.flatten(state)
  make = jax.jit(
    lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
  )
  keys = jax.random.split(jax.random.key(0), len(leaves))
  arrays = [
    make(key, leaf.shape).astype(dtype) for key, leaf in zip(keys, leaves, strict=True)
  ]  # fmt: skip
  return jax.tree.unflatten(layout, arrays)


def measure(config: TransformerConfig, options, ceilings: Ceilings) -> list[Row]:
  """Returns a row for every prefix, batch and number of tokens asked for."""
  dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
  make = functools.partial(Transformer, config, param_dtype=dtype, dtype=dtype)
  abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  graph, _ = nnx.split(abstract)
  transformer = for_decoding(nnx.merge(graph, make_params(abstract, dtype)))
  params, model = nnx.state(transformer), as_model(transformer)
  weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
  if not transformer.config.tie_embeddings:  # of the embedding a step looks up a few rows
    weights -= config.vocab_size * config.hidden_size * jnp.dtype(dtype).itemsize
  rows = []
  for prefix in options.prefixes:
    for batch in options.batches:
      slots = config.num_layers * batch * config.num_kv_heads * prefix * config.head_dim
      limit = (weights + 2 * slots * jnp.dtype(dtype).itemsize) / ceilings.copy_bytes_per_second
      for tokens in options.tokens:
        row = Row(prefix, batch, tokens, None, 1e3 * limit)
        try:
          seconds = _seconds(model, params, prefix, batch, tokens, options.repeats)
          rows.append(row._replace(ms=1e3 * seconds))
        except jax.errors.JaxRuntimeError as error:
          rows.append(row._replace(why=str(error).split('\n')[0][:200]))
  return rows


def _seconds(model, params, prefix, batch, tokens, repeats):
  cache = model.init_cache(params, batch, prefix + 128)
  cache = cache._replace(length=jnp.full((batch,), prefix, jnp.int32))
  compiled = jax.jit(make_step(model, prefix, batch, tokens), donate_argnums=1)
  carry = cache, jnp.ones((batch, tokens), jnp.int32)
  return seconds_per_call(functools.partial(compiled, params), carry, repeats=repeats)


def make_step(model, prefix: int, batch: int, tokens: int):
  """Returns (params, (cache, i32[B, T])) -> the same after a step that keeps one token."""
  path = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (batch, tokens, tokens))

  def step(params, carry):
    cache, inputs = carry
    positions = cache.length[:, None] + path
    output, block = model.extend(params, cache, inputs, positions, mask)
    inputs = sampling.argmax(model.unembed(params, output.hidden))
    cache = model.commit(cache, block, path[:, :1], jnp.ones((batch,), jnp.int32))
    return cache._replace(length=jnp.full((batch,), prefix, jnp.int32)), inputs

  return step


def render(name: str, ceilings: Ceilings, rows: list[Row]) -> str:
  """Returns the result as Markdown."""
  lines = [
    f'{name} on {ceilings.device}, a copy moves {ceilings.copy_bytes_per_second / 1e9:.0f} GB/s.',
    '',
    '| prefix | batch | tokens | ms a step | limit, ms | of the limit |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows:
    share = '-' if row.share is None else f'{row.share:.0%}'
    ms = '-' if row.ms is None else f'{row.ms:.2f}'
    lines.append(
      f'| {row.prefix} | {row.batch} | {row.tokens} | {ms} | {row.limit_ms:.2f} | {share} |'
    )
  notes = dict.fromkeys(f'prefix {r.prefix}, batch {r.batch}: {r.why}' for r in rows if r.why)
  return '\n'.join([*lines, '', *notes])


def main(argv=None) -> int:
  """Measures, prints Markdown and writes `bench_decode.json`."""
  parser = argparse.ArgumentParser(description='What a decoding step of a whole model costs.')
  on_cpu = jax.default_backend() == 'cpu'  # which takes minutes for the smallest
  config, prefixes, batches = (
    ('smollm2-135m', [1024], [1]) if on_cpu else ('llama-1b', [1024, 8192, 32768], [1, 8, 32])
  )
  parser.add_argument('--config', choices=sorted(CONFIGS), default=config)
  parser.add_argument('--prefixes', type=int, nargs='+', default=prefixes)
  parser.add_argument('--batches', type=int, nargs='+', default=batches)
  parser.add_argument('--tokens', type=int, nargs='+', default=[1, 16, 64])
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--out', type=pathlib.Path, help='folder for bench_decode.json')
  options = parser.parse_args(argv)
  ceilings = measure_ceilings()
  rows = measure(CONFIGS[options.config], options, ceilings)
  print(render(options.config, ceilings, rows))
  if options.out is not None:
    record = {
      'config': options.config, 'jax': jax.__version__, **ceilings._asdict(),
      'rows': [row._asdict() | {'share': row.share} for row in rows],
    }  # fmt: skip
    files.write_whole(options.out / 'bench_decode.json', files.to_json(record))
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

"""What growing a dynamic tree costs beside the model that drafts it.

    python -m experiments.bench_trees --out results/bench-trees

Times, for each kind of dynamic tree with 64 nodes, the *building*: everything but the model, that
is choosing children from logits over the whole vocabulary, ranking, pruning, masks and laws. The
logits come from a small table, looked up by token, so the model costs next to nothing. Beside it
stand two *draft steps* of the early exit of the model (three quarters of its layers, and the head):
one that reads a single token a row, and one that reads a level of the tree, which is what growing
it takes again and again. Building the whole tree should cost less than one step. Things compared
take turns, and the best of the turns counts. On two cores the whole takes about two minutes.
"""

import argparse
import functools
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.decode import root_tokens
from decodax.drafters.expander import Expander
from decodax.drafters.expander import Grown
from decodax.types import Params
from experiments import files
from experiments.bench_loop import best_seconds
from models.adapter import as_model
from models.registry import DEFAULT_MODEL
from models.registry import load_model

_ROWS = 256  # of the table of logits
_CONTEXT = 32  # prompt tokens


class Row(NamedTuple):
  """The measurement of one tree at one batch size and temperature."""

  tree: str
  batch_size: int
  temperature: float
  build_ms: float
  token_ms: float  # a draft step on one token a row
  level_ms: float  # a draft step on a level of the tree

  @property
  def share(self) -> float:
    """Building, in draft steps on a level."""
    return self.build_ms / self.level_ms


_WIDTHS = {'eagle2': 8, 'dyspec': 8, 'stochastic beam': 11}  # nodes of a level


def trees(expander: Expander, num_nodes: int) -> dict[str, tuple]:
  """Returns, by name, (a drafter of about `num_nodes` nodes and depth 6, a rule for it)."""
  return {
    'eagle2': (
      drafters.eagle2_tree(
        expander, num_nodes=num_nodes, max_depth=6, beam_width=_WIDTHS['eagle2']
      ),
      verifiers.coupled,
    ),
    'dyspec': (
      drafters.dyspec_tree(
        expander, num_nodes=num_nodes, max_depth=6, beam_width=_WIDTHS['dyspec']
      ),
      verifiers.traversal,
    ),
    'stochastic beam': (
      drafters.stochastic_beam_tree(
        expander, num_nodes=num_nodes, max_depth=6, beam_width=_WIDTHS['stochastic beam']
      ),
      verifiers.without_replacement,
    ),
  }


def table_expander(vocab_size: int) -> Expander:
  """Returns an expander that looks logits up; `Params.drafter` is f32[R, V]."""

  def look_up(params, tokens):
    logits = params.drafter[tokens % params.drafter.shape[0]]
    return Grown(jnp.zeros((*tokens.shape, 1)), logits)

  def begin(params, state, own, block, *, num_slots, wanted):
    del num_slots, wanted
    return look_up(params, root_tokens(state)[:, None]), own, block

  return Expander(
    init=lambda params, request, capacity, num_slots: ((), ()),
    prefill=lambda params, own, *chunk: own,
    begin=begin,
    expand=lambda params, state, own, block, nodes, offset: (look_up(params, nodes.tokens), block),
    commit=lambda own, block, slots, count: own,
    vocab_size=vocab_size,
  )


def _job(function, *args):
  compiled = jax.jit(function).lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def measure(loaded, options) -> list[Row]:
  """Returns a row for each tree, batch size and temperature."""
  transformer = loaded.transformer
  params, vocab_size = nnx.state(transformer), transformer.config.vocab_size
  layers = max(1, transformer.config.num_layers * 3 // 4)
  model = as_model(transformer, exit_layer=layers)
  table = 3 * jax.random.normal(jax.random.key(0), (_ROWS, vocab_size))
  grown = trees(table_expander(vocab_size), options.num_nodes)
  jobs = {}
  for batch_size in options.batch_sizes:
    for temperature in (0.0, 1.0):
      request = decodax.make_request(
        [list(range(1, _CONTEXT))] * batch_size, max_new_tokens=64, vocab_size=vocab_size,
        temperature=temperature,
      )  # fmt: skip
      for name, (drafter, rule) in grown.items():
        jobs[name, batch_size, temperature] = _building(
          drafter, rule, params, table, request, loaded
        )
    for width in (1, *set(_WIDTHS.values())):
      jobs[width, batch_size, None] = _step(model, params, batch_size, width)
  seconds = best_seconds(jobs, options.repeats)
  return [
    Row(
      name,
      batch_size,
      temperature,
      build_ms=1e3 * found,
      token_ms=1e3 * seconds[1, batch_size, None],
      level_ms=1e3 * seconds[_WIDTHS[name], batch_size, None],
    )
    for (name, batch_size, temperature), found in seconds.items()
    if temperature is not None
  ]


def _building(drafter, rule, params, table, request, loaded):
  both = Params(params, table)
  model = as_model(loaded.transformer)
  state = decodax.init_state(both, request, model=model, drafter=drafter)
  propose = functools.partial(drafter.propose, noise_fn=rule.draft_noise, with_laws=rule.needs_laws)
  return _job(lambda both, state: propose(both, state)[0], both, state)


def _step(model, params, batch_size, width):
  """Returns a job that reads `width` tokens a row behind the context, and their logits."""
  cache = model.init_cache(params, batch_size, 2 * _CONTEXT)
  cache = cache._replace(length=jnp.full((batch_size,), _CONTEXT, jnp.int32))
  tokens = jnp.ones((batch_size, width), jnp.int32)
  mask = jnp.broadcast_to(jnp.eye(width, dtype=bool), (batch_size, width, width))

  def step(params, cache, tokens):
    output, _ = model.extend(params, cache, tokens, jnp.full_like(tokens, _CONTEXT), mask)
    return model.unembed(params, output.hidden)

  return _job(step, params, cache, tokens)


def render(rows: list[Row], options) -> str:
  """Returns the measurement as Markdown."""
  lines = [
    f'{options.num_nodes} nodes, depth 6, {options.model} on {jax.devices()[0].device_kind}.',
    '',
    '| tree | batch | temperature | building, ms | a step on one token, ms | on a level, ms '
    '| building in steps on a level |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    lines.append(
      f'| {row.tree} | {row.batch_size} | {row.temperature:g} | {row.build_ms:.2f} | '
      f'{row.token_ms:.2f} | {row.level_ms:.2f} | {row.share:.2f} |'
    )
  return '\n'.join(lines)


def main(argv=None) -> int:
  """Measures, prints Markdown and writes `bench_trees.json`."""
  parser = argparse.ArgumentParser(description='What growing a dynamic tree costs.')
  parser.add_argument('--model', default=DEFAULT_MODEL)
  parser.add_argument('--num-nodes', type=int, default=64)
  parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--out', type=pathlib.Path, help='folder for bench_trees.json')
  options = parser.parse_args(argv)
  rows = measure(load_model(options.model), options)
  print(render(rows, options))
  if options.out is not None:
    record = {
      'device': str(jax.devices()[0].device_kind),
      'jax': jax.__version__,
      'model': options.model,
      'num_nodes': options.num_nodes,
      'rows': [row._asdict() | {'share': row.share} for row in rows],
    }
    files.write_whole(options.out / 'bench_trees.json', files.to_json(record))
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

"""What verifying a tree costs, beside the model call that gives the laws.

    python -m experiments.bench_verify --out results/bench-verify

Times every rule for trees (laws in, verdict out) at batch 8, 64 nodes and a vocabulary of
151,936, and one call of a model of SmolLM2-135M's size, with random weights and that vocabulary, on
the same 512 tokens; `--call-ms` takes a time measured elsewhere instead. A rule should take less
than a tenth of the call.

The tree is breadth-first with 4, 2, 2, 1, 1, ... children a node. Target and draft laws are random,
with an overlap as of a good small drafter; each rule gets the drafts that it is made for. How far a
walk gets changes from round to round, so the time is the mean over rounds, of the best of a few
repeats each. On two cores the whole takes about five minutes and 3 GB.
"""

import argparse
import pathlib
import time
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from decodax import trees
from decodax import verifiers
from decodax.noise import RoundKeys
from decodax.noise import row_keys
from decodax.types import Candidates
from decodax.types import DraftShape
from decodax.types import Proposal
from decodax.types import Verifier
from experiments import files
from models.adapter import as_model
from models.config import TransformerConfig
from models.transformer import Transformer

_BRANCHING = (4, 2, 2)  # then one child a node
# The drafts that a rule is timed with if it reads their laws: the first of these that it takes.
_PREFERRED = (
  Candidates.WITHOUT_REPLACEMENT,
  Candidates.IID,
  Candidates.SEVERAL_DRAFTERS,
  Candidates.TOP_AND_ONE,
)


class Row(NamedTuple):
  """The measurement of one rule."""

  rule: str
  drafts: str
  verify_ms: float
  accepted: float  # drafts a round
  temporary_mb: float | None  # memory besides the inputs; None if the device does not say
  share_of_call: float


# --- The tree and its laws -----------------------------------------------------------------------


def tree_parents(num_nodes: int) -> np.ndarray:
  """Returns i32[N], the parents of the breadth-first tree of the module docstring."""
  parents, level, depth = [-1], [0], 0
  while len(parents) < num_nodes:
    count = _BRANCHING[depth] if depth < len(_BRANCHING) else 1
    following = []
    for node in level:
      for _ in range(min(count, num_nodes - len(parents))):
        following.append(len(parents))
        parents.append(node)
    level, depth = following, depth + 1
  return np.asarray(parents, np.int32)


def depth_of(parents: np.ndarray) -> int:
  """Returns D of a tree."""
  depths = np.zeros(len(parents), np.int32)
  for node in range(1, len(parents)):
    depths[node] = depths[parents[node]] + 1
  return int(depths.max())


def random_laws(options) -> tuple[jax.Array, jax.Array]:
  """Returns (target, draft), each f32[B, N, V]: logits that share most of their variation."""
  shape = (options.batch_size, options.num_nodes, options.vocab_size)
  keys = jax.random.split(jax.random.key(0), 2)
  target = 3 * jax.random.normal(keys[0], shape)
  return target, target + options.spread * jax.random.normal(keys[1], shape)


def draft_tree(laws: jax.Array, parents: np.ndarray, kind: Candidates) -> Proposal:
  """Returns a tree with drafts of the given kind, drawn from laws f32[B, N, V]."""
  batch_size, num_nodes, _ = laws.shape
  tokens = np.zeros((batch_size, num_nodes), np.int32)
  out = laws
  for node in range(num_nodes):
    children = np.flatnonzero(parents == node)
    if not len(children):
      continue
    row, key = laws[:, node], jax.random.fold_in(jax.random.key(1), node)
    if kind is Candidates.DETERMINISTIC:
      drawn = jax.lax.top_k(row, len(children))[1]
    elif kind in (Candidates.IID, Candidates.SEVERAL_DRAFTERS):
      drawn = jax.random.categorical(key, row, axis=-1, shape=(len(children), batch_size)).T
    elif kind is Candidates.TOP_AND_ONE:
      top = jax.lax.top_k(row, len(children) - 1)[1]
      rest = row.at[jnp.arange(batch_size)[:, None], top].set(-jnp.inf)
      last = jax.random.categorical(key, rest, axis=-1)[:, None]
      drawn, out = jnp.concatenate([top, last], axis=1), out.at[:, node].set(rest)
    else:
      drawn = jax.lax.top_k(row + jax.random.gumbel(key, row.shape), len(children))[1]
    tokens[:, children] = np.asarray(drawn)
  if kind is Candidates.SEVERAL_DRAFTERS:
    out = out[:, np.maximum(parents, 0)]
  return Proposal(
    tokens=jnp.asarray(tokens),
    parents=jnp.broadcast_to(jnp.asarray(parents), tokens.shape),
    valid=jnp.ones(tokens.shape, bool),
    laws=None if kind is Candidates.DETERMINISTIC else out,
  )


# --- Timing --------------------------------------------------------------------------------------


def best_ms(job, repeats: int) -> float:
  """Returns the shortest time of a job in milliseconds; it has run before."""
  best = float('inf')
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(job())
    best = min(best, time.perf_counter() - start)
  return 1e3 * best


def call_ms(parents: np.ndarray, options) -> float:
  """Returns the time of one call of the model, its head included, on the nodes of all trees."""
  config = TransformerConfig(
    vocab_size=options.vocab_size,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    tie_embeddings=True,
  )
  transformer = Transformer(config, rngs=nnx.Rngs(0))
  model, params = as_model(transformer), nnx.state(transformer)
  tokens = jnp.zeros((options.batch_size, options.num_nodes), jnp.int32)
  proposal = Proposal(
    tokens=tokens,
    parents=jnp.broadcast_to(jnp.asarray(parents), tokens.shape),
    valid=jnp.ones(tokens.shape, bool),
  )
  shape = DraftShape(options.num_nodes, depth_of(parents), Candidates.DETERMINISTIC)
  cache = model.init_cache(params, options.batch_size, options.context + options.num_nodes)
  cache = cache._replace(length=jnp.full((options.batch_size,), options.context, jnp.int32))

  @jax.jit
  def call(params, cache, proposal):
    mask, depths = trees.topology(proposal, shape)
    positions = cache.length[:, None] + depths
    output, _ = model.extend(params, cache, proposal.tokens, positions, mask)
    return model.unembed(params, output.hidden)

  jax.block_until_ready(call(params, cache, proposal))
  return best_ms(lambda: call(params, cache, proposal), options.repeats)


def verify_row(
  rule: Verifier, kind: Candidates, proposal: Proposal, target: jax.Array, call: float, options
) -> Row:
  """Returns the measurement of a rule on one proposal."""
  max_depth = depth_of(np.asarray(proposal.parents[0]))
  zeros = jnp.zeros((options.batch_size,), jnp.int32)
  rows = row_keys(0, jnp.arange(options.batch_size))
  keys = [RoundKeys(rows, zeros + index, zeros + index) for index in range(options.rounds)]

  def verify(keys, proposal, target):
    return rule.verify(keys, proposal, target, max_depth=max_depth)

  compiled = jax.jit(verify).lower(keys[0], proposal, target).compile()
  memory = compiled.memory_analysis()
  accepted = [compiled(k, proposal, target).num_accepted for k in keys]
  times = [best_ms(lambda k=k: compiled(k, proposal, target), options.repeats) for k in keys]
  return Row(
    rule=rule.name,
    drafts=kind.value,
    verify_ms=float(np.mean(times)),
    accepted=float(np.mean(np.asarray(accepted))),
    temporary_mb=None if memory is None else memory.temp_size_in_bytes / 1e6,
    share_of_call=float(np.mean(times)) / call,
  )


def rules_by_kind(names) -> dict[Candidates, list[Verifier]]:
  """Returns the rules for trees, all or those named, by the drafts they are timed with."""
  chosen: dict[Candidates, list[Verifier]] = {}
  for rule in verifiers.BY_NAME.values():
    if rule.chains_only or rule.needs_evidence or (names and rule.name not in names):
      continue
    preferred = _PREFERRED if rule.needs_laws else (Candidates.DETERMINISTIC,)
    kinds = [kind for kind in preferred if kind in rule.supports]
    if kinds:
      chosen.setdefault(kinds[0], []).append(rule)
  return chosen


def measure(options) -> tuple[float, list[Row]]:
  """Returns the milliseconds of the call, and a row for each rule."""
  parents = tree_parents(options.num_nodes)
  call = options.call_ms or call_ms(parents, options)
  target, draft = random_laws(options)
  rows = []
  for kind, rules in rules_by_kind(options.rules).items():
    proposal = draft_tree(draft, parents, kind)
    rows += [verify_row(rule, kind, proposal, target, call, options) for rule in rules]
  return call, rows


def render(call: float, rows: list[Row], options) -> str:
  """Returns the measurement as Markdown."""
  lines = [
    f'Batch {options.batch_size}, {options.num_nodes} nodes, vocabulary {options.vocab_size}, on '
    f'{jax.devices()[0].device_kind}; a model call takes {call:.0f} ms.',
    '',
    '| rule | drafts | verify, ms | of the call | accepted a round | temporary, MB |',
    '|---|---|---|---|---|---|',
  ]
  for row in sorted(rows, key=lambda row: row.verify_ms):
    lines.append(
      f'| {row.rule} | {row.drafts} | {row.verify_ms:.1f} | {100 * row.share_of_call:.1f} % | '
      f'{row.accepted:.2f} | {"?" if row.temporary_mb is None else f"{row.temporary_mb:.0f}"} |'
    )
  return '\n'.join(lines)


def main(argv=None) -> int:
  """Measures, prints Markdown and writes `bench_verify.json`."""
  parser = argparse.ArgumentParser(description='Times the verification of trees.')
  parser.add_argument('--batch-size', type=int, default=8)
  parser.add_argument('--num-nodes', type=int, default=64)
  parser.add_argument('--vocab-size', type=int, default=151_936)
  parser.add_argument('--context', type=int, default=256, help='committed tokens of a row')
  parser.add_argument('--spread', type=float, default=0.5, help='how far draft logits are off')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--call-ms', type=float, help='time of the model call, if known')
  parser.add_argument('--rules', nargs='*', help='names; all that take trees otherwise')
  parser.add_argument('--out', type=pathlib.Path, help='folder for bench_verify.json')
  options = parser.parse_args(argv)
  call, rows = measure(options)
  print(render(call, rows, options))
  if options.out is not None:
    record = {
      'device': str(jax.devices()[0].device_kind),
      'jax': jax.__version__,
      'call_ms': call,
      'rules': [row._asdict() for row in rows],
    }
    record |= {name: getattr(options, name) for name in ('batch_size', 'num_nodes', 'vocab_size')}
    files.write_whole(options.out / 'bench_verify.json', files.to_json(record))
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

"""Which trained drafter is best, all trained on the same tokens and verified with the same nodes?

  python -m experiments.drafters
  python -m experiments.drafters --only tiny_eagle3 --target-steps 300 --num-steps 100

It trains `tiny_target` and then every tiny head into --workdir, each on as many tokens (a run that
is there already is not repeated, one that was stopped goes on), and decodes the same held-out
prompts with all of them, as chains and as trees of equal numbers of nodes, at temperature 0 and 1.

Expect an hour and a half on two CPU cores, a table for each temperature, and tables, a plot and
drafters.json in WORKDIR/drafters. What the columns mean: docs/drafters.md.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from decodax import drafters
from decodax import static_trees
from decodax import verifiers
from decodax.decode import root_tokens
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Params
from decodax.types import Verifier
from experiments import cli
from experiments import drafters_report
from experiments import measure
from experiments.display import Display
from experiments.display import make_console
from experiments.laws import prompt_acceptance
from experiments.methods import Decoder
from models.adapter import as_model
from models.heads.ppd import PromptTokens
from models.heads.ppd import ppd_drafter
from models.registry import load_model
from models.weights import LoadedModel
from train import packing
from train.config import TrainConfig
from train.config import load_config
from train.export import load_head
from train.objective import Objective
from train.objective import get_objective
from train.objective import option_names
from train.run import Outcome
from train.run import Run

TARGET = 'tiny_target'
# In this order: a later one may start from an earlier one.
HEADS = (
  'tiny_medusa', 'tiny_hydra', 'tiny_hydra_pp', 'tiny_eagle', 'tiny_eagle3', 'tiny_kangaroo',
  'tiny_ppd', 'tiny_draft_lm', 'tiny_distillspec', 'tiny_acceptance',
)  # fmt: skip
_FREE = (
  'free drafts'  # verifies as many nodes and drafts at no cost: what drafting is compared with
)
_PROMPT_LENGTH = 48


class Contender(NamedTuple):
  """A way to decode that takes part."""

  name: str
  head: str | None  # the configuration it was trained with
  num_parameters: int  # trained ones
  shape: str  # 'chain', 'tree' or ''
  decoder: Decoder
  verifier: Verifier
  acceptance: list[list[float]] | None = None  # of prompt tokens by depth and rank, temperature 0
  expected: float | None = None  # tokens/call that the trees would have with this acceptance


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 if a training run failed, 2 for wrong options."""
  return cli.run('drafters', lambda: _main(argv))


def _main(argv):
  args = _parser().parse_args(argv)
  chosen = choose_heads(args.only)
  console = make_console()
  with cli.user_errors():
    for name in (TARGET, *chosen):
      if not train(name, args, console):
        return 1
  if args.train_only:
    return 0
  with cli.user_errors():
    target = load_model(args.workdir / TARGET / 'export')
    contenders = make_contenders(target, args.workdir, chosen, args.nodes)
  prompts = held_out_prompts(args.workdir, args.num_prompts)
  found = []
  with Display(console) as display:
    for temperature in args.temperatures:
      setting = measure.Setting(
        max_new_tokens=args.max_new_tokens,
        vocab_size=target.transformer.config.vocab_size,
        eos_ids=(),  # every prompt gives as many tokens
        temperature=temperature,
        repeats=args.repeats,
      )
      found.append(compare(contenders, prompts, setting, display))
  results = {
    'schema': 1,
    'command': cli.command_line('experiments.drafters', argv),
    'num_nodes': args.nodes,
    'num_prompts': len(prompts),
    'max_new_tokens': args.max_new_tokens,
    'training': {name: _training_facts(args.workdir / name) for name in (TARGET, *chosen)},
    'temperatures': found,
  }
  results['orders'] = drafters_report.orders(results)
  directory = args.workdir / 'drafters'
  names = drafters_report.write(directory, results)
  for each in found:
    console.print(drafters_report.table(each))
  for line in (*drafters_report.order_lines(results), *drafters_report.acceptance_lines(results)):
    console.print(line, markup=False, soft_wrap=True)
  console.print(f'Written to {directory}/: {", ".join(names)}', markup=False, soft_wrap=True)
  return 0


def _parser():
  parser = cli.Parser(
    prog='python -m experiments.drafters',
    description='Train every tiny drafter on the same tokens, and compare them.',
  )
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs'))
  parser.add_argument('--only', metavar='A,B', help=f'some of {", ".join(HEADS)}')
  parser.add_argument(
    '--num-steps', type=cli.at_least(1), metavar='N', help="of every head (default: the config's)"
  )
  parser.add_argument(
    '--target-steps', type=cli.at_least(1), metavar='N', help='of the target (default: its config)'
  )
  parser.add_argument(
    '--batch-size', type=cli.at_least(1), metavar='B', help='rows a step of every head'
  )
  parser.add_argument('--train-only', action='store_true', help='train, and stop')
  parser.add_argument(
    '--nodes', type=cli.at_least(2), default=5, metavar='N', help='verified a round (default 5)'
  )
  parser.add_argument('--num-prompts', type=cli.at_least(2), default=24, metavar='N')
  parser.add_argument('--max-new-tokens', type=cli.at_least(8), default=64, metavar='N')
  parser.add_argument('--repeats', type=cli.at_least(1), default=1, metavar='R')
  parser.add_argument(
    '--temperatures', type=lambda text: tuple(map(float, text.split(','))), default=(0.0, 1.0),
    metavar='T,T', help='default 0,1',
  )  # fmt: skip
  return parser


def choose_heads(text: str | None) -> list[str]:
  """Returns the heads named, in the order in which they are trained.

  Raises:
    UserError: for an unknown name.
  """
  if text is None:
    return list(HEADS)
  names = [name.strip() for name in text.split(',') if name.strip()]
  for name in names:
    if name not in HEADS:
      raise cli.UserError(f'unknown head {name!r}{cli.nearest_text(name, HEADS, show_all=True)}')
  return [name for name in HEADS if name in names]


# --- Training ------------------------------------------------------------------------------------


def head_config(
  name: str, workdir: pathlib.Path, num_steps: int | None, batch_size: int | None
) -> TrainConfig:
  """Returns the configuration of a head, its paths under `workdir`, all on the same rows."""

  def moved(value):
    if isinstance(value, str) and value.startswith('runs/'):
      return str(workdir / value.removeprefix('runs/'))
    return value

  config = load_config(name)
  changes: dict[str, Any] = {
    'target': moved(config.target),
    'init_from': moved(config.init_from),
    'options': {key: moved(value) for key, value in config.options.items()},
  }
  if name == TARGET and num_steps is not None:
    changes['num_steps'] = num_steps
  if name != TARGET:
    changes['data'] = dataclasses.replace(config.data, directory=str(workdir / 'data'))
    if batch_size is not None:
      changes['batch_size'] = batch_size
    if num_steps is not None:
      changes['num_steps'] = num_steps
      every = dataclasses.replace(config.checkpoint, every=max(num_steps // 2, 1))
      changes |= {'checkpoint': every, 'eval': dataclasses.replace(config.eval, every=num_steps)}
  return dataclasses.replace(config, **changes)


def train(name: str, args: argparse.Namespace, console: Console) -> bool:
  """Trains a configuration unless that was done; returns whether it is there."""
  folder = args.workdir / name
  if (folder / 'export' / 'config.json').exists():
    return True
  console.print(f'training {name}', style='bold')
  num_steps = args.target_steps if name == TARGET else args.num_steps
  config = head_config(name, args.workdir, num_steps, args.batch_size)
  return Run(config, folder).train() is Outcome.FINISHED


def _training_facts(folder):
  """Returns what a run says about itself."""
  config = json.loads((folder / 'export' / 'config.json').read_text(encoding='utf-8'))
  facts = config.get('decodax', config)
  kept = ('step', 'num_steps', 'batch_size', 'sequence_length', 'objective', 'options', 'data')
  return {key: facts[key] for key in kept if key in facts}


# --- Decoding ------------------------------------------------------------------------------------


def make_contenders(
  target: LoadedModel, workdir: pathlib.Path, heads: Sequence[str], num_nodes: int
) -> list[Contender]:
  """Returns plain decoding, free drafts, n-grams, and every head as a chain and as a tree."""
  transformer, depth = target.transformer, num_nodes - 1
  params = Params(nnx.state(transformer))
  model = as_model(transformer)

  def simple(name, drafter):
    return Contender(name, None, 0, '', Decoder(model, drafter, params), verifiers.coupled)

  found = [
    simple('plain', drafters.plain()),
    simple(_FREE, free_drafts(depth)),
    simple('ngram', drafters.ngram(num_drafts=depth)),
  ]
  for name in heads:
    found += _of_head(name, target, workdir, num_nodes)
  return found


def _of_head(name, target, workdir, num_nodes):
  """Yields a head as a chain, as a tree where it drafts trees, and shorter where that is asked."""
  loaded = load_head(workdir / name / 'export', target.transformer)
  if isinstance(loaded.head, PromptTokens):
    yield from _of_prompts(name, loaded, target, workdir, num_nodes)
    return
  options = dict(loaded.facts['options'])
  short, depth = name.removeprefix('tiny_'), num_nodes - 1
  head, count = loaded.head, _num_trained(loaded.objective, loaded.head)
  known = option_names(loaded.name)
  variants = {short: {'num_drafts': depth}}
  if 'tree_nodes' in known:
    variants[f'{short} tree'] = {'num_drafts': depth, 'tree_nodes': num_nodes}
  if short == 'distillspec':  # the fixed lengths that a stop rule has to beat
    variants |= {f'{short} {k}': {'num_drafts': k} for k in range(1, depth)}
  for label, changes in variants.items():
    changes = {key: value for key, value in changes.items() if key in known}
    objective = get_objective(loaded.name, options | changes)
    assert objective.make_drafter is not None
    drafter = objective.make_drafter(head, target.transformer)
    yield _contender(label, name, count, objective, drafter, head, target)


def _of_prompts(name, loaded, target, workdir, num_nodes):
  """Yields prompt tokens with as many nodes, themselves among them, and with twice and four times.

  Their trees are the best for the acceptance on the text they were trained on.
  """
  head, short = loaded.head, name.removeprefix('tiny_')
  acceptance = prompt_acceptance(target, head, _training_texts(workdir), num_sites=2048)
  for label, size in (
    (short, num_nodes), (f'{short} {2 * num_nodes}', 2 * num_nodes),
    (f'{short} {4 * num_nodes}', 4 * num_nodes),
  ):  # fmt: skip
    trees = static_trees.ppd(acceptance, size, max_prompts=head.config.num_prompts)
    drafter = ppd_drafter(head, target.transformer, trees)
    count = _num_trained(loaded.objective, head)
    contender = _contender(label, name, count, loaded.objective, drafter, head, target)
    yield contender._replace(acceptance=acceptance.tolist(), expected=trees.value)


def _training_texts(workdir, num=24):
  """Returns some packed rows of the training text, without their padding."""
  corpus = packing.load_corpus(workdir / 'data')
  rows = np.linspace(0, len(corpus.tokens) - 1, min(num, len(corpus.tokens))).astype(int)
  return [corpus.tokens[row][corpus.segments[row] > 0].tolist() for row in rows]


def _contender(label, name, count, objective: Objective, drafter, head, target):
  transformer = target.transformer
  taps = objective.taps(transformer.config)
  params = objective.place(nnx.state(transformer), nnx.state(head))
  decoder = Decoder(as_model(transformer, taps=taps), drafter, params)
  shape = 'chain' if drafter.shape.is_chain else 'tree'
  return Contender(label, name, count, shape, decoder, objective.verifier)


def _num_trained(objective, head):
  _, trained, _ = nnx.split(head, objective.trainable, ...)
  return sum(leaf.size for leaf in jax.tree.leaves(trained))


def free_drafts(num_drafts: int) -> Drafter:
  """Returns a drafter that proposes the token 0 again and again, at no cost."""

  def propose(params, state, *, noise_fn, with_laws):
    del params, noise_fn, with_laws
    drafts = jnp.zeros((state.length.shape[0], num_drafts), jnp.int32)
    return chain_proposal(root_tokens(state), drafts, jnp.full_like(state.length, num_drafts)), ()

  plain = drafters.plain()
  shape = DraftShape(num_drafts + 1, num_drafts, Candidates.DETERMINISTIC)
  return plain._replace(shape=shape, propose=propose)


def held_out_prompts(workdir: pathlib.Path, num: int) -> list[measure.EncodedPrompt]:
  """Returns stretches of the documents that neither the target nor any head was trained on."""
  corpus = packing.load_corpus(workdir / 'data')
  texts = packing.prompts_of(corpus.held_out, num, _PROMPT_LENGTH, longest=_PROMPT_LENGTH)
  return [measure.EncodedPrompt(i, 'held out', text, i) for i, text in enumerate(texts)]


def compare(
  contenders: Sequence[Contender],
  prompts: Sequence[measure.EncodedPrompt],
  setting: measure.Setting,
  display: Display,
) -> dict[str, Any]:
  """Returns the numbers of all contenders at one temperature, decoded in turn."""
  requests = measure.make_requests(prompts, setting)
  compiled = {}
  for each in contenders:
    display.stage(f'compiling {each.name} at temperature {setting.temperature:g}')
    compiled[each.name] = measure.compile_method(each.decoder, each.verifier, requests[0])
  runs: dict[str, list[measure.Run]] = {each.name: [] for each in contenders}
  display.begin(list(runs), len(prompts) * setting.repeats)
  for name, some in measure.measure(compiled, requests, len(prompts), setting.repeats):
    runs[name] += some
    seconds = sum(run.decode_seconds for run in runs[name])
    tokens = sum(len(run.tokens) for run in runs[name])
    calls = sum(int(run.stats.num_target_calls) for run in runs[name])
    display.advance(name, len(runs[name]), tokens / seconds, tokens / calls)
  free = _seconds_per_call(runs[_FREE])
  rows = []
  for each in contenders:
    own = runs[each.name]
    comparable = setting.temperature == 0 or each.verifier.exactness == 'token-identical'
    summary = measure.summarize(own, runs['plain'], comparable=comparable)
    rows.append(
      {
        'name': each.name,
        'head': each.head,
        'shape': each.shape,
        'num_parameters': each.num_parameters,
        'exactness': each.verifier.exactness,
        'acceptance': each.acceptance,
        'expected_tokens_per_call': each.expected,
        'draft_share': max(0.0, 1 - free / _seconds_per_call(own)) if each.head else None,
        **summary,
      }
    )
  return {
    'temperature': setting.temperature,
    'repeated': repeated_fraction(runs['plain']),
    'methods': rows,
  }


def _seconds_per_call(runs):
  seconds = sum(run.decode_seconds for run in runs)
  return seconds / sum(int(run.stats.num_target_calls) for run in runs)


def repeated_fraction(runs: Sequence[measure.Run], size: int = 4) -> float:
  """Returns how much of the text repeats itself: its `size`-grams that were there before."""
  seen_before = total = 0
  for run in runs:
    grams = [run.tokens[i : i + size] for i in range(len(run.tokens) - size + 1)]
    seen_before += len(grams) - len(set(grams))
    total += len(grams)
  return float(np.divide(seen_before, max(total, 1)))


if __name__ == '__main__':
  sys.exit(main())

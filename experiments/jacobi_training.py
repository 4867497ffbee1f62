"""What tuning a target for Jacobi decoding gave, and what it cost.

  python -m experiments.jacobi_training --target runs/tiny_target/export \
    --data runs/tiny_target/data --tuned runs/tiny_cllm/export runs/tiny_lud/export

For the target and each tuned copy: tokens/call of greedy decoding on held-out prompts, and the
perplexity of held-out text, which the copies were not tuned on. Lossless methods count; a tuned
copy's output is its own, not the target's. Expect more tokens/call than the target makes for a few
percent of perplexity.
"""

import argparse
from collections.abc import Sequence
import functools
import pathlib
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import decodax
from decodax import drafters
from decodax import verifiers
from experiments import cli
from experiments import files
from models.adapter import as_model
from models.registry import load_model
from models.weights import LoadedModel
from train import packing
from train.objectives.language_model import next_token_loss
from train.tape import Batch
from train.tape import make_tape

_LENGTH = 256  # tokens of a held-out document that are read
_ROWS = 16  # documents at a time
_GUESS = drafters.guesses.ngram()


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code."""
  return cli.run('jacobi_training', lambda: _main(argv))


def _main(argv):
  parser = argparse.ArgumentParser(prog='python -m experiments.jacobi_training')
  parser.add_argument('--target', default='runs/tiny_target/export', metavar='DIR')
  parser.add_argument('--data', type=pathlib.Path, default='runs/tiny_target/data', metavar='DIR')
  parser.add_argument('--tuned', nargs='*', default=[], metavar='DIR')
  parser.add_argument('--window', type=cli.at_least(2), default=16)
  parser.add_argument('--num-prompts', type=cli.at_least(1), default=32)
  parser.add_argument('--max-new-tokens', type=cli.at_least(1), default=64)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('results/jacobi'))
  args = parser.parse_args(argv)
  held_out = packing.load_corpus(args.data).held_out
  prompts = packing.prompts_of(held_out, args.num_prompts, 48, longest=_LENGTH)
  found = {}
  for name in (args.target, *args.tuned):
    with cli.user_errors():
      loaded = load_model(name)
    rates = {
      method: calls(loaded, drafter, prompts, args.max_new_tokens)
      for method, drafter in _methods(args.window).items()
    }
    found[name] = {'perplexity': perplexity(loaded, held_out), **rates}
  _print(found)
  files.write_whole(args.out / 'training.json', files.to_json(found))
  return 0


def _methods(window):
  return {
    'jacobi': drafters.jacobi(num_drafts=window - 1),
    'jacobi-ngram': drafters.jacobi(num_drafts=window - 1, guess_fn=_GUESS),
    'lud/coupled': drafters.lexical_units(pad_id=0, num_drafts=3, confidence=0.6),
  }


def perplexity(loaded: LoadedModel, documents: Sequence) -> float:
  """Returns the perplexity of the beginnings of documents, token by token."""
  model = loaded.transformer
  graph, state = nnx.split(model)

  @jax.jit
  def sums(state, batch):
    head = nnx.merge(graph, state)
    loss = next_token_loss(head, None, make_tape(None, batch), jax.random.key(0), 0)
    return loss.total, loss.weight

  total = weight = 0.0
  for first in range(0, len(documents), _ROWS):
    rows = np.zeros((_ROWS, _LENGTH), np.int32)
    valid = np.zeros((_ROWS, _LENGTH), bool)
    for row, document in enumerate(documents[first : first + _ROWS]):
      tokens = list(document.tokens)[:_LENGTH]
      rows[row, : len(tokens)], valid[row, : len(tokens)] = tokens, True
    places = jnp.where(valid, jnp.arange(_LENGTH)[None], 0)
    batch = Batch(jnp.asarray(rows), places, jnp.asarray(valid, jnp.int32), jnp.asarray(valid))
    more, count = sums(state, batch)
    total, weight = total + float(more), weight + float(count)
  return float(np.exp(total / weight))


def calls(
  loaded: LoadedModel, drafter: decodax.Drafter, prompts: Sequence, max_new_tokens: int
) -> float:
  """Returns greedy tokens/call."""
  model = as_model(loaded.transformer)
  request = decodax.make_request(
    prompts, max_new_tokens=max_new_tokens, vocab_size=model.vocab_size, eos_ids=loaded.eos_ids
  )
  run = functools.partial(decodax.decode, model=model, drafter=drafter, verifier=verifiers.greedy)
  params = decodax.Params(nnx.state(loaded.transformer))
  stats = jax.device_get(jax.jit(run)(params, request)).stats
  return float(stats.num_emitted.sum() / stats.num_target_calls.sum())


def _print(found):
  names = list(next(iter(found.values())))
  print('| model |', ' | '.join(names), '|')
  print('|---|', '---|' * len(names), sep='')
  for name, values in found.items():
    print(f'| {name} |', ' | '.join(f'{values[key]:.2f}' for key in names), '|')


if __name__ == '__main__':
  sys.exit(main())

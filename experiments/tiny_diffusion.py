"""The tiny diffusion network that experiments run on, trained when it is not there yet."""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

import decodax
from decodax.diffusion.policies import Filter
from decodax.diffusion.policies import PairFilter
from decodax.types import Request
from models.diffusion import LoadedDiffusion
from models.diffusion import load_diffusion
from models.hf import load_hf
from train import list_tasks
from train.config import load_config
from train.export import load_head
from train.list_tasks import Example

NAME = 'tiny-diffusion'
RUNS = pathlib.Path('runs')
CONFIG = 'tiny_diffusion'
FILTER = RUNS / 'tiny_filter' / 'filter.npz'
PAIR_FILTER = RUNS / 'tiny_filter' / 'pairs.npz'
# Networks made of the tiny one, by what `diffusion_methods` calls them.
DISTILLED = {
  'distilled': RUNS / 'tiny_dparallel' / 'export',
  'forced': RUNS / 'tiny_d2f' / 'export',
}


def load(path: str, say: Callable[[str], None]) -> LoadedDiffusion:
  """Returns the network in a folder; by the name of the tiny one, that, trained first if need be.

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: if it holds something else, or its vocabulary is not that of the list tasks.
  """
  if path == NAME:
    directory = RUNS / CONFIG / 'export'
    if not (directory / 'config.json').is_file():
      say(f'training {NAME}, once: some minutes on two cores')
      train_tiny()
    path = str(directory)
  say(f'loading {path}')
  loaded = load_diffusion(path)
  found = loaded.tokenizer.encode(' '.join(list_tasks.VOCABULARY[1:]))
  if list(found) != list(range(1, len(list_tasks.VOCABULARY))):
    raise ValueError(f'{path} was not trained on the list tasks: its tokenizer is another')
  return loaded


def train_tiny() -> None:
  """Trains the tiny network in `runs/`.

  Raises:
    ValueError: if what training needs is not installed.
    RuntimeError: if the training run did not reach its end.
  """
  try:
    from train.run import Outcome  # only who trains needs Optax and Orbax
    from train.run import Run
  except ImportError as error:
    raise ValueError(f"training needs packages: pip install -e '.[train]' ({error})") from error

  outcome = Run(load_config(CONFIG), RUNS / CONFIG).train()
  if outcome is not Outcome.FINISHED:
    raise RuntimeError(f'training stopped: {outcome.name.lower()}; start again to go on')


def trained_parts(say: Callable[[str], None]) -> dict[str, Any]:
  """Returns what was trained besides: filters of Learn2PD, networks of dParallel and D2F."""
  parts: dict[str, Any] = {}
  if FILTER.is_file():
    parts['filter'] = load_filter(FILTER)
  if PAIR_FILTER.is_file():
    parts['pair filter'] = load_filter(PAIR_FILTER, PairFilter)
  there = {name: each for name, each in DISTILLED.items() if (each / 'config.json').is_file()}
  if there:
    target = load_hf(RUNS / CONFIG / 'export').transformer
    for name, folder in there.items():
      say(f'loading {folder}')
      parts[name] = nnx.state(load_head(folder, target).head)
  return parts


def load_filter(path: pathlib.Path, kind: Any = Filter) -> Any:
  """Returns the filter in a file that `train.learn2pd` wrote, or of another kind by another."""
  with np.load(path) as file:
    return kind(*(jnp.asarray(file[f'arr_{i}']) for i in range(len(kind._fields))))


def make_request(
  examples: Sequence[Example], mask_id: int, *, temperature: float = 0.0, seed: int = 0
) -> Request:
  """Returns the questions of some examples, with a canvas for each answer."""
  prompts = [list_tasks.to_ids(example.prompt) for example in examples]
  longest = max(map(len, prompts))
  return decodax.make_request(
    prompts,
    max_new_tokens=list_tasks.CANVAS,
    vocab_size=mask_id + 1,
    temperature=temperature,
    eos_ids=[list_tasks.EOS_ID],
    seed=seed,
    capacity=longest + list_tasks.CANVAS,
  )


def answers(result: Any) -> list[tuple[str, ...]]:
  """Returns the words that a result has for each row."""
  return [
    list_tasks.to_words([int(t) for t in tokens[start:end]])
    for tokens, start, end in zip(result.tokens, result.prompt_length, result.length, strict=True)
  ]

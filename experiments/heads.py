"""Trained heads as the methods use them: from a folder to a drafter, its parameters and taps."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any, NamedTuple

from flax import nnx

from decodax import drafters
from decodax.drafters.expander import Expander
from decodax.types import Drafter
from decodax.types import Params
from models.heads import head_expander
from models.heads import head_taps
from models.heads.checkpoints import load_published
from models.transformer import Transformer
from train.export import FORMAT
from train.export import load_head
from train.objective import get_objective
from train.objective import option_names

_NUM_DRAFTS = 4


class Head(NamedTuple):
  """A trained head."""

  module: Any
  path: str
  objective: str | None  # what it was trained by; None in a layout of others
  options: Mapping[str, Any]  # of the objective

  @property
  def drafter(self) -> Any:
    """The module that drafts: the head itself, or what an acceptance head stops."""
    return getattr(self.module, 'drafter', self.module)


class Drafting(NamedTuple):
  """What decoding with a head takes."""

  drafter: Drafter
  params: Params
  taps: tuple[int, ...]


def load(directory: str | pathlib.Path, target: Transformer) -> Head:
  """Returns the head in a folder: decodax's own format, or a layout of `models.heads.checkpoints`.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is damaged, or for another target.
  """
  path = pathlib.Path(directory)
  if not (path / 'config.json').is_file():
    raise FileNotFoundError(f'no config.json in {path}: is it the folder of a head?')
  config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
  if config.get('format') == FORMAT:
    loaded = load_head(path, target)
    return Head(loaded.head, str(path), loaded.name, loaded.facts['options'])
  return Head(load_published(path, target), str(path), None, {})


def chain(head: Head, target: Transformer, num_drafts: int | None) -> Drafting:
  """Returns a chain as the head was trained for it, of `num_drafts` if that is given."""
  if head.objective is None:
    expander = head_expander(head.module, target)
    num_drafts = num_drafts or min(_NUM_DRAFTS, expander.max_depth or _NUM_DRAFTS)
    drafter = drafters.chain_drafter(expander, num_drafts=num_drafts)
    params = Params(nnx.state(target), nnx.state(head.module))
    return Drafting(drafter, params, head_taps(head.module))
  known = option_names(head.objective)
  changes = {'num_drafts': num_drafts, 'tree_nodes': 0}
  changes = {k: v for k, v in changes.items() if k in known and v is not None}
  objective = get_objective(head.objective, {**head.options, **changes})
  if objective.make_drafter is None:
    raise ValueError(f'{head.path} was trained by {head.objective!r}, which drafts nothing')
  params = objective.place(nnx.state(target), nnx.state(head.module))
  return Drafting(
    objective.make_drafter(head.module, target), params, objective.taps(target.config)
  )


def expander(head: Head, target: Transformer) -> tuple[Expander, Params, tuple[int, ...]]:
  """Returns how the head reads the nodes of a tree, the parameters and the taps."""
  module = head.drafter
  params = Params(nnx.state(target), nnx.state(module))
  return head_expander(module, target), params, head_taps(module)

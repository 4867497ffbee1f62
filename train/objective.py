"""What an objective is: everything the trainer must know about one kind of trained module.

To add one: a module in `models/`, a file `train/objectives/NAME.py` with a function
`make_objective(**options) -> Objective`, and a configuration in `train/configs/`. Nothing else is
edited.

Inside functions, modules come merged (`nnx.Module`), never as graph and state; they must not be
changed. Axes: `B` rows, `T` tokens, `V` vocabulary.
"""

from collections.abc import Callable, Mapping
import importlib
import inspect
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import numpy as np

from decodax import verifiers
from decodax.types import Drafter
from decodax.types import Params
from decodax.types import Verifier
from models.config import TransformerConfig
from models.transformer import Transformer
from train.losses import Mean
from train.tape import Batch
from train.tape import Tape


class Loss(NamedTuple):
  """What is minimised, `total / weight`, and what is shown.

  Both are sums over every token of the batch, so that any split of the batch over devices or
  micro-batches gives the same number: sums are added up and divided once. `weight` must not depend
  on the parameters; in most objectives it is the number of supervised tokens.
  """

  total: jax.Array  # f32[] sum of weighted losses
  weight: jax.Array  # f32[] what to divide by
  metrics: Mapping[str, Mean] = {}  # 'accuracy/1', ...: see `train.losses.depth_metrics`


def no_taps(config: TransformerConfig) -> tuple[int, ...]:
  """Returns (): the hidden state after the final norm is all that is needed."""
  del config
  return ()


def as_drafter_params(target: nnx.State, head: nnx.State) -> Params:
  """Returns decoding parameters in which the whole head belongs to the drafter."""
  return Params(target, head)


class Objective(NamedTuple):
  """One kind of trained module. `head` is the module, whatever it is."""

  init: Callable[[nnx.Rngs, Transformer | None, np.ndarray], nnx.Module]
  """(rngs, target, token_counts i64[V] of supervised tokens in the training data) -> the head.
  Its `nnx.Param`s are trained. What is not (ids of a draft vocabulary, a copy of something frozen)
  is another kind of `nnx.Variable`. Also called under `nnx.eval_shape`, to learn the shapes, with
  counts of zero: shapes must not depend on values."""
  loss: Callable[[Any, Any, Tape, jax.Array, jax.Array], Loss]
  """(head, target, tape, rng_key, step i32[]) -> Loss. The target is frozen: no gradient reaches
  it. Everything random comes from `rng_key`, which differs from step to step."""
  make_drafter: Callable[[Any, Any], Drafter] | None = None
  """(head, target) -> the drafter for real decoding, around their structure only: its functions
  take values from `Params`. It decodes with `as_model(target, taps=taps(config))`, whose features
  are named as on the tape. None: nothing is decoded while training."""
  verifier: Verifier = verifiers.coupled  # lossless for the drafter's proposals at T = 1
  place: Callable[[nnx.State, nnx.State], Params] = as_drafter_params
  """(state of the target, state of the head) -> where decoding looks for them."""
  taps: Callable[[TransformerConfig], tuple[int, ...]] = no_taps
  """(configuration of the target) -> layers whose incoming residual stream the tape has as
  `taps['layer_i']`."""
  trainable: Any = nnx.Param  # a filter of flax.nnx: which of the head's variables are trained
  rewrite: Callable[[Any, Any, Batch, jax.Array, jax.Array], Batch] | None = None
  """(head, target, batch, rng_key, step) -> another batch of the same shapes, before the tape is
  made: on-policy text. No gradient passes."""
  needs_target: bool = True
  is_target: bool = False  # the head is a target tuned: it is exported as a model
  describe: Callable[[Any], Mapping[str, Any]] | None = None
  """(model) -> what the config.json of an exported model without a target is to say besides."""


def get_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
  """Returns the objective in `train/objectives/NAME.py`, made with these options.

  Raises:
    ValueError: if there is none of this name, or it has no such option.
  """
  options = options or {}
  make, known = _factory(name), option_names(name)
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(
      f'objective {name!r} has no option {", ".join(unknown)}; it has {", ".join(known) or "none"}'
    )
  return make(**options)


def option_names(name: str) -> list[str]:
  """Returns the names of an objective's options."""
  return list(inspect.signature(_factory(name)).parameters)


def objective_names() -> list[str]:
  """Returns the names of all objectives: the files of `train/objectives`."""
  folder = pathlib.Path(__file__).parent / 'objectives'
  return sorted(path.stem for path in folder.glob('*.py') if not path.stem.startswith('_'))


def _factory(name):
  if name not in objective_names():
    raise ValueError(f'unknown objective {name!r}; there are {", ".join(objective_names())}')
  return importlib.import_module(f'train.objectives.{name}').make_objective

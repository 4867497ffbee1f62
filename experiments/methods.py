"""The methods that the experiments can run. To add one, add an entry to `_ENTRIES`.

An entry says how to build its drafter for given weights, and which verifiers go with it: the first
is the default and bears the entry's name, each other one gives a method `name/verifier`.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.types import Candidates
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import Model
from decodax.types import Params
from decodax.types import Request
from decodax.types import Verifier
from models.adapter import as_model
from models.weights import LoadedModel

PLAIN = 'plain'  # the method that the others are compared with


class Setup(NamedTuple):
  """What a method may be built from."""

  target: LoadedModel
  draft: LoadedModel | None = None
  num_drafts: int | None = None  # tokens drafted a round; None: the method's own choice
  exit_layer: int | None = None  # for early exit; None: three quarters of the layers


class Decoder(NamedTuple):
  """A method built for given weights."""

  model: Model
  drafter: Drafter
  params: Params

  def read(self, params: Params, request: Request) -> DecodeState:
    """Returns the state after the prompts are read: what is compiled before the loop."""
    state = decodax.init_state(params, request, model=self.model, drafter=self.drafter)
    return decodax.prefill(params, state, model=self.model, drafter=self.drafter)


class Method(NamedTuple):
  """A way of decoding."""

  name: str
  summary: str  # one line for a person who chooses among methods
  build: Callable[[Setup], Decoder]
  candidates: Candidates  # what its drafter proposes
  verifier: Verifier
  needs_draft: bool = False  # weights of a draft model

  def exactness(self, temperature: float) -> str:
    """Returns what the output has in common with plain decoding at this temperature."""
    if temperature == 0 and self.verifier.lossless:
      return 'token-identical'
    return self.verifier.exactness


def _plain(setup: Setup) -> Decoder:
  return _decoder(setup, drafters.plain())


def _ngram(setup: Setup) -> Decoder:
  return _decoder(setup, drafters.ngram(num_drafts=setup.num_drafts or 4))


def _early_exit(setup: Setup) -> Decoder:
  transformer = setup.target.transformer
  # Without training only late layers agree with the last one, so one draft pays best.
  exit_layer = setup.exit_layer or max(1, transformer.config.num_layers * 3 // 4)
  exit_model = as_model(transformer, exit_layer=exit_layer)
  return _decoder(setup, drafters.early_exit(exit_model, num_drafts=setup.num_drafts or 1))


def _draft_model(setup: Setup) -> Decoder:
  draft, target = setup.draft, setup.target
  if draft is None:
    raise ValueError('draft-model needs the weights of a draft model: give --draft')
  sizes = [each.transformer.config.vocab_size for each in (draft, target)]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f'the draft model {draft.name} has a vocabulary of {sizes[0]}, {target.name} one of '
      f'{sizes[1]}: they must share one'
    )
  drafter = drafters.draft_model(as_model(draft.transformer), num_drafts=setup.num_drafts or 4)
  return _decoder(setup, drafter, nnx.state(draft.transformer))


def _decoder(setup, drafter, drafter_params=()):
  transformer = setup.target.transformer
  params = Params(nnx.state(transformer), drafter_params)
  return Decoder(as_model(transformer), drafter, params)


class _Entry(NamedTuple):
  name: str
  summary: str
  build: Callable[[Setup], Decoder]
  candidates: Candidates
  verifiers: tuple[Verifier, ...] = (verifiers.coupled,)
  needs_draft: bool = False


_ENTRIES = (
  _Entry(PLAIN, 'one token per target call', _plain, Candidates.NONE),
  _Entry(
    'ngram', 'copies what followed the last tokens earlier in the text', _ngram,
    Candidates.DETERMINISTIC,
  ),
  _Entry(
    'early-exit', 'the first layers draft for all of them', _early_exit,
    Candidates.SAMPLED, (verifiers.coupled, verifiers.speculative),
  ),
  _Entry(
    'draft-model', 'a smaller model with the same vocabulary drafts', _draft_model,
    Candidates.SAMPLED, (verifiers.coupled, verifiers.speculative), needs_draft=True,
  ),
)  # fmt: skip


def _methods(entry):
  for index, verifier in enumerate(entry.verifiers):
    name = entry.name if index == 0 else f'{entry.name}/{verifier.name}'
    yield Method(name, entry.summary, entry.build, entry.candidates, verifier, entry.needs_draft)


METHODS: dict[str, Method] = {
  method.name: method for entry in _ENTRIES for method in _methods(entry)
}


def default_methods(temperature: float, *, has_draft: bool = False) -> list[str]:
  """Returns the names of the methods to run when none are named.

  Those are all whose weights are there; at temperature 0 only one of each drafter, since all
  lossless verifiers then decide alike.
  """
  return [
    name
    for name, method in METHODS.items()
    if (has_draft or not method.needs_draft) and (temperature > 0 or '/' not in name)
  ]

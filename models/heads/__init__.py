"""Heads that draft for a frozen target. A head is a Flax module in a file of its own.

To add one, copy the file that is nearest: `medusa.py` (nothing carried but the last hidden state),
`eagle.py` (one layer that goes on from its own output), `kangaroo.py` (runs a part of the target).
A head needs an `Expander` only: chains and trees of every kind draft with it. Then name it below,
and give it an objective and a configuration in `train/`. Prompt tokens (`ppd.py`) are not run after
the target but read by it, so they have a drafter of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from decodax.drafters.expander import Expander
from models.draft_lm import DraftLM
from models.draft_lm import draft_lm_expander
from models.heads.eagle import Eagle
from models.heads.eagle import eagle_expander
from models.heads.eagle3 import Eagle3
from models.heads.eagle3 import eagle3_expander
from models.heads.hydra import Hydra
from models.heads.hydra import hydra_expander
from models.heads.hydra import with_own_projections
from models.heads.kangaroo import Kangaroo
from models.heads.kangaroo import kangaroo_expander
from models.heads.medusa import Medusa
from models.heads.medusa import medusa_expander
from models.heads.ppd import PromptTokens
from models.heads.ppd import ppd_expander
from models.transformer import Transformer


class HeadKind(NamedTuple):
  """How one kind of head is used."""

  module: type
  expander: Callable[[Any, Transformer], Expander]
  """(head, target) -> how it drafts; its parameters are `Params.drafter`."""
  taps: Callable[[Any], tuple[int, ...]]
  """(head) -> the target's residual streams that it reads: `as_model(target, taps=...)`."""
  width: Callable[[Any], int]
  """(head) -> of the hidden state that a length control sees of each draft."""
  for_decoding: Callable[[Any, Transformer], Any] = lambda head, target: head
  """(head, target) -> the head laid out as it decodes fastest."""


def _no_taps(head) -> tuple[int, ...]:
  del head
  return ()


HEADS: Mapping[str, HeadKind] = {
  'medusa': HeadKind(Medusa, medusa_expander, _no_taps, lambda head: head.config.hidden_size),
  'hydra': HeadKind(
    Hydra,
    hydra_expander,
    _no_taps,
    lambda head: head.config.hidden_size,
    for_decoding=with_own_projections,
  ),
  'eagle': HeadKind(Eagle, eagle_expander, _no_taps, lambda head: head.layer_config.hidden_size),
  'eagle3': HeadKind(
    Eagle3,
    eagle3_expander,
    lambda head: head.config.taps,
    lambda head: head.layer_config.hidden_size,
  ),
  'kangaroo': HeadKind(
    Kangaroo,
    kangaroo_expander,
    lambda head: (head.config.exit_layer,),
    lambda head: head.config.layer.hidden_size,
  ),
  'ppd': HeadKind(PromptTokens, ppd_expander, _no_taps, lambda head: head.config.hidden_size),
  'draft_lm': HeadKind(
    DraftLM,
    lambda head, target: draft_lm_expander(head),
    _no_taps,
    lambda head: head.decoder.config.hidden_size,
  ),
}


def kind_of(head: Any) -> HeadKind:
  """Returns the kind of a head.

  Raises:
    ValueError: if it is none of `HEADS`.
  """
  for kind in HEADS.values():
    if type(head) is kind.module:
      return kind
  raise ValueError(f'not a head: {type(head).__name__}; heads are {", ".join(HEADS)}')


def head_expander(head: Any, target: Transformer) -> Expander:
  """Returns how any head drafts; its parameters are `Params.drafter`."""
  return kind_of(head).expander(head, target)


def head_for_decoding(head: Any, target: Transformer) -> Any:
  """Returns any head laid out as it decodes fastest; it drafts the same."""
  return kind_of(head).for_decoding(head, target)


def head_taps(head: Any) -> tuple[int, ...]:
  """Returns the target's residual streams that any head reads."""
  return kind_of(head).taps(head)


def head_width(head: Any) -> int:
  """Returns the width of the hidden state that a length control sees of each draft."""
  return kind_of(head).width(head)

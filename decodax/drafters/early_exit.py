"""Self-speculation by early exit: the target's first layers draft for all of them.

Axes: `D` drafts.
"""

from decodax.controllers import Controller
from decodax.drafters.chain import chain_drafter
from decodax.drafters.expander import exit_expander
from decodax.types import Drafter
from decodax.types import Model


def early_exit(
  exit_model: Model, *, num_drafts: int = 3, controller: Controller | None = None
) -> Drafter:
  """Returns a drafter that runs a truncated target on the target's own parameters and cache.

  Args:
    exit_model: the target cut short: its `extend` reads the target's cache and parameters and runs
      only the first layers. With `models`: `as_model(transformer, exit_layer=...)`.
    num_drafts: D, tokens drafted a round at most.
    controller: of the length; None drafts `num_drafts` always.

  Raises:
    ValueError: if num_drafts < 1, or the model has no scratch blocks.

  Source: Draft & Verify, arXiv:2309.08168; LayerSkip, arXiv:2404.16710.
  """
  return chain_drafter(exit_expander(exit_model), num_drafts=num_drafts, controller=controller)

"""An independent draft model that proposes a chain.

Axes: `D` drafts.
"""

from decodax.controllers import Controller
from decodax.drafters.chain import chain_drafter
from decodax.drafters.expander import model_expander
from decodax.types import Drafter
from decodax.types import Model


def draft_model(
  model: Model, *, num_drafts: int = 4, controller: Controller | None = None
) -> Drafter:
  """Returns a drafter that samples a chain from another language model.

  Its parameters are `Params.drafter`; its vocabulary must be the target's.

  Args:
    model: the draft model.
    num_drafts: D, tokens drafted a round at most.
    controller: of the length; None drafts `num_drafts` always.

  Raises:
    ValueError: if num_drafts < 1, or the model has no scratch blocks.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
  """
  return chain_drafter(model_expander(model), num_drafts=num_drafts, controller=controller)

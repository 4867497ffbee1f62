"""SpecDec++: when to stop the draft model of `tiny_distillspec`.

  python -m train.main --config tiny_acceptance --workdir runs/tiny_acceptance

Expect RESULT.

The paper counts a rejection six times and stops at 0.3, for a draft model a tenth as dear as its
target and nine drafts in ten accepted. Here a draft costs more and fails more often, and the
threshold is that of honest probabilities.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config(
    'acceptance',
    drafter='runs/tiny_distillspec/export',
    reject_weight=1.0,
    threshold=0.6,
    min_drafts=1,
    num_steps=100,
  )

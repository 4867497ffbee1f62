"""SpecDec++: when to stop the draft model of `tiny_distillspec`.

  python -m train.main --config tiny_acceptance --workdir runs/tiny_acceptance

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('acceptance', drafter='runs/tiny_distillspec/export', num_steps=100)

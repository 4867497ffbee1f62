"""EAGLE-1: a layer that guesses the target's next hidden state.

  python -m train.main --config tiny_eagle --workdir runs/tiny_eagle

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('eagle', num_drafts=4)

"""Kangaroo: an adapter after two of the target's layers.

  python -m train.main --config tiny_kangaroo --workdir runs/tiny_kangaroo

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('kangaroo', exit_layer=2, num_drafts=4)

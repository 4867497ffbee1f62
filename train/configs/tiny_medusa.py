"""Medusa-1 heads: four tokens ahead from the last hidden state alone.

  python -m train.main --config tiny_medusa --workdir runs/tiny_medusa

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('medusa', num_heads=4)

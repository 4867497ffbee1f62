"""Hydra heads: as Medusa's, but each reads the tokens drafted before it.

  python -m train.main --config tiny_hydra --workdir runs/tiny_hydra

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('hydra', num_heads=4)

"""Hydra++: a layer before the heads, deeper heads, and the target's law as the teacher.

  python -m train.main --config tiny_hydra_pp --workdir runs/tiny_hydra_pp

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('hydra', num_heads=4, num_layers=4, prefix=True, divergence='forward_kl')

"""A target taught to answer paddings, so that it emits several tokens it is sure of at once (LUD).

  python -m train.main --config tiny_lud --workdir runs/tiny_lud

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._own import own_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return own_config('lexical_units', num_drafts=3, num_places=24)

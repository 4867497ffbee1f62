"""EAGLE-3: features of three depths, a draft vocabulary, trained on its own output.

  python -m train.main --config tiny_eagle3 --workdir runs/tiny_eagle3

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('eagle3', steps=4, draft_vocab_size=1024)

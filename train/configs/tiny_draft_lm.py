"""A draft model of its own with half of the vocabulary, trained on text (FastDraft).

  python -m train.main --config tiny_draft_lm --workdir runs/tiny_draft_lm

Expect RESULT.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config(
    'draft_lm', hidden_size=96, num_layers=2, intermediate_size=192, draft_vocab_size=1024
  )

"""Prompt tokens: three embeddings, 384 numbers in all, that the target reads behind its drafts.

  python -m train.main --config tiny_ppd --workdir runs/tiny_ppd

Expect 300 steps, real tokens/call shown every 100 of them, and the prompt tokens in
runs/tiny_ppd/export. A run of 100 steps, for a target of 300 steps, had 1.25 at first and 1.30 at
last at temperature 0. How they compare with heads: experiments.drafters.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('ppd', learning_rate=1e-2, num_prompts=3)

"""Prompt tokens: three embeddings, 384 numbers in all, that the target reads behind its drafts.

  python -m train.main --config tiny_ppd --workdir runs/tiny_ppd

Expect 300 steps, real tokens/call shown every 100 of them, and the prompt tokens in
runs/tiny_ppd/export. How they compare with heads: experiments.drafters.
"""

from train.config import TrainConfig
from train.configs._tiny import head_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return head_config('ppd', learning_rate=1e-2, num_prompts=3)

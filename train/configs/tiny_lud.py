"""A target taught to answer paddings, so that it emits several tokens it is sure of at once (LUD).

  python -m train.main --config tiny_lud --workdir runs/tiny_lud

Expect tokens/call at step 0, which is the target's own, and at the end. What it cost in perplexity
is shown by

  python -m experiments.jacobi_training --tuned runs/tiny_lud/export
"""

from train.config import TrainConfig
from train.configs._own import own_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return own_config('lexical_units', num_drafts=3, num_places=24)

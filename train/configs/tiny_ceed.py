"""As `tiny_cllm`, where the data know better than the target: mixed labels (CEED-VLA).

The ids of text tokens are no bins of an action: here `max_error` only shows how labels are mixed.

  python -m train.trajectories --model runs/tiny_target/export --data stdlib pydoc \
    --num 6000 --num-windows 1 --labels demonstration --out runs/tiny_ceed.jsonl
  python -m train.main --config tiny_ceed --workdir runs/tiny_ceed

Expect tokens/call at step 0, which is the target's own, and at the end. What it cost in perplexity
is shown by

  python -m experiments.jacobi_training --tuned runs/tiny_ceed/export
"""

from train.config import TrainConfig
from train.configs._own import own_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return own_config(
    'consistency',
    sources=('runs/tiny_ceed.jsonl',),
    window=16,
    demonstration=True,
    max_error=300.0,
  )

"""A target tuned so that Jacobi decoding takes fewer calls (CLLM).

  python -m train.trajectories --model runs/tiny_target/export --data stdlib pydoc \
    --num 640 --out runs/tiny_cllm.jsonl
  python -m train.main --config tiny_cllm --workdir runs/tiny_cllm

Expect tokens/call at step 0, which is the target's own, and at the end. What it cost in perplexity
is shown by

  python -m experiments.jacobi_training --tuned runs/tiny_cllm/export
"""

from train.config import TrainConfig
from train.configs._own import own_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return own_config('consistency', sources=('runs/tiny_cllm.jsonl',), window=16)

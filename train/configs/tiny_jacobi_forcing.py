"""As `tiny_cllm`, with unsettled windows in front of a window (Jacobi Forcing).

  python -m train.trajectories --model runs/tiny_target/export --data stdlib pydoc \
    --num 640 --choose progressive --noise-windows 4 --out runs/tiny_jacobi_forcing.jsonl
  python -m train.main --config tiny_jacobi_forcing --workdir runs/tiny_jacobi_forcing

Expect tokens/call at step 0, which is the target's own, and at the end. What it cost in perplexity
is shown by

  python -m experiments.jacobi_training --tuned runs/tiny_jacobi_forcing/export
"""

from train.config import TrainConfig
from train.configs._own import own_config


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return own_config(
    'consistency', sources=('runs/tiny_jacobi_forcing.jsonl',), window=16, noise_windows=4
  )

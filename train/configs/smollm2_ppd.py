"""Prompt tokens for SmolLM2-135M-Instruct, on what the model itself asks and answers.

The data is that of `smollm2_hydra_pp`, which says how it is made; then

  python -m train.main --config smollm2_ppd --workdir runs/smollm2_ppd
"""

from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig

_DATA = 'runs/smollm2'


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return TrainConfig(
    objective='ppd',
    options={'num_prompts': 3, 'num_anchors': 32},
    target='smollm2-135m-instruct',
    data=DataConfig(
      sources=(f'{_DATA}/greedy.jsonl', f'{_DATA}/sampled.jsonl'), num_held_out=32
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, weight_decay=0.0),
    eval=EvalConfig(every=0),
    checkpoint=CheckpointConfig(every=20),
    num_steps=100,
    batch_size=4,
  )  # fmt: skip

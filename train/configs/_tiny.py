"""What the tiny heads share: target, corpus, and the same budget of tokens."""

from typing import Any

from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig

TARGET = 'runs/tiny_target/export'
NUM_STEPS, BATCH_SIZE, LENGTH = 300, 16, 256  # 1.2 M tokens


def head_config(
  objective: str,
  *,
  learning_rate: float = 2e-3,
  weight_decay: float = 0.0,
  num_steps: int = NUM_STEPS,
  init_from: str = '',
  **options: Any,
) -> TrainConfig:
  """Returns the configuration of a head, with options of its objective."""
  return TrainConfig(
    objective=objective,
    options=options,
    target=TARGET,
    init_from=init_from,
    data=DataConfig(sequence_length=LENGTH),
    optimizer=OptimizerConfig(
      learning_rate=learning_rate, warmup_steps=20, weight_decay=weight_decay
    ),
    eval=EvalConfig(every=100),
    checkpoint=CheckpointConfig(every=100),
    num_steps=num_steps,
    batch_size=BATCH_SIZE,
  )

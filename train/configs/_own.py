"""What the configurations share that tune the tiny target itself: the budget and the schedule."""

import dataclasses
from typing import Any

from train.config import DEFAULT_SOURCES
from train.config import DataConfig
from train.config import TrainConfig
from train.configs._tiny import head_config


def own_config(
  objective: str,
  *,
  sources: tuple[str, ...] = DEFAULT_SOURCES,
  target: str = 'runs/tiny_target/export',
  learning_rate: float = 5e-4,
  num_steps: int = 100,
  sequence_length: int = 256,
  **options: Any,
) -> TrainConfig:
  """Returns the configuration of a tuned target, with options of its objective."""
  config = head_config(objective, learning_rate=learning_rate, num_steps=num_steps, **options)
  return dataclasses.replace(
    config,
    target=target,
    data=DataConfig(sources=sources, sequence_length=sequence_length),
    eval=dataclasses.replace(config.eval, temperatures=(0.0,)),
  )

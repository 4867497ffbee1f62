"""EAGLE-3 for SmolLM2-135M-Instruct, on what the model itself asks and answers.

  python -m train.invent --model smollm2-135m-instruct --out runs/smollm2/asked.jsonl
  python -m train.regenerate --model smollm2-135m-instruct --data runs/smollm2/asked.jsonl \
      --out runs/smollm2/own.jsonl --batch-size 48 --max-new-tokens 192
  python -m train.main --config smollm2_eagle3 --workdir runs/smollm2_eagle3
"""

from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return TrainConfig(
    objective='eagle3',
    options={'steps': 3, 'draft_vocab_size': 4096},
    target='smollm2-135m-instruct',
    data=DataConfig(sources=('runs/smollm2/own.jsonl',), sequence_length=256, num_held_out=32),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
    eval=EvalConfig(every=100, temperatures=(0.0,)),
    checkpoint=CheckpointConfig(every=50),
    num_steps=600,
    batch_size=8,
  )

"""A 1.6 M target on the Python standard library: what the tiny draft heads are trained for.

  python -m train.main --config tiny_target --workdir runs/tiny_target

Expect, after 1000 steps (4 M tokens, about 17 minutes on two cores), a loss of 3.2 and a token
accuracy of 0.34. The model is in runs/tiny_target/export, a Hugging Face folder with a tokenizer of
2048 tokens. `--set num_steps=300` gives a poorer one in five minutes, good enough to try a head on.
"""

from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return TrainConfig(
    objective='language_model',
    options={
      'as_target': True,
      'hidden_size': 128,
      'num_layers': 8,
      'num_heads': 4,
      'num_kv_heads': 4,
      'intermediate_size': 256,
    },
    data=DataConfig(sequence_length=256, vocab_size=2048, num_held_out=64),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.05),
    eval=EvalConfig(every=0),
    checkpoint=CheckpointConfig(every=200),
    num_steps=1000,
    batch_size=16,
  )

"""The tiny diffusion network, distilled into one that starts later blocks before it is done.

  python -m train.main --config tiny_diffusion --workdir runs/tiny_diffusion
  python -m train.learn2pd --answers runs/tiny_answers.jsonl
  python -m train.main --config tiny_d2f --workdir runs/tiny_d2f

Expect two to three minutes on two cores. `python -m experiments.parallel_bench` then has the method
`pipelined`: docs/diffusion.md has what it gains.
"""

from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig
from train.list_tasks import VOCABULARY

BLOCK_SIZE = 4


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return TrainConfig(
    objective='d2f',
    options={
      'mask_id': len(VOCABULARY),
      'block_size': BLOCK_SIZE,
      'lowest_rate': 0.2,
      'highest_first_rate': 1.0,
      'highest_rate': 1.0,
    },
    target='runs/tiny_diffusion/export',
    data=DataConfig(sources=('runs/tiny_answers.jsonl',), sequence_length=256, num_held_out=16),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=20, schedule='constant'),
    eval=EvalConfig(every=0, num_prompts=16),
    checkpoint=CheckpointConfig(every=100),
    num_steps=200,
    batch_size=8,
  )

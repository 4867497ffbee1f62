"""Hydra++ for SmolLM2-135M-Instruct, on what the model itself asks, and what it answers.

  python -m train.invent --model smollm2-135m-instruct --num 827 --out runs/smollm2/asked.jsonl
  python -m train.instruct --num 800 --out runs/smollm2/about.jsonl
  for turns in asked about; do
    python -m train.regenerate --model smollm2-135m-instruct --data runs/smollm2/$turns.jsonl \
      --out runs/smollm2/${turns}_greedy.jsonl --batch-size 48 --max-new-tokens 192
  done
  python -m train.regenerate --model smollm2-135m-instruct --data runs/smollm2/asked.jsonl \
    --out runs/smollm2/asked_sampled.jsonl --batch-size 48 --max-new-tokens 192 \
    --temperature 0.7 --seed 1
  python -m train.main --config smollm2_hydra_pp --workdir runs/smollm2_hydra_pp

The target reads each row once and what it says is kept on disk, so the first time through the data
takes longest. Expect an hour on two cores: the head in experiments/heads/smollm2-135m-instruct.
"""

from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig

_DATA = 'runs/smollm2'
_SOURCES = ('asked_greedy', 'asked_sampled', 'about_greedy')


def get_config() -> TrainConfig:
  """Returns the configuration."""
  return TrainConfig(
    objective='hydra',
    # Two heads, a draft vocabulary and the target's own projection: 15 MB in bfloat16.
    options={
      'num_heads': 2, 'num_layers': 2, 'prefix': True, 'share_head': True,
      'draft_vocab_size': 4096, 'divergence': 'forward_kl', 'decay': 0.8,
    },
    target='smollm2-135m-instruct',
    data=DataConfig(
      sources=tuple(f'{_DATA}/{name}.jsonl' for name in _SOURCES), num_held_out=32
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, ema_decay=0.99),
    eval=EvalConfig(every=100, max_new_tokens=64),
    checkpoint=CheckpointConfig(every=50),
    num_steps=900,
    batch_size=8,
    tape_cache=f'{_DATA}/tapes',
  )  # fmt: skip

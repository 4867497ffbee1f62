"""A small corpus, a small random target, and a small training run."""

import dataclasses
import json
import pathlib

from flax import nnx
import pytest

from models.config import TransformerConfig
from models.transformer import Transformer
from train.config import CheckpointConfig
from train.config import DataConfig
from train.config import EvalConfig
from train.config import OptimizerConfig
from train.config import TrainConfig
from train.export import save_language_model
from train.sources import read_sources
from train.tokenize import train_tokenizer

VOCAB_SIZE = 320
LENGTH = 32
OPTIONS = {
  'hidden_size': 16,
  'num_layers': 2,
  'num_heads': 2,
  'num_kv_heads': 1,
  'intermediate_size': 24,
}


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
  """A folder of texts."""
  folder = tmp_path_factory.mktemp('corpus')
  for index in range(24):
    words = [f'word{(index * 7 + i * i) % 13} is {i}' for i in range(30 + index)]
    (folder / f'text{index:02d}.txt').write_text('. '.join(words))
  return folder


@pytest.fixture(scope='session')
def tokenizer_folder(corpus, tmp_path_factory) -> pathlib.Path:
  """A trained tokenizer's folder."""
  folder = tmp_path_factory.mktemp('tokenizer')
  train_tokenizer(read_sources([str(corpus)]), VOCAB_SIZE, folder)
  return folder


@pytest.fixture(scope='session')
def target_folder(tokenizer_folder, tmp_path_factory) -> pathlib.Path:
  """A random target of four layers, as a Hugging Face folder."""
  config = TransformerConfig(
    vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=24, max_position=256, tie_embeddings=True,
  )  # fmt: skip
  folder = tmp_path_factory.mktemp('target') / 'model'
  save_language_model(
    folder, Transformer(config, rngs=nnx.Rngs(3)), tokenizer_directory=tokenizer_folder, facts={}
  )
  return folder


@pytest.fixture(scope='session')
def config(corpus, tokenizer_folder) -> TrainConfig:
  """A language model trained from scratch for a few steps."""
  return TrainConfig(
    objective='language_model',
    options={**OPTIONS, 'as_target': True},
    data=DataConfig(
      sources=(str(corpus),), tokenizer=str(tokenizer_folder), sequence_length=LENGTH,
      num_held_out=4,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
    eval=EvalConfig(every=0, num_prompts=4),
    checkpoint=CheckpointConfig(every=2, keep_last=2),
    num_steps=6,
    batch_size=8,
    log_every=2,
  )  # fmt: skip


def write_config(path: pathlib.Path, config: TrainConfig) -> pathlib.Path:
  """Writes a configuration file that gives this configuration."""
  fields = dataclasses.asdict(config)
  parts = ', '.join(
    f'{name}={type(getattr(config, name)).__name__}(**{value!r})'
    if dataclasses.is_dataclass(getattr(config, name))
    else f'{name}={value!r}'
    for name, value in fields.items()
  )
  path.write_text(
    f'from train.config import *\n\n\ndef get_config():\n  return TrainConfig({parts})\n'
  )
  return path


def read_steps(workdir: pathlib.Path) -> dict[int, float]:
  """Returns {step: loss} of a run's metrics."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {line['step']: line['loss'] for line in map(json.loads, lines) if 'loss' in line}

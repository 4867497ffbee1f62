"""What a training run is told: plain frozen records, overridden from the command line by name."""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import importlib.util
import pathlib
import typing
from typing import Any

DEFAULT_SOURCES = ('stdlib', 'pydoc')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read, and how it is packed."""

  sources: tuple[str, ...] = DEFAULT_SOURCES  # files, folders, or names of `train.sources.CORPORA`
  tokenizer: str = ''  # a folder or a model's name; '' is the target's, or else one that is trained
  vocab_size: int = 2048  # of a tokenizer that is trained
  sequence_length: int = 256  # T, tokens of a packed row
  max_tokens: int | None = None  # read no more than this
  num_held_out: int = 64  # documents kept for measuring: their beginnings are the prompts
  directory: str = ''  # where the packed rows are kept; '' is WORKDIR/data


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and what surrounds it."""

  learning_rate: float = 1e-3  # at its peak
  schedule: str = 'cosine'  # after the warm-up: 'cosine', 'linear' or 'constant'
  warmup_steps: int = 50
  final_fraction: float = 0.1  # of the peak, where the schedule ends
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0  # of arrays with two or more axes
  clip_norm: float | None = 1.0  # of the whole gradient
  clip_value: float | None = None  # of each of its entries
  ema_decay: float | None = None  # average the weights; the average decodes and is exported


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices along each axis; -1, once, is as many as there are left."""

  data: int = -1  # copies of the parameters, each with its own rows
  fsdp: int = 1  # rows too, but parameters are split
  tensor: int = 1  # heads, MLP widths and the vocabulary are split


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Real decoding on held-out prompts while training."""

  every: int = 200  # steps; 0 is never
  num_prompts: int = 16
  prompt_length: int = 48  # tokens of a text; a conversation is cut before the assistant's turn
  max_new_tokens: int = 48
  temperatures: tuple[float, ...] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What is kept of a run. The best one by real tokens/call (T = 0) is always kept."""

  every: int = 200  # steps
  keep_last: int = 2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run."""

  objective: str  # a file of train/objectives
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of its make_objective
  target: str = ''  # a model's name, folder or file; '' where there is none
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  num_steps: int = 1000
  batch_size: int = 16  # rows a step, over all devices and micro-batches
  accumulation: int = 1  # micro-batches a step
  seed: int = 0
  compute_dtype: str = ''  # 'float32' or 'bfloat16'; '' is float32 on CPU, bfloat16 elsewhere
  remat: bool = False  # recompute activations of the trained module in the backward pass
  tape_cache: str = ''  # folder for tapes of the target, for several epochs; '' makes them anew
  init_from: str = ''  # an exported head to start from
  log_every: int = 10  # steps

  def __post_init__(self):
    positive = {
      'num_steps': self.num_steps,
      'batch_size': self.batch_size,
      'accumulation': self.accumulation,
      'log_every': self.log_every,
      'data.sequence_length': self.data.sequence_length,
      'checkpoint.every': self.checkpoint.every,
      'checkpoint.keep_last': self.checkpoint.keep_last,
    }
    for name, value in positive.items():
      if value < 1:
        raise ValueError(f'{name} must be at least 1: {value}')
    if self.batch_size % self.accumulation:
      raise ValueError(
        f'batch_size must be a multiple of accumulation: {self.batch_size=}, {self.accumulation=}'
      )
    if self.optimizer.schedule not in ('cosine', 'linear', 'constant'):
      raise ValueError(
        f"optimizer.schedule must be 'cosine', 'linear' or 'constant': {self.optimizer.schedule!r}"
      )
    if self.compute_dtype not in ('', 'float32', 'bfloat16'):
      raise ValueError(f"compute_dtype must be 'float32' or 'bfloat16': {self.compute_dtype!r}")
    if self.eval.every and self.eval.num_prompts > self.data.num_held_out:
      raise ValueError(
        f'there are more prompts than documents held out: {self.eval.num_prompts=}, '
        f'{self.data.num_held_out=}'
      )


def load_config(name: str) -> TrainConfig:
  """Returns what `get_config()` of a Python file returns.

  Args:
    name: a path, or the name of a file in `train/configs` without its `.py`.

  Raises:
    ValueError: if there is no such file, or it gives no `TrainConfig`.
  """
  folder = pathlib.Path(__file__).parent / 'configs'
  path = pathlib.Path(name)
  if not path.suffix:
    path = folder / f'{name}.py'
  if not path.is_file():
    names = sorted(each.stem for each in folder.glob('*.py') if not each.stem.startswith('_'))
    near = difflib.get_close_matches(path.stem, names, cutoff=0.4) or names
    raise ValueError(f'no such configuration: {name}; nearest: {", ".join(near)}')
  spec = importlib.util.spec_from_file_location(f'train_config_{path.stem}', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config() if hasattr(module, 'get_config') else None
  if not isinstance(config, TrainConfig):
    raise ValueError(f'{path} must have a function get_config() that returns a TrainConfig')
  return config


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
  """Returns the configuration with `settings`, each 'key=value', put in its place.

  Keys are dotted (`optimizer.learning_rate`); `options.NAME` are those of the objective.

  Raises:
    ValueError: for an unknown key or a value of the wrong kind.
  """
  for setting in settings:
    key, equals, text = setting.partition('=')
    if not equals:
      raise ValueError(f'--set takes key=value: {setting!r}')
    config = _set(config, key.split('.'), text, key)
  return config


def as_dict(config: TrainConfig) -> dict[str, Any]:
  """Returns the configuration as plain values, for JSON."""
  return dataclasses.asdict(config) | {'options': dict(config.options)}


def _set(record, path, text, key):
  if isinstance(record, Mapping):
    if len(path) > 1:
      raise ValueError(f'options are not nested: {key}')
    return {**record, path[0]: _literal(text)}
  names = [field.name for field in dataclasses.fields(record)]
  if path[0] not in names:
    near = difflib.get_close_matches(path[0], names, cutoff=0.5) or names
    raise ValueError(f'unknown setting {key!r}; nearest: {", ".join(near)}')
  old = getattr(record, path[0])
  if dataclasses.is_dataclass(old) or isinstance(old, Mapping):
    if len(path) == 1:
      raise ValueError(f'{key} is a group of settings: give {key}.NAME=value')
    return dataclasses.replace(record, **{path[0]: _set(old, path[1:], text, key)})
  if len(path) > 1:
    raise ValueError(f'{key}: {path[0]} is one value, it has no {path[1]!r}')
  kind = typing.get_type_hints(type(record))[path[0]]
  return dataclasses.replace(record, **{path[0]: _parse(text, kind, key)})


def _parse(text, kind, key):
  """Returns the text as a value of an annotated type."""
  allowed = typing.get_args(kind) if typing.get_origin(kind) not in (tuple, None) else (kind,)
  if text in ('None', 'none') and type(None) in allowed:
    return None
  for each in allowed:
    origin = typing.get_origin(each) or each
    value = text if origin is str else _literal(text)
    if origin is tuple:
      inner = typing.get_args(each)[0]
      parts = value if isinstance(value, (tuple, list)) else text.split(',')
      return tuple(_parse(str(part), inner, key) for part in parts)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
      return float(value)
    if type(value) is origin:
      return value
  names = ' or '.join(getattr(each, '__name__', str(each)) for each in allowed)
  raise ValueError(f'{key} must be {names}: {text!r}')


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text

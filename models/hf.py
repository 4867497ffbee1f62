"""Hugging Face directories: `config.json` to a configuration, safetensors to a `Transformer`.

Families: Llama 2 and 3 (SmolLM2 among them), Mistral, Qwen2 and 2.5, Qwen3, Gemma 2, Gemma 3
(text), Mixtral and Qwen3-MoE, and the diffusion models made from them: LLaDA, Dream, SDAR. What a
configuration asks for and is not supported is an error.
"""

from collections.abc import Iterator, Mapping
import pathlib
import re
from typing import Any

import numpy as np
import safetensors

from models.config import RopeScaling
from models.config import TransformerConfig
from models.hf_diffusion import BASES
from models.hf_diffusion import RENAMES
from models.hf_diffusion import to_base
from models.tokenizer import read_json
from models.tokenizer import tokenizer_from_directory
from models.weights import LoadedModel
from models.weights import Progress
from models.weights import build_transformer
from models.weights import sha256_of

_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_MAX_HASHED_BYTES = 4 << 30

# What the families assume for keys that their config.json may leave out.
_GEMMA3 = {
  'vocab_size': 262_208,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'rms_norm_eps': 1e-6,
  'max_position_embeddings': 131_072,
  'tie_word_embeddings': True,
  'hidden_act': 'gelu_pytorch_tanh',
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'rope_theta': 1e6,
}
_DEFAULTS = {
  'llama': {'rms_norm_eps': 1e-6},
  'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096},
  'qwen2': {'sliding_window': 4096, 'max_window_layers': 28},
  'qwen3': {'head_dim': 128, 'sliding_window': 4096, 'max_window_layers': 28},
  'gemma2': {
    **_GEMMA3,
    'vocab_size': 256_000,
    'max_position_embeddings': 8192,
    'rope_theta': 1e4,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'gemma3_text': _GEMMA3,
  'mixtral': {
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e6,
    'num_experts': 8,
    'num_experts_per_tok': 2,
    'norm_topk_prob': True,
  },
  'qwen3_moe': {'num_experts': 128, 'num_experts_per_tok': 8, 'moe_intermediate_size': 768},
}
MODEL_TYPES = (*_DEFAULTS, 'gemma3', *BASES)

_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}
_ALTERNATING = ('qwen2', 'qwen3', 'gemma2', 'gemma3_text')  # families that honour layer_types


def load_hf(
  directory: str | pathlib.Path, *, dtype: Any = None, progress: Progress | None = None
) -> LoadedModel:
  """Returns the model, tokenizer and stop ids in a Hugging Face directory.

  Tensors are read one at a time. Float16, bfloat16 and float32 are converted to `dtype`.

  Args:
    directory: with `config.json` and `model.safetensors`, or shards and their index.
    dtype: of parameters, activations and cache; None is float32 on CPU, bfloat16 elsewhere.
    progress: called with the name of each stage.

  Raises:
    FileNotFoundError: if the directory or a file in it does not exist.
    ValueError: if a file is damaged, the model or an option is not supported, or the tensors are
      not those that the configuration asks for.
  """
  directory, progress = pathlib.Path(directory), progress or (lambda stage: None)
  if not (directory / 'config.json').is_file():
    raise FileNotFoundError(f'no config.json in {directory}: is it a Hugging Face model directory?')
  files = weight_files(directory)
  try:
    config = config_from_hf(read_json(directory / 'config.json'))
    progress('building the tokenizer')
    tokenizer = tokenizer_from_directory(directory)
    progress('reading weights')
    transformer = build_transformer(config, SafetensorsDirectory(files), dtype=dtype)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from error
  hashed = sum(path.stat().st_size for path in files) <= _MAX_HASHED_BYTES
  source = {
    'kind': 'directory',
    'path': str(directory),
    'sha256': sha256_of(files) if hashed else None,  # of the weights; left out where it takes long
  }
  return LoadedModel(transformer, tokenizer, directory.name, source, tokenizer.eos_ids)


# --- Configuration -----------------------------------------------------------------------------


def config_from_hf(config: Mapping[str, Any]) -> TransformerConfig:
  """Returns the configuration described by a `config.json`, of transformers 4 or 5.

  Raises:
    ValueError: if the model type or an option is not supported, or a key is missing.
  """
  # A diffusion model; a block-causal one says so elsewhere.
  bidirectional = config.get('model_type') in BASES and not config.get('block_size')
  config = _with_defaults(config)
  family = config['model_type']
  _refuse_unsupported(config)
  heads, size = _need(config, 'num_attention_heads'), _need(config, 'hidden_size')
  biased = bool(config.get('attention_bias'))
  return TransformerConfig(
    vocab_size=_need(config, 'vocab_size'),
    hidden_size=size,
    num_layers=_need(config, 'num_hidden_layers'),
    num_heads=heads,
    num_kv_heads=config.get('num_key_value_heads') or heads,
    head_dim=config.get('head_dim') or size // heads,
    max_position=config.get('max_position_embeddings', 2048),
    norm_eps=config.get('rms_norm_eps', 1e-6),
    qk_norm=family in ('qwen3', 'qwen3_moe', 'gemma3_text'),
    qkv_bias=biased or family == 'qwen2',
    out_bias=biased,
    activation=_ACTIVATIONS[_activation(config)],
    mlp_bias=bool(config.get('mlp_bias')),
    tie_embeddings=bool(config.get('tie_word_embeddings')),
    **_window_options(config),
    **_rope_options(config),
    **_expert_options(config),
    **(_gemma_options(config) if family.startswith('gemma') else {}),
    bidirectional=bidirectional,
  )


def _with_defaults(config):
  """Returns the text model's own configuration with its family's defaults filled in."""
  family = config.get('model_type')
  if family not in MODEL_TYPES:
    raise ValueError(
      f'model_type {family!r} is not supported; supported are {", ".join(MODEL_TYPES)}'
    )
  if family in BASES:
    config = to_base(config)
    family = config['model_type']
  if family == 'gemma3':  # text and vision in one; only the text model is loaded
    outer, family = config, 'gemma3_text'
    config = dict(config.get('text_config') or {})
    for key in ('tie_word_embeddings', 'quantization_config'):
      if key in outer:
        config.setdefault(key, outer[key])
  return {**_DEFAULTS[family], **config, 'model_type': family}


def _refuse_unsupported(config):
  family = config['model_type']
  if config.get('quantization_config'):
    raise ValueError(
      'quantised checkpoints are not supported in this format (quantization_config in '
      'config.json): use the original weights, or a GGUF file'
    )
  if config.get('use_bidirectional_attention'):
    raise ValueError('use_bidirectional_attention is not supported')
  if config.get('mlp_only_layers') or config.get('decoder_sparse_step', 1) != 1:
    raise ValueError(
      'experts in some layers only are not supported: mlp_only_layers must be empty and '
      'decoder_sparse_step 1'
    )
  expected = ['gelu_pytorch_tanh'] if family.startswith('gemma') else ['silu']
  if _activation(config) not in expected:
    raise ValueError(
      f'the activation {_activation(config)!r} is not supported for {family}; supported is '
      f'{", ".join(expected)}'
    )


def _activation(config):
  return config.get('hidden_activation') or config.get('hidden_act') or 'silu'


def _need(config, key):
  if config.get(key) is None:
    raise ValueError(f'config.json lacks {key!r}')
  return config[key]


def _window_options(config):
  family, layers = config['model_type'], config['num_hidden_layers']
  window, types = config.get('sliding_window'), config.get('layer_types')
  if family in ('qwen2', 'qwen3', 'qwen3_moe') and not config.get('use_sliding_window'):
    window = None
  if window is None or family == 'llama':
    return {}
  if types is not None:
    unknown = sorted(set(types) - {'full_attention', 'sliding_attention'})
    if unknown or (family not in _ALTERNATING and len(set(types)) > 1):
      raise ValueError(f'layer_types are not supported for {family}: {unknown or types}')
    windowed = [kind == 'sliding_attention' for kind in types]
  elif family in ('qwen2', 'qwen3'):
    windowed = [layer >= config['max_window_layers'] for layer in range(layers)]
  elif family in ('gemma2', 'gemma3_text'):
    key = 'sliding_window_pattern'
    every = 2 if family == 'gemma2' else config.get(key, config.get(f'_{key}', 6))
    windowed = [(layer + 1) % every > 0 for layer in range(layers)]
  else:
    windowed = [True] * layers
  if not any(windowed):
    return {}
  return {'window': window, 'windowed_layers': None if all(windowed) else tuple(windowed)}


def _rope_options(config):
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  theta = config.get('rope_theta') or 1e4
  if config['model_type'] != 'gemma3_text':
    return {
      'rope_theta': rope.get('rope_theta', theta),
      'rope_scaling': _rope_scaling(rope, config),
    }
  # Two embeddings: of the global layers, and of the windowed ones, which is never scaled.
  local = rope.get('sliding_attention') or {}
  rope = rope.get('full_attention') or {k: v for k, v in rope.items() if k != 'sliding_attention'}
  scaling = _rope_scaling(rope, config)
  if _rope_scaling(local, config) or (scaling is not None and scaling.kind != 'linear'):
    raise ValueError(f'rope scaling of this kind is not supported for Gemma 3: {rope}, {local}')
  return {
    'rope_theta': rope.get('rope_theta', theta),
    'rope_local_theta': local.get('rope_theta', config.get('rope_local_base_freq', 1e4)),
    'rope_scaling': scaling,
  }


def _rope_scaling(rope, config):
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if (rope.get('partial_rotary_factor') or config.get('partial_rotary_factor') or 1.0) != 1.0:
    raise ValueError('a rotary embedding of only a part of each head is not supported')
  if kind == 'default':
    return None
  if kind not in ('linear', 'llama3', 'yarn') or rope.get('mscale') or not rope.get('truncate', 1):
    raise ValueError(
      f"rope scaling must be 'default', 'linear', 'llama3' or 'yarn', without mscale and with "
      f'truncate: {dict(rope)}'
    )
  names = {
    'factor': 'factor',
    'original_max_position': 'original_max_position_embeddings',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'attention_factor': 'attention_factor',
  }
  found = {field: rope[name] for field, name in names.items() if rope.get(name) is not None}
  found.setdefault('original_max_position', config.get('max_position_embeddings', 2048))
  return RopeScaling(kind, **found)


def _expert_options(config):
  if config['model_type'] not in ('mixtral', 'qwen3_moe'):
    return {'intermediate_size': _need(config, 'intermediate_size')}
  width = 'intermediate_size' if config['model_type'] == 'mixtral' else 'moe_intermediate_size'
  return {
    'intermediate_size': _need(config, width),
    'num_experts': config.get('num_local_experts') or config['num_experts'],
    'num_experts_per_token': config['num_experts_per_tok'],
    'normalize_expert_weights': bool(config.get('norm_topk_prob')),
  }


def _gemma_options(config):
  return {
    'norm_plus_one': True,
    'post_norms': True,
    'attention_scale': config['query_pre_attn_scalar'] ** -0.5,
    'attention_soft_cap': config.get('attn_logit_softcapping'),
    'logit_soft_cap': config.get('final_logit_softcapping'),
    'embedding_scale': config['hidden_size'] ** 0.5,
  }


# --- Tensors -----------------------------------------------------------------------------------


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the safetensors files of a model: one, or the shards named in its index.

  Raises:
    FileNotFoundError: if a shard is missing, or there are no weights.
    ValueError: if the weights are in another format, or the index is damaged.
  """
  if (directory / _WEIGHTS).is_file():
    return [directory / _WEIGHTS]
  if (directory / _INDEX).is_file():
    weights = read_json(directory / _INDEX).get('weight_map')
    if not isinstance(weights, dict):
      raise ValueError(f'{directory / _INDEX} has no weight_map')
    files = [directory / name for name in sorted(set(weights.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
      raise FileNotFoundError(
        f'{directory} lacks {len(missing)} of {len(files)} shards: {", ".join(missing)}'
      )
    return files
  if pickled := sorted(path.name for path in directory.glob('*') if path.suffix in _PICKLES):
    raise ValueError(
      f'{directory} holds pickled weights only ({", ".join(pickled)}). They can run any code when '
      'they are read, so they never are: convert them once with transformers, '
      'AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)'
    )
  if ggufs := sorted(path.name for path in directory.glob('*.gguf')):
    raise ValueError(f'{directory} holds GGUF files; give one of them: {", ".join(ggufs)}')
  raise FileNotFoundError(f'{directory} has neither {_WEIGHTS} nor {_INDEX}')


_PICKLES = ('.bin', '.pt', '.pth', '.pkl')
_READABLE = ('F64', 'F32', 'F16', 'BF16')

# What checkpoints call the same things: Mixtral's experts, and text models inside larger ones.
_RENAMES = (
  (r'\.block_sparse_moe\.', '.mlp.'),
  (r'(\.mlp\.experts\.\d+\.)w1\.', r'\1gate_proj.'),
  (r'(\.mlp\.experts\.\d+\.)w3\.', r'\1up_proj.'),
  (r'(\.mlp\.experts\.\d+\.)w2\.', r'\1down_proj.'),
  (r'^model\.language_model\.', 'model.'),
  (r'^language_model\.', ''),
  *RENAMES,
)
_OTHER_PARTS = re.compile(r'^(model\.)?(vision_tower|multi_modal_projector)\.')


class SafetensorsDirectory(Mapping):
  """The tensors of some safetensors files under one set of names, each read when asked for."""

  def __init__(self, files: list[pathlib.Path]):
    self._where = {}
    for path in files:
      try:
        file = safetensors.safe_open(path, 'np')
      except safetensors.SafetensorError as error:
        raise ValueError(f'{path.name} is damaged or cut short: {error}') from error
      for stored in file.keys():
        if not _OTHER_PARTS.match(stored):
          self._where[_common_name(stored)] = (file, stored)

  def __getitem__(self, name: str) -> np.ndarray:
    file, stored = self._where[name]
    kind = file.get_slice(stored).get_dtype()
    if kind not in _READABLE:
      raise ValueError(f'{stored} is stored as {kind}; supported are {", ".join(_READABLE)}')
    return file.get_tensor(stored)

  def __contains__(self, name: object) -> bool:
    return name in self._where

  def __iter__(self) -> Iterator[str]:
    return iter(self._where)

  def __len__(self) -> int:
    return len(self._where)


def _common_name(name):
  for pattern, replacement in _RENAMES:
    name = re.sub(pattern, replacement, name)
  return name

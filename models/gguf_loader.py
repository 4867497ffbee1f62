"""GGUF files: metadata to a configuration, quantised tensors to floating point.

Architectures: llama (also SmolLM and Mistral), qwen2, qwen3, gemma2, gemma3.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import pathlib
import re
from typing import Any

import gguf
import numpy as np

from models.config import RopeScaling
from models.config import TransformerConfig
from models.config import rope_frequencies
from models.tokenizer import Tokenizer
from models.tokenizer import tokenizer_from_gguf
from models.weights import LoadedModel
from models.weights import Progress
from models.weights import build_transformer
from models.weights import sha256_of

ARCHITECTURES = ('llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3')

# Names of tensors, GGUF to Hugging Face. A layer's begin with `blk.N.` and `model.layers.N.`.
_MODEL_NAMES = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_LAYER_NAMES = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_POST_NORM_NAMES = {
  'post_attention_norm': 'post_attention_layernorm',
  'ffn_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
}
_ROPE_FACTORS = 'rope_freqs.weight'


def load_gguf(
  path: str | pathlib.Path, *, dtype: Any = None, progress: Progress | None = None
) -> LoadedModel:
  """Returns the model, tokenizer and stop ids in a GGUF file; quantised tensors become `dtype`.

  Args:
    path: the file. A model split into several files is not supported.
    dtype: of parameters, activations and cache; None is float32 on CPU, bfloat16 elsewhere.
    progress: called with the name of each stage.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, or of an architecture or with an option not supported.
  """
  path, progress = pathlib.Path(path), progress or (lambda stage: None)
  progress('reading metadata')
  config, tensors, tokenizer = read_gguf(path)
  progress('dequantising weights')
  try:
    transformer = build_transformer(config, tensors, dtype=dtype)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  source = {'kind': 'gguf', 'path': str(path), 'sha256': sha256_of([path])}
  return LoadedModel(transformer, tokenizer, path.stem, source, tokenizer.eos_ids)


def read_gguf(
  path: str | pathlib.Path,
) -> tuple[TransformerConfig, 'GGUFTensors', Tokenizer]:
  """Returns what is in a GGUF file, its tensors not read yet.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, or of an architecture or with an option not supported.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no such GGUF file: {path}')
  reader = _open(path)
  metadata = {key: field.contents() for key, field in reader.fields.items()}
  try:
    tensors = GGUFTensors(reader.tensors, metadata)
    return config_from_gguf(metadata, tensors), tensors, tokenizer_from_gguf(metadata)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


class GGUFTensors(Mapping):
  """The tensors of a GGUF file under their Hugging Face names, dequantised when they are read.

  Queries and keys of the llama architecture are stored for interleaved rotary embedding; they are
  returned in half-split order.
  """

  def __init__(self, tensors: Iterable[gguf.ReaderTensor], metadata: Mapping[str, Any]):
    arch = metadata.get('general.architecture')
    self._stored = {_hf_name(tensor.name, arch): tensor for tensor in tensors}
    self.rope_factors = None  # f32[Dh/2] divisors of the rotary frequencies
    if (factors := self._stored.pop(_ROPE_FACTORS, None)) is not None:
      self.rope_factors = _dequantise(factors)
    self._num_heads = {}
    if arch == 'llama':
      queries = metadata.get('llama.attention.head_count')
      keys = metadata.get('llama.attention.head_count_kv', queries)
      self._num_heads = {'q_proj': queries, 'k_proj': keys}

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = _dequantise(self._stored[name])
    heads = next((n for part, n in self._num_heads.items() if f'.{part}.' in name), None)
    if heads is None:
      return tensor
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

  def __contains__(self, name: object) -> bool:
    return name in self._stored

  def __iter__(self) -> Iterator[str]:
    return iter(self._stored)

  def __len__(self) -> int:
    return len(self._stored)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it."""
    return tuple(int(n) for n in reversed(self._stored[name].shape))


def config_from_gguf(metadata: Mapping[str, Any], tensors: GGUFTensors) -> TransformerConfig:
  """Returns the configuration of a GGUF file, from its metadata and from which tensors it has.

  Raises:
    ValueError: if the architecture or an option is not supported, or metadata are missing.
  """
  arch = metadata.get('general.architecture')
  if arch not in ARCHITECTURES:
    raise ValueError(
      f'GGUF architecture {arch!r} is not supported; supported are {", ".join(ARCHITECTURES)}'
    )
  get = functools.partial(_lookup, metadata, arch)
  if get('expert_count', 0):
    raise ValueError('mixtures of experts are read from safetensors only, not from GGUF')
  heads, size = get('attention.head_count'), get('embedding_length')
  head_dim = get('attention.key_length', size // heads)
  if get('rope.dimension_count', head_dim) != head_dim:
    raise ValueError('a rotary embedding of only a part of each head is not supported')
  layer = 'model.layers.0'
  config = TransformerConfig(
    vocab_size=_shape_of(tensors, 'model.embed_tokens.weight')[0],
    hidden_size=size,
    num_layers=get('block_count'),
    num_heads=heads,
    num_kv_heads=get('attention.head_count_kv', heads),
    head_dim=head_dim,
    intermediate_size=get('feed_forward_length'),
    max_position=get('context_length'),
    norm_eps=get('attention.layer_norm_rms_epsilon'),
    qk_norm=arch in ('qwen3', 'gemma3'),
    qkv_bias=f'{layer}.self_attn.q_proj.bias' in tensors,
    out_bias=f'{layer}.self_attn.o_proj.bias' in tensors,
    mlp_bias=f'{layer}.mlp.gate_proj.bias' in tensors,
    window=get('attention.sliding_window', 0) or None,
    rope_theta=get('rope.freq_base', 10000.0),
    tie_embeddings='lm_head.weight' not in tensors,
  )
  if arch.startswith('gemma'):
    config = _with_gemma_options(config, arch, get)
  return dataclasses.replace(config, rope_scaling=_rope_scaling(config, get, tensors.rope_factors))


def _with_gemma_options(config, arch, get):
  """Returns the configuration with what Gemma's GGUF files leave to the reader.

  Norm scales are stored with their 1 added, so `norm_plus_one` stays off.
  """
  third = arch == 'gemma3'
  every, largest = (6, 62) if third else (2, 46)  # each so-many-th layer is global; layers of 27B
  every = get('attention.sliding_window_pattern', every)
  scale_dim = config.head_dim
  if config.num_layers == largest:
    scale_dim = config.hidden_size // config.num_heads
  return dataclasses.replace(
    config,
    post_norms=True,
    activation='gelu_tanh',
    embedding_scale=config.hidden_size**0.5,
    attention_scale=scale_dim**-0.5,
    attention_soft_cap=get('attn_logit_softcapping', None),
    logit_soft_cap=get('final_logit_softcapping', None),
    windowed_layers=tuple((layer + 1) % every > 0 for layer in range(config.num_layers)),
    rope_theta=get('rope.freq_base', 1e6 if third else 1e4),
    rope_local_theta=get('rope.freq_base_swa', 1e4) if third else None,
  )


def _rope_scaling(config, get, factors):
  kind = get('rope.scaling.type', 'none')
  for key in ('attn_factor', 'yarn_log_multiplier', 'yarn_ext_factor', 'yarn_attn_factor'):
    if get(f'rope.scaling.{key}', None) is not None:
      raise ValueError(f'rope.scaling.{key} is not supported')
  if kind == 'linear':
    return RopeScaling('linear', factor=get('rope.scaling.factor'))
  if kind == 'yarn':
    return RopeScaling(
      'yarn',
      factor=get('rope.scaling.factor'),
      original_max_position=get('rope.scaling.original_context_length', config.max_position),
    )
  if kind != 'none':
    raise ValueError(f"rope.scaling.type must be 'none', 'linear' or 'yarn': {kind!r}")
  return None if factors is None else _llama3_scaling(config, factors)


def _llama3_scaling(config, factors):
  """Returns the Llama 3 scaling that makes these divisors of the frequencies.

  The file holds the divisors only; of what they come from, all releases share everything but the
  factor, which is the largest divisor.
  """
  scaling = RopeScaling(
    'llama3',
    factor=float(factors.max()),
    original_max_position=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
  )
  plain, _ = rope_frequencies(config)
  scaled, _ = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
  if not np.allclose(plain[0] / scaled[0], factors, rtol=1e-3):
    raise ValueError(
      f'the factors in {_ROPE_FACTORS} are not those of Llama 3; this scaling is not supported'
    )
  return scaling


def _hf_name(name, arch):
  """Returns the Hugging Face name of a tensor; an unknown name is returned as it is."""
  if name in _MODEL_NAMES:
    return _MODEL_NAMES[name]
  names = {**_LAYER_NAMES, **(_POST_NORM_NAMES if str(arch).startswith('gemma') else {})}
  match = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', name)
  if match is None or match[2] not in names:
    return name
  return f'model.layers.{match[1]}.{names[match[2]]}.{match[3]}'


_REQUIRED = object()


def _lookup(metadata, arch, key, default: Any = _REQUIRED) -> Any:
  value = metadata.get(f'{arch}.{key}', default)
  if value is _REQUIRED:
    raise ValueError(f'the metadata key {arch}.{key} is missing')
  if isinstance(value, list):
    raise ValueError(f'{arch}.{key} differs from layer to layer, which is not supported: {value}')
  # Stored as float32: give 1e-5 back, not 9.999999747378752e-06.
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _shape_of(tensors, name):
  if name not in tensors:
    raise ValueError(f'the tensor {name} is missing')
  return tensors.shape(name)


def _dequantise(tensor):
  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise ValueError(
      f'{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf package cannot read'
    ) from error


class _Reader(gguf.GGUFReader):
  """Reads through a plain view: to slice a `np.memmap` 200,000 times takes three times as long."""

  def _get(self, *args, **kwargs):
    if isinstance(self.data, np.memmap):
      self.data = self.data.view(np.ndarray)
    return super()._get(*args, **kwargs)


def _open(path):
  try:
    return _Reader(path)
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise ValueError(f'{path} is not a GGUF file, or is cut short: {error}') from error

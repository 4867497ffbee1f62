"""What the published layouts share: Llama-shaped layers, and parameters made of named tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from models.hf import config_from_hf
from models.transformer import Transformer
from models.weights import Part
from models.weights import assemble
from models.weights import disassemble
from models.weights import layer_parts

Parts = dict[tuple, list[Part]]
Tensors = Mapping[str, np.ndarray]


def layer_config_from(
  config: Mapping[str, Any], target: Transformer, **changes: Any
) -> TransformerConfig:
  """Returns the configuration of a head's one layer, as config.json says; the rest as the target.

  Raises:
    ValueError: if it has more layers, or another width of the vocabulary than the target.
  """
  if config.get('num_hidden_layers', 1) != 1:
    raise ValueError(f'a head of one layer is supported: {config["num_hidden_layers"]=}')
  said = {**llama_config(target.config), **config, 'num_hidden_layers': 1}
  if 'hidden_size' in config and 'num_attention_heads' in config and 'head_dim' not in config:
    said['head_dim'] = config['hidden_size'] // config['num_attention_heads']
  if 'rope_parameters' in config:  # transformers 5; it replaces the other two
    said.pop('rope_scaling', None)
  said['model_type'] = {'qwen3': 'qwen3'}.get(config.get('model_type', ''), 'llama')
  layer = config_from_hf(said)
  if layer.vocab_size != target.config.vocab_size:
    raise ValueError(
      f'the head is for a vocabulary of {layer.vocab_size} tokens, the target has '
      f'{target.config.vocab_size}'
    )
  values = {**vars(layer), **changes, 'tie_embeddings': target.config.tie_embeddings}
  return TransformerConfig(**values)


def llama_config(config: TransformerConfig) -> dict[str, Any]:
  """Returns config.json of a Llama-shaped layer.

  Raises:
    ValueError: if the layer has options that a Llama has not.
  """
  scaling = config.rope_scaling
  if config.norm_plus_one or config.post_norms or config.num_experts or config.activation != 'silu':
    raise ValueError(f'only Llama-shaped layers can be written in a published layout: {config}')
  return {
    'model_type': 'qwen3' if config.qk_norm else 'llama',
    'hidden_size': config.hidden_size,
    'intermediate_size': config.intermediate_size,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'num_hidden_layers': 1,
    'vocab_size': config.vocab_size,
    'max_position_embeddings': config.max_position,
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'rope_scaling': None if scaling is None else _rope_scaling(scaling),
    'attention_bias': config.qkv_bias,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
  }


def _rope_scaling(scaling):
  names = {
    'factor': scaling.factor,
    'original_max_position_embeddings': scaling.original_max_position,
  }
  if scaling.kind == 'llama3':
    names['low_freq_factor'] = scaling.low_freq_factor
    names['high_freq_factor'] = scaling.high_freq_factor
  if scaling.kind == 'yarn':
    names['beta_fast'], names['beta_slow'] = scaling.beta_fast, scaling.beta_slow
    names['attention_factor'] = scaling.attention_factor
  return {'rope_type': scaling.kind, **names}


def own_layer_parts(config: TransformerConfig, prefix: str, without: Sequence[str]) -> Parts:
  """Returns the parameters of a head's layer with the tensors they are made of, under a prefix.

  Args:
    config: of the layer.
    prefix: of the tensors' names.
    without: parts that the head has not.
  """
  return {
    path: [part._replace(name=prefix + part.name) for part in parts]
    for path, parts in layer_parts(config).items()
    if path[0] not in without
  }


def fill(blank: nnx.Module, parts: Parts, tensors: Tensors) -> Any:
  """Returns the module with its parameters made of tensors, all of which must be of use.

  Args:
    blank: the module, its arrays as shapes only.
    parts: the tensors of each parameter, by its path; more paths than the module has are allowed.
    tensors: by name, [out, in].

  Raises:
    ValueError: if tensors are missing, left over or of the wrong shape.
  """
  graph, state = nnx.split(blank)
  flat = dict(nnx.to_flat_state(state))
  needed = [part.name for path in flat if path in parts for part in parts[path]]
  missing = [name for name in needed if name not in tensors]
  left = sorted(set(tensors) - set(needed))
  if missing or left:
    raise ValueError(
      f'the tensors are not those of this head: missing {missing[:6]}, of no use {left[:6]}'
    )
  for path, variable in flat.items():
    if path in parts:
      value = assemble(variable.get_value(), parts[path], tensors)
      flat[path] = variable.replace(jnp.asarray(value))
  return nnx.merge(graph, nnx.from_flat_state(flat))


def tensors_of(head: nnx.Module, parts: Parts) -> dict[str, np.ndarray]:
  """Returns the tensors that a head's parameters are made of, by name."""
  found = {}
  for path, variable in nnx.to_flat_state(nnx.state(head, nnx.Param)):
    found.update(disassemble(np.asarray(variable.get_value()), parts[path]))
  return found


def check_embedding(tensors: Tensors, target: Transformer) -> dict[str, np.ndarray]:
  """Returns the tensors without the embedding, which heads share with the target.

  Raises:
    ValueError: if it is not the target's.
  """
  rest = dict(tensors)
  stored = rest.pop('embed_tokens.weight', None)
  if stored is not None and not is_embedding_of(stored, target):
    raise ValueError(
      "its embed_tokens are not the target's: the head belongs to another model, or trained them"
    )
  return rest


def is_embedding_of(stored: np.ndarray, target: Transformer) -> bool:
  """Is it the target's embedding [V, D], but for the rounding of half precision?"""
  own = np.asarray(target.embedding[...], np.float32)
  if stored.shape != own.shape:
    return False
  scale = max(float(np.abs(own).max()), 1e-9)
  return bool(np.max(np.abs(np.asarray(stored, np.float32) - own)) <= 1e-2 * scale)

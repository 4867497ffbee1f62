"""From the tensors of a checkpoint to a `Transformer`, and what a loader returns.

Checkpoints name their tensors in many ways. Loaders give them the names of the Hugging Face layout
(`model.layers.0.self_attn.q_proj.weight`, stored `[out, in]`); the table below is the only place
that knows where each of them goes.

Axes: `L` layers, `D` hidden size, `F` MLP size, `G` query heads per key/value head, `X` experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import hashlib
import math
import pathlib
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

Progress = Callable[[str], None]

# What old checkpoints store besides parameters: tables that are computed here.
_TABLES = re.compile(r'\.rotary_emb\.|\.attn\.(masked_)?bias$')


class LoadedModel(NamedTuple):
  """A target with everything that came with its weights."""

  transformer: Transformer
  tokenizer: Tokenizer
  name: str
  source: Mapping[str, str | None]  # 'kind', 'path', 'sha256', and where it was fetched from
  eos_ids: tuple[int, ...]  # every id that ends a text or a turn


class Part(NamedTuple):
  """One tensor of a checkpoint as a part of a parameter."""

  name: str
  index: tuple = ()  # where in the parameter, the layer first
  transpose: bool = True  # stored [out, in]; the parameter is [in, out]


def default_dtype() -> jnp.dtype:
  """Returns float32 on CPU, where bfloat16 is slow, and bfloat16 on accelerators."""
  return jnp.dtype(jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16)


def sha256_of(paths: Sequence[pathlib.Path]) -> str:
  """Returns the SHA-256 of a file; for several, that of their hexadecimal digests joined."""
  digests = []
  for path in paths:
    with open(path, 'rb') as file:
      digests.append(hashlib.file_digest(file, 'sha256').hexdigest())
  return digests[0] if len(digests) == 1 else hashlib.sha256(''.join(digests).encode()).hexdigest()


def build_transformer(
  config: TransformerConfig, tensors: Mapping[str, np.ndarray], *, dtype: Any = None
) -> Transformer:
  """Returns a decoder whose parameters are filled from `tensors`, one tensor in memory at a time.

  Args:
    config: shape and options.
    tensors: arrays under their Hugging Face names. May be lazy: each is read once.
    dtype: of parameters, activations and cache; None is float32 on CPU, bfloat16 elsewhere.

  Raises:
    ValueError: if tensors are missing, left over or of the wrong shape.
  """
  dtype = default_dtype() if dtype is None else jnp.dtype(dtype)
  blank = nnx.eval_shape(
    lambda: Transformer(config, rngs=nnx.Rngs(0), param_dtype=dtype, dtype=dtype)
  )
  graph, state = nnx.split(blank)
  table = parameter_parts(config)
  flat = dict(nnx.to_flat_state(state))
  _check_names([part.name for path in flat for part in table[path]], tensors, config)
  for path, variable in flat.items():
    value = assemble(variable.get_value(), table[path], tensors)
    flat[path] = variable.replace(jnp.asarray(value))
  return nnx.merge(graph, nnx.from_flat_state(flat))


def parameter_parts(config: TransformerConfig) -> dict[tuple, list[Part]]:
  """Returns, for every parameter a `Transformer` may have, the tensors it is made of."""
  table = {
    ('embedding',): [Part('model.embed_tokens.weight', transpose=False)],
    ('final_norm', 'scale'): [Part('model.norm.weight')],
    ('head',): [Part('lm_head.weight')],
  }
  for layer in range(config.num_layers):
    for path, some in layer_parts(config).items():
      table.setdefault(('layers', *path), []).extend(
        part._replace(name=f'model.layers.{layer}.{part.name}', index=(layer, *part.index))
        for part in some
      )
  return table


def layer_parts(config: TransformerConfig) -> dict[tuple, list[Part]]:
  """Returns, for every parameter a single `Layer` may have, the tensors it is made of."""
  return {**_norm_parts(config), **_attention_parts(config), **_mlp_parts(config)}


def _norm_parts(config):
  before_mlp = 'pre_feedforward_layernorm' if config.post_norms else 'post_attention_layernorm'
  return {
    ('attention_norm', 'scale'): [Part('input_layernorm.weight')],
    ('attention_post_norm', 'scale'): [Part('post_attention_layernorm.weight')],
    ('mlp_norm', 'scale'): [Part(f'{before_mlp}.weight')],
    ('mlp_post_norm', 'scale'): [Part('post_feedforward_layernorm.weight')],
    ('attention', 'q_norm', 'scale'): [Part('self_attn.q_norm.weight')],
    ('attention', 'k_norm', 'scale'): [Part('self_attn.k_norm.weight')],
  }


def _attention_parts(config):
  group, every = config.group_size, slice(None)
  slots = {'q': slice(0, group), 'k': group, 'v': group + 1}
  return {
    ('attention', 'qkv'): [
      Part(f'self_attn.{which}_proj.weight', (every, every, slot)) for which, slot in slots.items()
    ],
    ('attention', 'qkv_bias'): [
      Part(f'self_attn.{which}_proj.bias', (every, slot)) for which, slot in slots.items()
    ],
    ('attention', 'out'): [Part('self_attn.o_proj.weight')],
    ('attention', 'out_bias'): [Part('self_attn.o_proj.bias')],
  }


def _mlp_parts(config):
  every = slice(None)
  parts = {
    ('mlp', 'router'): [Part('mlp.gate.weight')],
    ('mlp', 'gate_up'): [
      Part('mlp.gate_proj.weight', (every, 0)),
      Part('mlp.up_proj.weight', (every, 1)),
    ],
    ('mlp', 'down'): [Part('mlp.down_proj.weight')],
    ('mlp', 'gate_up_bias'): [Part('mlp.gate_proj.bias', (0,)), Part('mlp.up_proj.bias', (1,))],
    ('mlp', 'down_bias'): [Part('mlp.down_proj.bias')],
  }
  if not config.num_experts:
    return parts
  experts = range(config.num_experts)
  parts['mlp', 'gate_up'] = [
    Part(f'mlp.experts.{expert}.{which}_proj.weight', (expert, every, slot))
    for expert in experts
    for slot, which in enumerate(('gate', 'up'))
  ]
  parts['mlp', 'down'] = [
    Part(f'mlp.experts.{expert}.down_proj.weight', (expert,)) for expert in experts
  ]
  return parts


def _check_names(needed, tensors, config):
  missing = [name for name in needed if name not in tensors]
  if missing:
    raise ValueError(
      f'{_several(missing)} missing. The configuration asks for these tensors: '
      'is every shard there, and does config.json belong to these weights?'
    )
  known = {*needed, *(['lm_head.weight'] if config.tie_embeddings else [])}
  left = [name for name in tensors if name not in known and not _TABLES.search(name)]
  if left:
    raise ValueError(
      f'{_several(left)} of no use to this configuration. The weights come from another '
      'architecture, or config.json lacks an option.'
    )


def _several(names: Iterable[str], limit: int = 6) -> str:
  names = list(names)
  shown = ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')
  return f'{len(names)} tensors ({shown})' if len(names) > 1 else f'the tensor {shown}'


def assemble(
  blank: jax.ShapeDtypeStruct | jax.Array,
  parts: Sequence[Part],
  tensors: Mapping[str, np.ndarray],
) -> np.ndarray:
  """Returns a parameter of the blank's shape and dtype, made of tensors.

  Raises:
    ValueError: if one has the wrong shape.
  """
  value = np.empty(blank.shape, blank.dtype)
  for part in parts:
    view, tensor = value[part.index], tensors[part.name]
    turn = part.transpose and tensor.ndim > 1  # [out, in] -> [in, *out]
    rows, columns = math.prod(view.shape[1:]), view.shape[0]
    if turn:
      stored = (rows, columns)
    else:
      stored = (rows * columns,) if part.transpose else view.shape
    if tensor.shape != stored:
      raise ValueError(f'{part.name} has shape {tensor.shape}, the configuration needs {stored}')
    if turn:
      tensor = np.moveaxis(tensor.reshape(*view.shape[1:], columns), -1, 0)
    view[...] = tensor.reshape(view.shape)
  return value


def disassemble(value: np.ndarray, parts: Sequence[Part]) -> dict[str, np.ndarray]:
  """Returns the tensors that a parameter is made of: the inverse of `assemble`."""
  return {part.name: _as_stored(value[part.index], part) for part in parts}


def _as_stored(view, part):
  """Returns a part [in, *out] as a checkpoint stores it, [out, in]; a bias is flat."""
  if not part.transpose:
    return view
  if view.ndim == 1 or part.name.endswith('bias'):
    return view.reshape(-1)
  return np.moveaxis(view, 0, -1).reshape(-1, view.shape[0])

"""Published heads: read from the layouts of their authors, and written back to them.

A head's parameters are listed with the tensors they are made of, as `models.weights` does for whole
models; what a layout says in its config.json is turned into the head's own configuration, and what
it leaves out or says in two ways is an error, never a guess. Weights are safetensors; pickles are
not read.

Axes: `H` width of the head, `V` vocabulary, `Vd` draft vocabulary.
"""

from collections.abc import Callable, Mapping
import json
import pathlib
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from models.heads import eagle3_layouts
from models.heads.eagle import Eagle
from models.heads.eagle import EagleConfig
from models.heads.eagle3 import Eagle3
from models.heads.hydra import Hydra
from models.heads.hydra import HydraConfig
from models.heads.kangaroo import Kangaroo
from models.heads.kangaroo import KangarooConfig
from models.heads.layout import Parts
from models.heads.layout import Tensors
from models.heads.layout import check_embedding
from models.heads.layout import fill
from models.heads.layout import layer_config_from
from models.heads.layout import llama_config
from models.heads.layout import own_layer_parts
from models.heads.layout import tensors_of
from models.heads.medusa import Medusa
from models.heads.medusa import MedusaConfig
from models.heads.vocabulary import DraftVocabulary
from models.tokenizer import read_json
from models.transformer import Transformer
from models.weights import Part

_FILES = ('model.safetensors', 'medusa_lm_head.safetensors', 'hydra_lm_head.safetensors')
LAYOUTS = ('eagle', 'eagle3', 'speculators', 'medusa', 'medusa-vllm', 'hydra', 'kangaroo')


def load_published(
  directory: str | pathlib.Path, target: Transformer, *, layout: str | None = None, **choices: Any
) -> Any:
  """Returns the head in a directory of a published layout.

  Args:
    directory: with `config.json` and safetensors.
    target: the model that the head drafts for.
    layout: one of `LAYOUTS`; None tells it from the tensors.
    **choices: what the files leave open: `taps` and `norm_before_residual` of EAGLE-3,
      `exit_layer` of Kangaroo.

  Raises:
    FileNotFoundError: if there is no config.json or there are no weights.
    ValueError: if the layout is not known, the head is not for this target, or the files leave
      something open that `choices` does not settle.
  """
  directory = pathlib.Path(directory)
  if not (directory / 'config.json').is_file():
    raise FileNotFoundError(f'no config.json in {directory}: is it the folder of a head?')
  config = read_json(directory / 'config.json')
  tensors = safetensors.numpy.load_file(_weights(directory))
  tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
  layout = detect_layout(config, tensors) if layout is None else layout
  if layout not in _READERS:
    raise ValueError(f'unknown layout {layout!r}; there are {", ".join(LAYOUTS)}')
  try:
    return _READERS[layout](config, tensors, target, **choices)
  except TypeError as error:
    raise ValueError(f'{directory}: layout {layout!r} takes no such choice: {error}') from error
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from error


def save_published(
  directory: str | pathlib.Path, head: Any, target: Transformer, *, layout: str, **facts: Any
) -> None:
  """Writes a head in a published layout.

  Args:
    directory: made if it is not there; its config.json and weights are replaced.
    head: the head.
    target: the model that it drafts for.
    layout: one of `LAYOUTS`, of the head's kind.
    **facts: more for config.json; for 'speculators', `verifier` (a model's name) and
      `speculative_tokens` are needed.

  Raises:
    ValueError: if the layout cannot hold the head.
  """
  if layout not in _WRITERS:
    raise ValueError(f'unknown layout {layout!r}; there are {", ".join(LAYOUTS)}')
  kind, write, name = _WRITERS[layout]
  if not isinstance(head, kind):
    raise ValueError(f'layout {layout!r} holds a {kind.__name__}, not a {type(head).__name__}')
  config, tensors = write(head, target, **facts)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
  safetensors.numpy.save_file(contiguous, directory / name, metadata={'format': 'pt'})
  (directory / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')


def detect_layout(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the name of the layout.

  Raises:
    ValueError: if it is none that is known.
  """
  signs = {
    'speculators': 'speculators_model_type' in config,
    'eagle3': 'midlayer.hidden_norm.weight' in tensors,
    'eagle': 'fc.weight' in tensors and 'layers.0.input_layernorm.weight' not in tensors,
    'medusa-vllm': any(name.startswith('blocks.') for name in tensors),
    'medusa': 'medusa_num_heads' in config,
    'hydra': any(name.startswith('hydra_mlp.') for name in tensors),
    'kangaroo': 'norm.weight' in tensors and 'layers.0.input_layernorm.weight' in tensors,
  }
  found = [name for name, sign in signs.items() if sign]
  if not found:
    raise ValueError(f'no known layout of a head: it has {", ".join(sorted(tensors)[:6])}')
  return found[0]


def _weights(directory):
  for name in _FILES:
    if (directory / name).is_file():
      return directory / name
  pickled = sorted(p.name for p in directory.glob('*') if p.suffix in ('.bin', '.pt', '.pth'))
  if pickled:
    raise ValueError(
      f'{directory} holds pickled weights only ({", ".join(pickled)}). They can run any code when '
      'they are read, so they never are: load them once with torch.load(..., weights_only=True), '
      f'and write them with safetensors.torch.save_file, as one of {", ".join(_FILES)}'
    )
  raise FileNotFoundError(f'{directory} has none of {", ".join(_FILES)}')


# --- EAGLE ---------------------------------------------------------------------------------------


def _eagle_parts(config: EagleConfig) -> Parts:
  layer = own_layer_parts(config.layer, 'layers.0.', ('attention_norm',))
  return {
    ('fuse',): [Part('fc.weight')],
    ('fuse_bias',): [Part('fc.bias')],
    **layer,
  }


def _read_eagle(config, tensors: Tensors, target: Transformer) -> Eagle:
  layer = layer_config_from(config, target, qkv_bias=bool(config.get('qkv_bias', False)))
  eagle = EagleConfig(layer, bias=config.get('bias', True))
  blank = nnx.eval_shape(lambda: Eagle(eagle, target, rngs=nnx.Rngs(0)))
  tensors = check_embedding(tensors, target)
  return fill(blank, _eagle_parts(eagle), tensors)


def _write_eagle(head: Eagle, target: Transformer, **facts):
  config = {
    **llama_config(head.config.layer),
    'bias': head.config.bias,
    'qkv_bias': head.config.layer.qkv_bias,
    'tie_word_embeddings': False,
    **facts,
  }
  tensors = tensors_of(head, _eagle_parts(head.config))
  return config, {**tensors, 'embed_tokens.weight': np.asarray(target.embedding[...])}


# --- Medusa --------------------------------------------------------------------------------------


def _read_medusa(config, tensors: Tensors, target: Transformer) -> Medusa:
  num_heads, num_layers = config['medusa_num_heads'], config['medusa_num_layers']
  own = f'0.{num_layers}.weight' in tensors
  kernels = _stack(tensors, num_heads, num_layers, '{head}.{layer}.linear.weight')
  biases = _stack(tensors, num_heads, num_layers, '{head}.{layer}.linear.bias')
  heads = _many(tensors, [f'{i}.{num_layers}.weight' for i in range(num_heads)]) if own else None
  return _make_medusa(target, kernels, biases, heads, None)


def _read_vllm_medusa(config, tensors: Tensors, target: Transformer) -> Medusa:
  num_heads, num_layers = config['num_heads'], config['num_hidden_layers']
  kernels = _stack(tensors, num_heads, num_layers, 'blocks.{head}.layers.{layer}.weight')
  biases = np.zeros(kernels.shape[:-1], kernels.dtype)
  if config.get('medusa_fc_bias', False):
    biases = _stack(tensors, num_heads, num_layers, 'blocks.{head}.layers.{layer}.bias')
  shared = bool(config.get('original_lm_head', False))
  if shared and 'lm_head.weight' in tensors:
    check_same(tensors['lm_head.weight'], target, 'lm_head.weight')
  heads = None if shared else _many(tensors, [f'lm_heads.{i}.weight' for i in range(num_heads)])
  size, ids = config.get('truncated_vocab_size'), tensors.get('token_map')
  if size is not None and size < config['vocab_size'] and ids is None:
    raise ValueError('truncated_vocab_size without token_map: which tokens are drafted is not said')
  if ids is not None and (np.diff(ids) <= 0).any():
    order = np.argsort(ids)  # heads draft in rising order here
    ids, heads = ids[order], None if heads is None else heads[:, order]
  vocabulary = None if ids is None else DraftVocabulary(ids, target.config.vocab_size)
  return _make_medusa(target, kernels, biases, heads, vocabulary)


def _make_medusa(target, kernels, biases, heads, vocabulary) -> Medusa:
  """Returns heads of kernels [K, n, out, in], biases [K, n, out], heads [K, Vd, D] or None."""
  num_layers = kernels.shape[1]
  tied = num_layers > 1 and bool(
    np.all(kernels == kernels[:, :1]) & np.all(biases == biases[:, :1])
  )
  config = MedusaConfig(
    hidden_size=target.config.hidden_size,
    vocab_size=target.config.vocab_size,
    num_heads=len(kernels),
    num_layers=num_layers,
    tie_blocks=tied,
    share_head=heads is None,
    draft_vocab_size=None if vocabulary is None else vocabulary.size,
  )
  medusa = Medusa(config, target, vocabulary=vocabulary)
  count = 1 if tied else num_layers
  _put(medusa.kernel, np.moveaxis(kernels[:, :count], -1, -2), 'blocks')
  _put(medusa.bias, biases[:, :count], 'biases of blocks')
  if heads is not None:
    _put(medusa.heads, np.moveaxis(heads, -1, -2), 'heads')
  return medusa


def _write_medusa(head: Medusa, target: Transformer, **facts):
  config = head.config
  if head.vocabulary is not None:
    raise ValueError("layout 'medusa' has no draft vocabulary; 'medusa-vllm' has")
  if config.num_layers > 1 and not config.tie_blocks:
    raise ValueError("layout 'medusa' ties the blocks of a head; 'medusa-vllm' does not")
  kernel, bias = np.asarray(head.kernel[...]), np.asarray(head.bias[...])
  tensors = {}
  for i in range(config.num_heads):
    for j in range(config.num_layers):
      tensors[f'{i}.{j}.linear.weight'] = kernel[i, 0].T
      tensors[f'{i}.{j}.linear.bias'] = bias[i, 0]
    if head.heads is not None:
      tensors[f'{i}.{config.num_layers}.weight'] = np.asarray(head.heads[...][i]).T
  said = {
    'medusa_num_heads': config.num_heads,
    'medusa_num_layers': config.num_layers,
    'version': '2',
    'base_model_name_or_path': facts.pop('base_model_name_or_path', ''),
    'hidden_size': config.hidden_size,
    'vocab_size': config.vocab_size,
  }
  return {**said, **facts}, tensors


def _write_vllm_medusa(head: Medusa, target: Transformer, **facts):
  config = head.config
  kernel, bias = np.asarray(head.kernel[...]), np.asarray(head.bias[...])
  tensors = {}
  for i in range(config.num_heads):
    for j in range(config.num_layers):
      place = 0 if config.tie_blocks else j
      tensors[f'blocks.{i}.layers.{j}.weight'] = kernel[i, place].T
      tensors[f'blocks.{i}.layers.{j}.bias'] = bias[i, place]
    if head.heads is not None:
      tensors[f'lm_heads.{i}.weight'] = np.asarray(head.heads[...][i]).T
  if head.vocabulary is not None:
    tensors['token_map'] = np.asarray(head.vocabulary.ids[...]).astype(np.int64)
  said = {
    'architectures': ['MedusaModel'],
    'model_type': 'medusa',
    'num_heads': config.num_heads,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.hidden_size,
    'vocab_size': config.vocab_size,
    'truncated_vocab_size': config.draft_vocab_size or config.vocab_size,
    'medusa_fc_bias': True,
    'original_lm_head': config.share_head,
  }
  return {**said, **facts}, tensors


# --- Hydra ---------------------------------------------------------------------------------------

_PREFIX = 'prefix_embeding_layer.'  # spelled so


def _hydra_names(config: HydraConfig) -> tuple[Callable[[int, int], str], str]:
  """Returns (the name of block j of head i, what follows a head's number).

  With a prefix layer a dropout stands before everything, and counts.
  """
  every, inner = (2, '.1') if config.prefix is not None else (1, '')
  return lambda i, j: f'hydra_mlp.{i}.{every * j + every - 1}.', inner


def _hydra_parts(config: HydraConfig) -> Parts:
  block, inner = _hydra_names(config)
  parts: dict[tuple, list[Part]] = {}
  for i in range(config.num_heads):
    at = ('heads', i)
    parts[*at, 'skip'] = [Part(f'{block(i, 0)}res_connection.weight')]
    parts[*at, 'skip_bias'] = [Part(f'{block(i, 0)}res_connection.bias')]
    parts[*at, 'kernel'] = [Part(f'{block(i, 0)}linear.weight')]
    parts[*at, 'bias'] = [Part(f'{block(i, 0)}linear.bias')]
    later = range(1, config.num_layers)
    parts[*at, 'blocks'] = [
      Part(f'{block(i, j)}linear.weight', (0 if config.tie_blocks else j - 1,)) for j in later
    ]
    parts[*at, 'block_biases'] = [
      Part(f'{block(i, j)}linear.bias', (0 if config.tie_blocks else j - 1,)) for j in later
    ]
    parts[*at, 'head'] = [Part(f'hydra_lm_head.{i}{inner}.weight')]
    parts[*at, 'head_bias'] = [Part(f'hydra_lm_head.{i}{inner}.bias')]
  if config.prefix is not None:
    layer = own_layer_parts(config.prefix, f'{_PREFIX}layers.0.', ())
    parts.update({('prefix', 'layer', *path): some for path, some in layer.items()})
    parts['prefix', 'norm', 'scale'] = [Part(f'{_PREFIX}norm.weight')]
  return parts


def _read_hydra(config, tensors: Tensors, target: Transformer) -> Hydra:
  arch = config.get('hydra_head_arch', 'mlp')
  if arch not in ('mlp', 'prefix-mlp'):
    raise ValueError(f"hydra_head_arch must be 'mlp' or 'prefix-mlp': {arch!r}")
  if not config.get('grounded_heads', False):
    raise ValueError('heads that do not read the drafts (grounded_heads false) are Medusa heads')
  if config.get('hidden_state_offset', 0):
    raise ValueError('hidden_state_offset: only the last hidden state is supported')
  hydra = HydraConfig(
    hidden_size=target.config.hidden_size,
    vocab_size=target.config.vocab_size,
    num_heads=config['hydra_num_heads'],
    num_layers=config['hydra_num_layers'],
    tie_blocks=config['hydra_num_layers'] > 2,
    prefix=layer_config_from({}, target) if arch == 'prefix-mlp' else None,
  )
  tensors = {k: v for k, v in tensors.items() if k != f'{_PREFIX}embed_tokens.weight'}
  if hydra.tie_blocks and not _hydra_is_tied(hydra, tensors):
    hydra = HydraConfig(**{**vars(hydra), 'tie_blocks': False})
  blank = nnx.eval_shape(lambda: Hydra(hydra, target, rngs=nnx.Rngs(0)))
  return fill(blank, _hydra_parts(hydra), tensors)


def _hydra_is_tied(config, tensors):
  block, _ = _hydra_names(config)
  same = [
    np.array_equal(tensors[f'{block(i, j)}linear.weight'], tensors[f'{block(i, 1)}linear.weight'])
    for i in range(config.num_heads)
    for j in range(2, config.num_layers)
  ]
  return all(same)


def _write_hydra(head: Hydra, target: Transformer, **facts):
  config = head.config
  if head.vocabulary is not None or config.share_head:
    raise ValueError("layout 'hydra' has a whole projection for each head")
  if config.num_layers > 2 and not config.tie_blocks:
    raise ValueError("layout 'hydra' ties the later blocks of a head: train with tie_blocks")
  said = {
    'hydra_num_heads': config.num_heads,
    'hydra_num_layers': config.num_layers,
    'hydra_head_arch': 'mlp' if config.prefix is None else 'prefix-mlp',
    'grounded_heads': True,
    'hidden_state_offset': 0,
    'base_model_name_or_path': facts.pop('base_model_name_or_path', ''),
  }
  return {**said, **facts}, tensors_of(head, _hydra_parts(config))


# --- Kangaroo ------------------------------------------------------------------------------------


def _kangaroo_parts(config: KangarooConfig) -> Parts:
  layer = own_layer_parts(config.layer, 'layers.0.', ('mlp', 'mlp_norm'))
  layer['norm', 'scale'] = layer.pop(('attention_norm', 'scale'))
  return {('final_norm', 'scale'): [Part('norm.weight')], **layer}


def _read_kangaroo(config, tensors: Tensors, target: Transformer, *, exit_layer: int | None = None):
  exit_layer = config.get('exit_layer') if exit_layer is None else exit_layer
  if exit_layer is None:
    raise ValueError(
      'config.json does not say after which layer the adapter reads: give exit_layer'
    )
  kangaroo = KangarooConfig(layer_config_from(config, target), exit_layer)
  blank = nnx.eval_shape(lambda: Kangaroo(kangaroo, target, rngs=nnx.Rngs(0)))
  return fill(blank, _kangaroo_parts(kangaroo), tensors)


def _write_kangaroo(head: Kangaroo, target: Transformer, **facts):
  config = {**llama_config(head.config.layer), 'exit_layer': head.config.exit_layer, **facts}
  return config, tensors_of(head, _kangaroo_parts(head.config))


# --- Shared pieces -------------------------------------------------------------------------------


def _stack(tensors, num_heads, num_layers, pattern) -> np.ndarray:
  """Returns [K, n, ...] of tensors named by head and layer."""
  names = [
    pattern.format(head=head, layer=layer)
    for head in range(num_heads)
    for layer in range(num_layers)
  ]
  many = _many(tensors, names)
  return many.reshape(num_heads, num_layers, *many.shape[1:])


def _many(tensors, names) -> np.ndarray:
  missing = [name for name in names if name not in tensors]
  if missing:
    raise ValueError(f'tensors are missing: {", ".join(missing[:6])}')
  return np.stack([np.asarray(tensors[name], np.float32) for name in names])


def _put(variable: Any, value: np.ndarray, what: str) -> None:
  if variable.shape != value.shape:
    raise ValueError(f'{what} have shape {value.shape}, this target needs {variable.shape}')
  variable[...] = jnp.asarray(value, variable.dtype)


def check_same(stored: np.ndarray, target: Transformer, name: str) -> None:
  """Checks that a stored head [V, D] is the target's.

  Raises:
    ValueError: if it is not.
  """
  own = target.embedding[...] if target.head is None else target.head[...].T
  if stored.shape != own.shape or not np.allclose(stored, own, atol=2e-2):
    raise ValueError(f"{name} is not the target's: the head belongs to another model")


_READERS: dict[str, Callable[..., Any]] = {
  'eagle': _read_eagle,
  'eagle3': eagle3_layouts.read_official,
  'speculators': eagle3_layouts.read_speculators,
  'medusa': _read_medusa,
  'medusa-vllm': _read_vllm_medusa,
  'hydra': _read_hydra,
  'kangaroo': _read_kangaroo,
}
_WRITERS: dict[str, tuple[type, Callable[..., Any], str]] = {
  'eagle': (Eagle, _write_eagle, 'model.safetensors'),
  'eagle3': (Eagle3, eagle3_layouts.write_official, 'model.safetensors'),
  'speculators': (Eagle3, eagle3_layouts.write_speculators, 'model.safetensors'),
  'medusa': (Medusa, _write_medusa, 'medusa_lm_head.safetensors'),
  'medusa-vllm': (Medusa, _write_vllm_medusa, 'model.safetensors'),
  'hydra': (Hydra, _write_hydra, 'hydra_lm_head.safetensors'),
  'kangaroo': (Kangaroo, _write_kangaroo, 'model.safetensors'),
}

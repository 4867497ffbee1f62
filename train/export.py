"""Trained modules on disk: decodax's own format, and the Hugging Face layout of whole models.

A head is a folder with `model.safetensors`, every variable under its dotted name, and a
`config.json` that names the objective, its options and the target. A language model is written as a
Llama folder, with its tokenizer, so that everything that loads targets loads it.

`train.publish` writes heads in the layouts of other projects.
"""

from collections.abc import Mapping
import json
import pathlib
import shutil
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from models.config import TransformerConfig
from models.transformer import PerLayer
from models.transformer import Transformer
from models.weights import parameter_parts
from train.objective import Objective
from train.objective import get_objective

FORMAT = 'decodax-head'
_TOKENIZER_FILES = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja',
  'generation_config.json',
)  # fmt: skip


class LoadedHead(NamedTuple):
  """A head with what it was trained as."""

  head: nnx.Module
  objective: Objective
  name: str  # of the objective
  facts: Mapping[str, Any]  # the rest of config.json


def save_head(
  directory: pathlib.Path,
  head: nnx.Module,
  *,
  objective: str,
  options: Mapping[str, Any],
  facts: Mapping[str, Any],
  dtype: Any = None,
) -> None:
  """Writes a head in decodax's own format, as a whole or not at all.

  Args:
    directory: replaced if it exists.
    head: the module.
    objective: its name.
    options: of its `make_objective`.
    facts: what else config.json is to say, for example which target it is for.
    dtype: of floating-point variables; None leaves them as they are.
  """
  tensors = {
    '.'.join(map(str, path)): _as_stored(variable.get_value(), dtype)
    for path, variable in nnx.to_flat_state(nnx.state(head))
  }
  config = {'format': FORMAT, 'objective': objective, 'options': dict(options), **facts}
  write_folder(directory, config, tensors)


def load_head(directory: str | pathlib.Path, target: Transformer) -> LoadedHead:
  """Returns a head in decodax's own format, for a target.

  Args:
    directory: with config.json and model.safetensors.
    target: the model that it drafts for or judges; its width must be that of the training target.

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: if it holds something else, or does not fit the target.
  """
  directory = pathlib.Path(directory)
  if not (directory / 'config.json').is_file():
    raise FileNotFoundError(f'no config.json in {directory}: is it the folder of a head?')
  config = json.loads((directory / 'config.json').read_text(encoding='utf-8'))
  if config.get('format') != FORMAT:
    raise ValueError(
      f'{directory} holds no head in the format {FORMAT!r}; its config.json says '
      f'{config.get("format", config.get("architectures"))!r}'
    )
  options = {key: tuple(v) if isinstance(v, list) else v for key, v in config['options'].items()}
  objective = get_objective(config['objective'], options)
  counts = np.zeros(target.config.vocab_size, np.int64)
  blank = nnx.eval_shape(lambda: objective.init(nnx.Rngs(0), target, counts))
  head = fill(blank, safetensors.numpy.load_file(directory / 'model.safetensors'), str(directory))
  return LoadedHead(head, objective, config['objective'], config)


def fill(blank: nnx.Module, tensors: Mapping[str, np.ndarray], where: str) -> nnx.Module:
  """Returns the module with its variables taken from `tensors` by their dotted names.

  Raises:
    ValueError: if names or shapes do not agree.
  """
  graph, state = nnx.split(blank)
  flat = {'.'.join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
  missing, extra = sorted(set(flat) - set(tensors)), sorted(set(tensors) - set(flat))
  if missing or extra:
    raise ValueError(f'{where} does not fit this target: missing {missing}, of no use {extra}')
  filled = {}
  for name, (path, variable) in flat.items():
    like, value = variable.get_value(), tensors[name]
    if like.shape != value.shape:
      raise ValueError(f'{where}: {name} has shape {value.shape}, this target needs {like.shape}')
    filled[path] = variable.replace(jnp.asarray(value, like.dtype))
  return nnx.merge(graph, nnx.from_flat_state(filled))


def save_language_model(
  directory: pathlib.Path,
  model: Transformer,
  *,
  tokenizer_directory: pathlib.Path | None,
  facts: Mapping[str, Any],
) -> None:
  """Writes a dense Llama-shaped model as a Hugging Face folder.

  Args:
    directory: replaced if it exists.
    model: without the options of other families.
    tokenizer_directory: whose tokenizer files are copied; None copies none.
    facts: more for config.json.

  Raises:
    ValueError: if the model is not Llama-shaped.
  """
  config = model.config
  flat = dict(nnx.to_flat_state(nnx.state(model)))
  tensors = {}
  for path, parts in parameter_parts(config).items():
    if path in flat:
      value = flat[path].get_value()
      value = np.asarray(value.matrices if isinstance(value, PerLayer) else value)
      for part in parts:
        tensors[part.name] = _as_stored(_disassemble(value[part.index], part.transpose), None)
  extra = [] if tokenizer_directory is None else [
    tokenizer_directory / name
    for name in _TOKENIZER_FILES
    if (tokenizer_directory / name).exists()
  ]  # fmt: skip
  write_folder(directory, {**_llama_config(config), **facts}, tensors, extra)


def _disassemble(view, transpose):
  """Returns a parameter's part [in, *out] as a checkpoint stores it, [out, in]."""
  if not transpose or view.ndim == 1:
    return view
  return np.moveaxis(view, 0, -1).reshape(-1, view.shape[0])


def _llama_config(config: TransformerConfig) -> dict[str, Any]:
  plain = TransformerConfig(
    vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_layers=config.num_layers,
    num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    intermediate_size=config.intermediate_size, max_position=config.max_position,
    norm_eps=config.norm_eps, rope_theta=config.rope_theta, tie_embeddings=config.tie_embeddings,
  )  # fmt: skip
  if config != plain:
    raise ValueError(f'only plain Llama models are written as such: {config}')
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'hidden_size': config.hidden_size,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.intermediate_size,
    'max_position_embeddings': config.max_position,
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'tie_word_embeddings': config.tie_embeddings,
    'hidden_act': 'silu',
  }


def write_folder(
  directory: pathlib.Path,
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  extra: Any = (),
) -> None:
  """Writes config.json, model.safetensors and copies of `extra` files, all or nothing."""
  temporary = directory.with_name(directory.name + '.partial')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
  safetensors.numpy.save_file(
    contiguous, temporary / 'model.safetensors', metadata={'format': 'pt'}
  )
  (temporary / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
  for path in extra:
    shutil.copy(path, temporary / path.name)
  shutil.rmtree(directory, ignore_errors=True)
  temporary.rename(directory)


def _as_stored(value, dtype):
  value = np.asarray(jax.device_get(value))
  if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating):
    return value.astype(dtype)
  return value

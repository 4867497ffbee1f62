"""A `Transformer` as a masked diffusion network, and loading one from a Hugging Face directory."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any, NamedTuple

from flax import nnx

from decodax.diffusion import MaskedModel
from models.adapter import as_model
from models.hf import load_hf
from models.hf_diffusion import SHIFTED
from models.tokenizer import Tokenizer
from models.tokenizer import read_json
from models.transformer import Transformer
from models.weights import Progress


class LoadedDiffusion(NamedTuple):
  """A masked diffusion model with everything that came with its weights."""

  net: MaskedModel
  params: Any  # of the network
  tokenizer: Tokenizer
  eos_ids: tuple[int, ...]
  name: str


def as_masked_model(
  transformer: Transformer, mask_id: int, *, shifted: bool = False, block_size: int | None = None
) -> MaskedModel:
  """Returns the network of a transformer; its parameters are `nnx.state(transformer)`.

  Args:
    transformer: the module; only its structure is kept.
    mask_id: the token that stands for what is to be predicted.
    shifted: is the token at position i predicted by the hidden state at i - 1?
    block_size: of a network that was trained block-causal; None if every token sees every other.

  Raises:
    ValueError: if mask_id is outside the vocabulary, or block_size < 1.
  """
  if not 0 <= mask_id < transformer.config.vocab_size:
    raise ValueError(f'mask_id must be in 0..{transformer.config.vocab_size - 1}: {mask_id=}')
  if block_size is not None and block_size < 1:
    raise ValueError(f'block_size must be at least 1, or None: {block_size=}')
  return MaskedModel(as_model(transformer), mask_id, shifted, block_size)


def load_diffusion(
  directory: str | pathlib.Path,
  *,
  mask_id: int | None = None,
  shifted: bool | None = None,
  block_size: int | None = None,
  dtype: Any = None,
  progress: Progress | None = None,
) -> LoadedDiffusion:
  """Returns the masked diffusion model in a Hugging Face directory: LLaDA, Dream or SDAR.

  Args:
    directory: with `config.json`, a tokenizer and safetensors.
    mask_id: default `mask_token_id` of the configuration.
    shifted: default `shifted` of the configuration, or else what the family does.
    block_size: of a block-causal model; default `block_size` of the configuration.
    dtype: of parameters, activations and cache; None is float32 on CPU, bfloat16 elsewhere.
    progress: called with the name of each stage.

  Raises:
    FileNotFoundError: if the directory or a file in it does not exist.
    ValueError: if the model is not supported, or its mask token is not known.
  """
  loaded = load_hf(directory, dtype=dtype, progress=progress)
  config: Mapping[str, Any] = read_json(pathlib.Path(directory) / 'config.json')
  family = config['model_type']
  if mask_id is None:
    mask_id = config.get('mask_token_id')
  if mask_id is None:
    raise ValueError(f'{directory}: config.json has no mask_token_id; pass mask_id')
  shifted = config.get('shifted') if shifted is None else shifted
  if shifted is None:
    if family not in SHIFTED:
      raise ValueError(
        f'{directory}: model_type {family!r} is no diffusion model that is known here '
        f'({", ".join(SHIFTED)}); pass shifted, and mask_id, if it is one'
      )
    shifted = SHIFTED[family]
  block_size = config.get('block_size') if block_size is None else block_size
  transformer = loaded.transformer
  transformer.config = dataclasses.replace(transformer.config, bidirectional=block_size is None)
  net = as_masked_model(transformer, mask_id, shifted=shifted, block_size=block_size)
  return LoadedDiffusion(net, nnx.state(transformer), loaded.tokenizer, loaded.eos_ids, loaded.name)

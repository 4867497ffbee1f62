"""GGUF files, written by the gguf package, equal the Hugging Face directory they were made from."""

import json
import shutil
import types
from typing import cast

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from models.config import RopeScaling
from models.gguf_loader import GGUFTensors
from models.gguf_loader import config_from_gguf
from models.gguf_loader import load_gguf
from models.hf import load_hf
from models.hf import weight_files
from tests.models.make_golden import GOLDEN
from tests.models.test_hf import full_logits

_NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_GEMMA_NAMES = {
  **_NAMES,
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}
_TOKENS = np.random.default_rng(0).integers(3, 96, (2, 16)).astype(np.int32)


def gguf_name(name, arch):
  stem, kind = name.rsplit('.', 1)
  layer = ''
  if stem.startswith('model.layers.'):
    _, _, number, stem = stem.split('.', 3)
    layer = f'blk.{number}.'
  return f'{layer}{(_GEMMA_NAMES if arch.startswith("gemma") else _NAMES)[stem]}.{kind}'


def interleaved(tensor, heads):
  """Returns rows in the order of llama's GGUF files: halves of a head woven into each other."""
  return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path, directory, arch, *, quantise=None, extra=(), rope_factors=None):
  """Writes the checkpoint in a golden directory as a GGUF file."""
  config = json.loads((directory / 'config.json').read_text())
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  if config.get('head_dim'):
    writer.add_key_length(config['head_dim'])
  rope = config.get('rope_parameters') or {}
  rope = rope.get('full_attention', rope)
  writer.add_rope_freq_base(rope.get('rope_theta') or config['rope_theta'])
  for method, value in extra:
    getattr(writer, method)(value)
  add_tokenizer(writer)
  if rope_factors is not None:
    writer.add_tensor('rope_freqs.weight', rope_factors)
  for name, tensor in read_tensors(directory).items():
    for part, key in (('q_proj', 'num_attention_heads'), ('k_proj', 'num_key_value_heads')):
      if arch == 'llama' and part in name:
        tensor = interleaved(tensor, config[key])
    if arch.startswith('gemma') and 'norm' in name:
      tensor = tensor + 1
    if quantise is not None and tensor.ndim == 2:
      packed = gguf.quants.quantize(tensor, quantise)
      writer.add_tensor(gguf_name(name, arch), packed, raw_dtype=quantise)
    else:
      writer.add_tensor(gguf_name(name, arch), np.ascontiguousarray(tensor))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def read_tensors(directory):
  found = {}
  for path in weight_files(directory):
    found |= {name: np.asarray(t, np.float32) for name, t in load_file(path).items()}
  return found


def add_tokenizer(writer):
  """Adds the tiny tokenizer of the golden files, cut to the tiny models' vocabulary."""
  data = json.loads((GOLDEN / 'tokenizer' / 'tokenizer.json').read_text())['model']
  tokens = sorted(data['vocab'], key=data['vocab'].get)[:96]
  merges = [' '.join(merge) for merge in data['merges'] if ''.join(merge) in tokens]
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(tokens)
  writer.add_token_merges(merges)
  writer.add_token_types([3] * 3 + [1] * 93)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)


@pytest.fixture
def variant(tmp_path):
  """Returns a function that copies a golden checkpoint and changes its configuration."""

  def run(name, **changes):
    directory = tmp_path / name
    shutil.copytree(GOLDEN / name, directory)
    config = json.loads((directory / 'config.json').read_text())
    (directory / 'config.json').write_text(json.dumps({**config, **changes}))
    return directory

  return run


# GGUF leaves the pattern of Gemma's windows to the reader: all but each second or sixth layer.
_GEMMA3 = {'sliding_window_pattern': 6, 'query_pre_attn_scalar': 8}


@pytest.mark.parametrize(
  ('arch', 'name', 'changes', 'extra'),
  [
    ('llama', 'llama', {}, ()),
    ('llama', 'smollm2', {}, ()),
    ('llama', 'mistral', {}, [('add_sliding_window', 6)]),
    ('qwen2', 'qwen2-window', {'use_sliding_window': False}, ()),
    ('qwen3', 'qwen3', {'use_sliding_window': False}, ()),
    (
      'gemma2', 'gemma2', {'query_pre_attn_scalar': 16},
      [('add_sliding_window', 6), ('add_attn_logit_softcapping', 4.0),
       ('add_final_logit_softcapping', 6.0)],
    ),
    (
      'gemma3', 'gemma3-old', {**_GEMMA3, 'rope_local_base_freq': 10000.0},
      [('add_sliding_window', 5), ('add_rope_scaling_factor', 2.0),
       ('add_rope_scaling_type', gguf.RopeScalingType.LINEAR)],
    ),
  ],
)  # fmt: skip
def test_equals_the_directory_it_was_made_from(variant, tmp_path, arch, name, changes, extra):
  directory = variant(name, **changes)
  path = write_gguf(tmp_path / 'model.gguf', directory, arch, extra=extra)
  expected = full_logits(load_hf(directory).transformer, _TOKENS)
  loaded = load_gguf(path)
  np.testing.assert_allclose(full_logits(loaded.transformer, _TOKENS), expected, atol=2e-5, rtol=0)
  assert loaded.name == 'model'
  assert loaded.eos_ids == (2, 0)
  assert loaded.source['kind'] == 'gguf'


def test_quantised_tensors_are_dequantised(variant, tmp_path):
  kind = gguf.GGMLQuantizationType.Q8_0
  directory = variant('llama', intermediate_size=64)
  tensors = read_tensors(directory)
  widened = {}
  for name, tensor in tensors.items():
    if '.mlp.' in name and 'down' not in name:
      tensor = np.pad(tensor, [(0, 16)] + [(0, 0)] * (tensor.ndim - 1))
    elif name.endswith('down_proj.weight'):
      tensor = np.pad(tensor, ((0, 0), (0, 16)))
    if tensor.ndim == 2:
      tensor = gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind)
    widened[name] = np.ascontiguousarray(tensor)
  save_file(widened, directory / 'model.safetensors')
  path = write_gguf(tmp_path / 'model.gguf', directory, 'llama', quantise=kind)
  expected = full_logits(load_hf(directory).transformer, _TOKENS)
  found = full_logits(load_gguf(path, dtype=jnp.float32).transformer, _TOKENS)
  np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def llama3_factors(theta, dim, factor, original):
  """Returns the divisors that llama.cpp stores, computed as its converter does."""
  factors = []
  for i in range(0, dim, 2):
    wavelength = 2 * np.pi * theta ** (i / dim)
    if wavelength < original / 4:
      factors.append(1.0)
    elif wavelength > original:
      factors.append(factor)
    else:
      smooth = (original / wavelength - 1) / 3
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


def test_llama3_scaling_is_read_from_its_factors(variant, tmp_path):
  scaling = {
    'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 32.0, 'low_freq_factor': 1.0,
    'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192,
  }  # fmt: skip
  directory = variant('llama3', rope_parameters=scaling, head_dim=8)
  factors = llama3_factors(5e5, 8, 32.0, 8192)
  path = write_gguf(tmp_path / 'model.gguf', directory, 'llama', rope_factors=factors)
  loaded = load_gguf(path)
  found = loaded.transformer.config.rope_scaling
  assert found == RopeScaling('llama3', 32.0, 8192, 1.0, 4.0)
  expected = full_logits(load_hf(directory).transformer, _TOKENS)
  np.testing.assert_allclose(full_logits(loaded.transformer, _TOKENS), expected, atol=2e-5, rtol=0)


def gemma_config(arch, **changes):
  """Returns the configuration of a Gemma GGUF file with this metadata."""
  keys = {
    'block_count': 8, 'context_length': 8192, 'embedding_length': 64, 'feed_forward_length': 128,
    'attention.head_count': 4, 'attention.head_count_kv': 2, 'attention.key_length': 32,
    'attention.layer_norm_rms_epsilon': float(np.float32(1e-6)), 'attention.sliding_window': 512,
    **changes,
  }  # fmt: skip
  metadata = {'general.architecture': arch, **{f'{arch}.{key}': keys[key] for key in keys}}
  embedding = types.SimpleNamespace(name='token_embd.weight', shape=np.array([64, 1000]))
  tensors = GGUFTensors(cast(list[gguf.ReaderTensor], [embedding]), metadata)
  return config_from_gguf(metadata, tensors)


def test_gemma3_windows_and_two_rotary_embeddings():
  scaling = {'rope.scaling.type': 'linear', 'rope.scaling.factor': 8.0}
  config = gemma_config('gemma3', **scaling)
  assert config.layer_is_windowed == (True,) * 5 + (False, True, True)
  assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
  assert config.rope_scaling == RopeScaling('linear', 8.0)
  assert (config.norm_eps, config.qk_norm, config.norm_plus_one) == (1e-6, True, False)
  assert (config.vocab_size, config.embedding_scale) == (1000, 8.0)


@pytest.mark.parametrize(('arch', 'layers'), [('gemma2', 46), ('gemma3', 62)])
def test_the_largest_gemmas_scale_attention_by_another_size(arch, layers):
  assert gemma_config(arch).attention_scale == 32**-0.5
  assert gemma_config(arch, block_count=layers).attention_scale == 16**-0.5


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'attention.head_count_kv': [2, 4]}, 'differs from layer to layer'),
    ({'rope.dimension_count': 16}, 'only a part of each head'),
    ({'rope.scaling.type': 'longrope'}, "must be 'none', 'linear' or 'yarn': 'longrope'"),
    ({'rope.scaling.attn_factor': 1.2}, 'rope.scaling.attn_factor is not supported'),
  ],
)
def test_metadata_not_supported_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    gemma_config('gemma2', **changes)


def test_missing_metadata():
  with pytest.raises(ValueError, match='the metadata key llama.attention.head_count is missing'):
    config_from_gguf({'general.architecture': 'llama'}, GGUFTensors([], {}))


def test_other_rope_factors_are_refused(variant, tmp_path):
  factors = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
  path = write_gguf(tmp_path / 'model.gguf', variant('llama3'), 'llama', rope_factors=factors)
  with pytest.raises(ValueError, match='factors in rope_freqs.weight are not those of Llama 3'):
    load_gguf(path)


@pytest.mark.parametrize('kept', [0, 3, 40, 2000, 9000, -200])
def test_truncated_file(variant, tmp_path, kept):
  path = write_gguf(tmp_path / 'model.gguf', variant('smollm2'), 'llama')
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match='is not a GGUF file, or is cut short') as error:
    load_gguf(path)
  assert '\n' not in str(error.value)


def test_unknown_architecture(tmp_path, variant):
  path = write_gguf(tmp_path / 'model.gguf', variant('smollm2'), 'mamba')
  with pytest.raises(ValueError, match="'mamba' is not supported; supported are llama, qwen2"):
    load_gguf(path)


def test_experts_are_refused(tmp_path, variant):
  extra = [('add_expert_count', 4)]
  path = write_gguf(tmp_path / 'model.gguf', variant('smollm2'), 'llama', extra=extra)
  with pytest.raises(ValueError, match='mixtures of experts are read from safetensors only'):
    load_gguf(path)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such GGUF file'):
    load_gguf(tmp_path / 'none.gguf')

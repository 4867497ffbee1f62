"""Hugging Face directories: parity with transformers through golden files, and what is refused."""

import dataclasses
import json
import math
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from models.adapter import as_model
from models.hf import BASES
from models.hf import MODEL_TYPES
from models.hf import config_from_hf
from models.hf import load_hf
from models.transformer import PerLayer
from models.transformer import full_mask
from models.transformer import with_separate_layers
from tests.models.make_golden import CHECKPOINTS
from tests.models.make_golden import GOLDEN
from tests.models.make_golden import PROMPT_LENGTH

_TOLERANCE = 1e-4


def full_logits(transformer, tokens):
  """Returns f32[B, S, V] from one forward pass without a cache."""
  batch, length = tokens.shape
  graph, params = nnx.split(transformer)

  @jax.jit
  def run(params, tokens):
    module = nnx.merge(graph, params)
    positions = jnp.tile(jnp.arange(length)[None], (batch, 1))
    output, _ = module(tokens, positions, full_mask(module.config, batch, length))
    return module.unembed(output.hidden)

  return np.asarray(run(params, jnp.asarray(tokens)))


def chunked_logits(transformer, tokens, chunk):
  """Returns f32[B, S, V] by way of the cache: a chunk is read, then committed."""
  model, params = as_model(transformer), nnx.state(transformer)
  batch, length = tokens.shape
  path = jnp.tile(jnp.arange(chunk)[None], (batch, 1))
  mask = jnp.tile(jnp.tril(jnp.ones((chunk, chunk), bool))[None], (batch, 1, 1))

  @jax.jit
  def step(params, cache, block, start, count):
    positions = start + path
    output, kv = model.extend(params, cache, block, positions, mask)
    cache = model.commit(cache, kv, path, jnp.full((batch,), count))
    return model.unembed(params, output.hidden), cache

  cache, logits = model.init_cache(params, batch, length + chunk), []
  for start in range(0, length, chunk):
    count = min(chunk, length - start)
    block = np.zeros((batch, chunk), np.int32)
    block[:, :count] = tokens[:, start : start + count]
    found, cache = step(params, cache, jnp.asarray(block), start, count)
    logits.append(np.asarray(found)[:, :count])
  return np.concatenate(logits, 1)


def golden(name):
  """Returns (the directory, tokens i32[B, S], logits f32[B, S, V])."""
  arrays = load_file(GOLDEN / name / 'golden.safetensors')
  return GOLDEN / name, arrays['tokens'], arrays['logits']


# --- Parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_logits_and_greedy_tokens_equal_transformers(name):
  directory, tokens, expected = golden(name)
  logits = full_logits(load_hf(directory, dtype=jnp.float32).transformer, tokens)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=_TOLERANCE)
  greedy = logits[:, PROMPT_LENGTH - 1 : -1].argmax(-1)
  np.testing.assert_array_equal(greedy, tokens[:, PROMPT_LENGTH:])


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_logits_through_the_cache_equal_transformers(name):
  directory, tokens, expected = golden(name)
  transformer = load_hf(directory, dtype=jnp.float32).transformer
  logits = chunked_logits(transformer, tokens, chunk=5)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize('name', ['smollm2', 'gemma3', 'qwen2', 'qwen3-moe'])
def test_separate_layers_change_nothing(name):
  directory, tokens, _ = golden(name)
  transformer = load_hf(directory, dtype=jnp.float32).transformer
  separate = with_separate_layers(transformer)
  assert isinstance(separate.layers.attention.qkv.get_value(), PerLayer)
  assert isinstance(transformer.layers.attention.qkv.get_value(), jax.Array)
  expected = chunked_logits(transformer, tokens, chunk=5)
  np.testing.assert_array_equal(chunked_logits(separate, tokens, chunk=5), expected)
  again = with_separate_layers(separate)
  np.testing.assert_array_equal(chunked_logits(again, tokens, chunk=5), expected)
  half = as_model(transformer, exit_layer=1), as_model(separate, exit_layer=1)
  found = [
    chunk.extend(
      nnx.state(module), chunk.init_cache(None, len(tokens), 8), jnp.asarray(tokens[:, :1]),
      jnp.zeros((len(tokens), 1), jnp.int32), jnp.ones((len(tokens), 1, 1), bool),
    )[0].hidden
    for chunk, module in zip(half, (transformer, separate), strict=True)
  ]  # fmt: skip
  np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)


def test_logits_token_by_token_equal_transformers():
  directory, tokens, expected = golden('gemma3')
  transformer = load_hf(directory, dtype=jnp.float32).transformer
  logits = chunked_logits(transformer, tokens, chunk=1)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize(
  ('name', 'change'),
  [
    ('gemma2', {'attention_soft_cap': None}),
    ('gemma2', {'logit_soft_cap': None}),
    ('gemma2', {'window': 7}),
    ('gemma2', {'windowed_layers': (False, True, False)}),
    ('gemma2', {'attention_scale': 0.25}),
    ('gemma3', {'rope_local_theta': 1000.0}),
    ('gemma3', {'rope_scaling': None}),
    ('gemma3', {'embedding_scale': 5.0}),
    ('llama3', {'rope_scaling': None}),
    ('mistral', {'window': None}),
    ('qwen2', {'rope_scaling': None}),
    ('qwen2-window', {'windowed_layers': None}),
    ('qwen3-moe', {'normalize_expert_weights': True}),
    ('smollm2', {'rope_theta': 1e4}),
  ],
)
def test_golden_logits_depend_on_every_option(name, change):
  # Parity shows nothing about an option that a tiny checkpoint does not feel.
  directory, tokens, expected = golden(name)
  transformer = load_hf(directory, dtype=jnp.float32).transformer
  config = dataclasses.replace(transformer.config, **change)
  for module in (transformer, transformer.layers.attention, transformer.layers.mlp):
    if hasattr(module, 'config'):
      setattr(module, 'config', config)  # noqa: B010
  assert np.abs(full_logits(transformer, tokens) - expected).max() > 100 * _TOLERANCE


def test_dtype_is_that_of_parameters_activations_and_cache():
  directory, tokens, expected = golden('smollm2')
  transformer = load_hf(directory, dtype=jnp.bfloat16).transformer
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(transformer))} == {jnp.bfloat16.dtype}
  cache = as_model(transformer).init_cache(nnx.state(transformer), 1, 8)
  assert cache.keys.dtype == jnp.bfloat16
  assert np.abs(full_logits(transformer, tokens) - expected).mean() < 0.1


def test_loaded_model_says_what_it_is():
  stages = []
  loaded = load_hf(GOLDEN / 'llama3', progress=stages.append)
  assert loaded.name == 'llama3'
  assert loaded.eos_ids == (2,)
  assert loaded.source['kind'] == 'directory'
  assert loaded.source['path'] == str(GOLDEN / 'llama3')
  assert len(loaded.source['sha256'] or '') == 64
  assert stages == ['building the tokenizer', 'reading weights']
  assert loaded.transformer.dtype == jnp.float32  # the default on CPU
  with pytest.raises(ValueError, match='has no tokenizer'):
    loaded.tokenizer.encode('text')


# --- config.json -------------------------------------------------------------------------------


def hf_config(name='smollm2', **changes):
  config = json.loads((GOLDEN / name / 'config.json').read_text())
  return {**config, **changes}


@pytest.mark.parametrize('style', ['rope_scaling', 'rope_parameters'])
def test_llama3_scaling_in_both_styles(style):
  scaling = {
    'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }  # fmt: skip
  config = hf_config()
  for key in ('rope_theta', 'rope_scaling'):
    del config[key]
  if style == 'rope_scaling':
    config |= {'rope_theta': 5e5, 'rope_scaling': scaling}
  else:
    config |= {'rope_parameters': {**scaling, 'rope_theta': 5e5}}
  found = config_from_hf(config)
  assert found.rope_theta == 5e5
  assert found.rope_scaling is not None
  assert (found.rope_scaling.kind, found.rope_scaling.factor) == ('llama3', 32.0)
  assert found.rope_scaling.original_max_position == 8192


def test_old_type_key_and_default_context_of_yarn():
  scaling = {'type': 'yarn', 'factor': 4.0}
  found = config_from_hf(hf_config(rope_scaling=scaling, max_position_embeddings=512)).rope_scaling
  assert found is not None
  assert (found.kind, found.original_max_position) == ('yarn', 512)


def test_gemma3_with_vision_loads_its_text_model(tmp_path):
  directory, tokens, expected = golden('gemma3')
  text = json.loads((directory / 'config.json').read_text())
  config = {'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  tensors = load_file(directory / 'model.safetensors')
  tensors = {f'language_model.{name}': tensor for name, tensor in tensors.items()}
  tensors['vision_tower.patch.weight'] = np.zeros((2, 2), np.float32)
  tensors['multi_modal_projector.weight'] = np.zeros((2, 2), np.float32)
  save_file(tensors, tmp_path / 'model.safetensors')
  logits = full_logits(load_hf(tmp_path).transformer, tokens)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=_TOLERANCE)


def test_gemma3_text_defaults_of_an_abridged_config():
  text = {
    'hidden_size': 2560,
    'num_hidden_layers': 34,
    'intermediate_size': 10240,
    'sliding_window': 1024,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
  }
  found = config_from_hf({'model_type': 'gemma3', 'text_config': text})
  assert (found.num_heads, found.num_kv_heads, found.head_dim) == (8, 4, 256)
  assert (found.rope_theta, found.rope_local_theta) == (1e6, 1e4)
  assert found.layer_is_windowed[:7] == (True,) * 5 + (False, True)
  assert found.embedding_scale == math.sqrt(2560)
  assert found.tie_embeddings


def test_qwen2_windows_need_use_sliding_window():
  config = hf_config('qwen2-window')
  assert config_from_hf(config).layer_is_windowed == (False, True)
  assert config_from_hf({**config, 'use_sliding_window': False}).window is None


def test_mistral_without_a_window():
  assert config_from_hf(hf_config('mistral', sliding_window=None)).window is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'mamba'}, "'mamba' is not supported; supported are llama, mistral"),
    ({'model_type': None}, 'model_type None is not supported'),
    ({'hidden_size': None}, "config.json lacks 'hidden_size'"),
    ({'hidden_act': 'relu'}, "activation 'relu' is not supported for llama"),
    ({'quantization_config': {'bits': 4}}, 'quantised checkpoints are not supported'),
    ({'partial_rotary_factor': 0.5}, 'rotary embedding of only a part'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "'linear', 'llama3' or 'yarn'"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'mscale': 1.0}}, 'without mscale'),
    ({'model_type': 'qwen3_moe', 'mlp_only_layers': [0]}, 'experts in some layers only'),
    ({'model_type': 'gemma2', 'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
    (
      {'model_type': 'mistral', 'sliding_window': 4,
       'layer_types': ['full_attention', 'sliding_attention']},
      'layer_types are not supported for mistral',
    ),
    (
      {'model_type': 'qwen2', 'sliding_window': 4, 'use_sliding_window': True,
       'layer_types': ['full_attention', 'chunked_attention']},
      'chunked_attention',
    ),
  ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    config_from_hf(hf_config(**changes))


def test_supported_types_are_those_with_golden_files():
  covered = {hf_config(name)['model_type'] for name in CHECKPOINTS} | {'gemma3'}
  masked_diffusion = set(BASES)  # see test_diffusion.py
  assert covered | masked_diffusion == set(MODEL_TYPES)


# --- Damaged and foreign directories -----------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
  """Returns a function that copies a golden checkpoint to where it may be damaged."""

  def run(name) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

  return run


@pytest.mark.parametrize('kept', [0, 5, 300, -1])
def test_truncated_weights(copy, kept):
  directory = copy('smollm2')
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match='model.safetensors is damaged or cut short') as error:
    load_hf(directory)
  assert '\n' not in str(error.value)


def test_missing_tensors_are_named(copy):
  directory = copy('smollm2')
  tensors = load_file(directory / 'model.safetensors')
  for layer in range(3):
    del tensors[f'model.layers.{layer}.mlp.up_proj.weight']
  save_file(tensors, directory / 'model.safetensors')
  with pytest.raises(ValueError, match=r'3 tensors \(model.layers.0.mlp.up_proj.weight.*missing'):
    load_hf(directory)


def test_tensors_without_a_use_are_named(copy):
  directory = copy('smollm2')
  tensors = load_file(directory / 'model.safetensors')
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(36, np.float32)
  save_file(tensors, directory / 'model.safetensors')
  with pytest.raises(ValueError, match='self_attn.q_proj.bias of no use'):
    load_hf(directory)


def test_tables_and_a_tied_head_are_ignored(copy):
  directory = copy('smollm2')
  tensors = load_file(directory / 'model.safetensors')
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(2, np.float32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  save_file(tensors, directory / 'model.safetensors')
  load_hf(directory)


def test_wrong_shape(copy):
  directory = copy('smollm2')
  config = hf_config('smollm2', vocab_size=100)
  (directory / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'embed_tokens.weight has shape \(96, 36\)'):
    load_hf(directory)


def test_integer_weights_are_refused(copy):
  directory = copy('smollm2')
  tensors = load_file(directory / 'model.safetensors')
  tensors['model.norm.weight'] = np.zeros(36, np.int8)
  save_file(tensors, directory / 'model.safetensors')
  with pytest.raises(ValueError, match='model.norm.weight is stored as I8'):
    load_hf(directory)


def test_missing_shard(copy):
  directory = copy('llama3')
  (directory / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='lacks 1 of 2 shards: model-00002-of-00002'):
    load_hf(directory)


def test_pickled_weights_are_never_loaded(copy):
  directory = copy('smollm2')
  (directory / 'model.safetensors').rename(directory / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='pickled weights only .pytorch_model.bin.*save_pretrained'):
    load_hf(directory)


def test_directory_without_config_or_weights(tmp_path):
  with pytest.raises(FileNotFoundError, match='no config.json'):
    load_hf(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(hf_config()))
  with pytest.raises(FileNotFoundError, match='neither model.safetensors nor'):
    load_hf(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": ')
  (tmp_path / 'model.safetensors').write_bytes(b'')
  with pytest.raises(ValueError, match='config.json is not valid JSON'):
    load_hf(tmp_path)

"""A tiny random model in a Hugging Face directory, with a character tokenizer and a template."""

import json
import pathlib
import string

import numpy as np
import pytest
from safetensors.numpy import save_file
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

_SPECIAL = ['<unk>', '<|im_start|>', '<|im_end|>']
_TEMPLATE = (
  '{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}'
  '<|im_start|>'
)
_LAYERS, _SIZE, _WIDTH, _HEADS, _KV_HEADS = 4, 32, 48, 4, 2
MAX_POSITION = 256


def save_tiny_model(directory: pathlib.Path, *, seed: int = 0, broken: bool = False) -> None:
  """Writes a model whose weights are random; a broken one has logits that are not numbers."""
  directory.mkdir(parents=True, exist_ok=True)
  vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *string.printable])}
  backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
  backend.add_special_tokens(_SPECIAL)
  backend.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
  backend.decoder = decoders.Fuse()
  backend.save(str(directory / 'tokenizer.json'))
  config = {
    'model_type': 'llama',
    'vocab_size': len(vocabulary),
    'hidden_size': _SIZE,
    'intermediate_size': _WIDTH,
    'num_hidden_layers': _LAYERS,
    'num_attention_heads': _HEADS,
    'num_key_value_heads': _KV_HEADS,
    'max_position_embeddings': MAX_POSITION,
    'tie_word_embeddings': True,
  }
  (directory / 'config.json').write_text(json.dumps(config))
  (directory / 'tokenizer_config.json').write_text(json.dumps({'chat_template': _TEMPLATE}))
  save_file(_weights(len(vocabulary), seed, broken), directory / 'model.safetensors')


def _weights(vocab_size, seed, broken):
  rng = np.random.default_rng(seed)
  kv_size = _SIZE // _HEADS * _KV_HEADS
  shapes: dict[str, tuple[int, ...]] = {'model.embed_tokens': (vocab_size, _SIZE)}
  for layer in range(_LAYERS):
    prefix = f'model.layers.{layer}'
    shapes |= {
      f'{prefix}.self_attn.q_proj': (_SIZE, _SIZE),
      f'{prefix}.self_attn.k_proj': (kv_size, _SIZE),
      f'{prefix}.self_attn.v_proj': (kv_size, _SIZE),
      f'{prefix}.self_attn.o_proj': (_SIZE, _SIZE),
      f'{prefix}.mlp.gate_proj': (_WIDTH, _SIZE),
      f'{prefix}.mlp.up_proj': (_WIDTH, _SIZE),
      f'{prefix}.mlp.down_proj': (_SIZE, _WIDTH),
      f'{prefix}.input_layernorm': (_SIZE,),
      f'{prefix}.post_attention_layernorm': (_SIZE,),
    }
  shapes['model.norm'] = (_SIZE,)
  tensors = {}
  for name, shape in shapes.items():
    scale = rng.normal(size=shape) / np.sqrt(shape[-1])
    tensors[f'{name}.weight'] = np.asarray(scale if len(shape) > 1 else 1 + scale, np.float32)
  if broken:
    tensors['model.norm.weight'][:] = np.nan
  return tensors


@pytest.fixture(scope='session')
def tiny_model(tmp_path_factory):
  directory = tmp_path_factory.mktemp('models') / 'tiny'
  save_tiny_model(directory)
  return directory


@pytest.fixture(scope='session')
def tiny_draft(tmp_path_factory):
  directory = tmp_path_factory.mktemp('models') / 'tiny-draft'
  save_tiny_model(directory, seed=1)
  return directory


@pytest.fixture
def prompts_file(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  records = [
    {'question_id': 7, 'category': 'letters', 'turns': ['abc abc abc abc']},
    {'question_id': 8, 'category': 'digits', 'turns': ['1 2 3 4 5', 'a turn that is not used']},
    {'question_id': 'nine', 'category': 'letters', 'turns': ['Hello, who are you?']},
  ]
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path

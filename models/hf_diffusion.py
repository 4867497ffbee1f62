"""What masked diffusion models call their options and tensors, in the words of the other families.

LLaDA is a Llama with every token seeing every other, under the names of the OLMo code base; Dream
is such a Qwen2, whose head predicts the token after the position it reads; SDAR is a block-causal
Qwen3.
"""

from collections.abc import Mapping
from typing import Any

SHIFTED = {'llada': False, 'Dream': True, 'sdar': False}
"""model_type -> is the token at position i predicted by the hidden state at i - 1?"""

BASES = {'llada': 'llama', 'Dream': 'qwen2', 'sdar': 'qwen3'}
"""model_type -> the family whose layers it has."""

RENAMES = (
  (r'^model\.transformer\.wte\.', 'model.embed_tokens.'),
  (r'^model\.transformer\.ln_f\.', 'model.norm.'),
  (r'^model\.transformer\.ff_out\.', 'lm_head.'),
  (r'^model\.transformer\.blocks\.(\d+)\.', r'model.layers.\1.'),
  (r'(^model\.layers\.\d+\.)([qkv])_proj\.', r'\1self_attn.\2_proj.'),
  (r'(^model\.layers\.\d+\.)attn_out\.', r'\1self_attn.o_proj.'),
  (r'(^model\.layers\.\d+\.)ff_proj\.', r'\1mlp.gate_proj.'),
  (r'(^model\.layers\.\d+\.)up_proj\.', r'\1mlp.up_proj.'),
  (r'(^model\.layers\.\d+\.)ff_out\.', r'\1mlp.down_proj.'),
  (r'(^model\.layers\.\d+\.)attn_norm\.', r'\1input_layernorm.'),
  (r'(^model\.layers\.\d+\.)ff_norm\.', r'\1post_attention_layernorm.'),
)
"""Patterns that turn LLaDA's tensor names into those of Llama."""

_LLADA_KEYS = {
  'd_model': 'hidden_size',
  'n_layers': 'num_hidden_layers',
  'n_heads': 'num_attention_heads',
  'n_kv_heads': 'num_key_value_heads',
  'mlp_hidden_size': 'intermediate_size',
  'max_sequence_length': 'max_position_embeddings',
  'activation_type': 'hidden_act',
  'weight_tying': 'tie_word_embeddings',
  'include_qkv_bias': 'attention_bias',
  'rope_theta': 'rope_theta',
  'rms_norm_eps': 'rms_norm_eps',
}
# Options of the code base that LLaDA does not use, and what they must be.
_LLADA_REQUIRED = {
  'layer_norm_type': 'rms',
  'block_type': 'llama',
  'rope': True,
  'alibi': False,
  'include_bias': False,
  'include_qkv_bias': False,
  'attention_layer_norm': False,
  'input_emb_norm': False,
  'scale_logits': False,
  'clip_qkv': None,
}


def to_base(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a diffusion model's `config.json` as one of the family it is made from.

  Raises:
    ValueError: if it uses an option that is not supported.
  """
  family = config['model_type']
  if family != 'llada':
    return {**config, 'model_type': BASES[family]}
  for key, wanted in _LLADA_REQUIRED.items():
    if config.get(key, wanted) not in (wanted, wanted or None):
      raise ValueError(f'LLaDA with {key}={config[key]!r} is not supported; it must be {wanted!r}')
  names = {new: config[old] for old, new in _LLADA_KEYS.items() if config.get(old) is not None}
  size = config.get('embedding_size') or config.get('vocab_size')
  kept = {k: config[k] for k in ('quantization_config',) if k in config}
  return {**names, **kept, 'vocab_size': size, 'model_type': BASES[family]}

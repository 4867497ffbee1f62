"""LLaDA and Dream as plain NumPy, from the tensors under their published names.

Axes: `B` batch, `T` tokens, `D` hidden size, `H` heads, `V` vocabulary.
"""

from collections.abc import Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]


def _rms(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def _rotary(x, theta):
  """Returns x[B, T, H, Dh] turned by its position, the two halves of a head being a pair."""
  size = x.shape[-1]
  frequency = theta ** (-np.arange(0, size, 2) / size)
  angle = np.arange(x.shape[1])[:, None] * frequency
  cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
  first, second = x[..., : size // 2], x[..., size // 2 :]
  return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attend(x, tensors, names, heads, kv_heads, theta):
  """Returns f64[B, T, D]: every token sees every other."""

  def project(name, count):
    y = x @ tensors[name + '.weight'].T
    if name + '.bias' in tensors:
      y = y + tensors[name + '.bias']
    return y.reshape(*x.shape[:2], count, -1)

  q, k, v = (
    project(name, count) for name, count in zip(names, (heads, kv_heads, kv_heads), strict=True)
  )
  q, k = _rotary(q, theta), _rotary(k, theta)
  k, v = (np.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
  scores = np.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights = weights / weights.sum(-1, keepdims=True)
  return np.einsum('bhts,bshd->bthd', weights, v).reshape(*x.shape[:2], -1)


def _swiglu(x, gate, up, down):
  g = x @ gate.T
  return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def llada_logits(tensors: Tensors, tokens: np.ndarray, config) -> np.ndarray:
  """Returns f64[B, T, V]; the logits at i are those of the token at i."""
  tensors = {k: v.astype(np.float64) for k, v in tensors.items()}
  eps = config['rms_norm_eps']
  x = tensors['model.transformer.wte.weight'][tokens]
  for layer in range(config['n_layers']):
    name = f'model.transformer.blocks.{layer}.'
    y = _rms(x, tensors[name + 'attn_norm.weight'], eps)
    names = [name + f'{which}_proj' for which in 'qkv']
    y = _attend(y, tensors, names, config['n_heads'], config['n_kv_heads'], config['rope_theta'])
    x = x + y @ tensors[name + 'attn_out.weight'].T
    y = _rms(x, tensors[name + 'ff_norm.weight'], eps)
    x = x + _swiglu(y, *(tensors[name + n] for n in ('ff_proj.weight', 'up_proj.weight',
                                                      'ff_out.weight')))  # fmt: skip
  x = _rms(x, tensors['model.transformer.ln_f.weight'], eps)
  return x @ tensors['model.transformer.ff_out.weight'].T


def dream_logits(tensors: Tensors, tokens: np.ndarray, config) -> np.ndarray:
  """Returns f64[B, T, V] before the shift; the logits at i are those of the token at i + 1."""
  tensors = {k: v.astype(np.float64) for k, v in tensors.items()}
  eps, heads = config['rms_norm_eps'], config['num_attention_heads']
  x = tensors['model.embed_tokens.weight'][tokens]
  for layer in range(config['num_hidden_layers']):
    name = f'model.layers.{layer}.'
    y = _rms(x, tensors[name + 'input_layernorm.weight'], eps)
    names = [name + f'self_attn.{which}_proj' for which in 'qkv']
    y = _attend(y, tensors, names, heads, config['num_key_value_heads'], config['rope_theta'])
    x = x + y @ tensors[name + 'self_attn.o_proj.weight'].T
    y = _rms(x, tensors[name + 'post_attention_layernorm.weight'], eps)
    parts = [tensors[f'{name}mlp.{n}_proj.weight'] for n in ('gate', 'up', 'down')]
    x = x + _swiglu(y, *parts)
  return _rms(x, tensors['model.norm.weight'], eps) @ tensors['lm_head.weight'].T


LLADA = dict(
  model_type='llada', architectures=['LLaDAModelLM'], d_model=32, n_layers=2, n_heads=4,
  n_kv_heads=2, mlp_hidden_size=48, vocab_size=90, embedding_size=96, max_sequence_length=128,
  rope_theta=500.0, rms_norm_eps=1e-5, layer_norm_type='rms', block_type='llama', rope=True,
  alibi=False, include_bias=False, include_qkv_bias=False, weight_tying=False, clip_qkv=None,
  activation_type='silu', mask_token_id=95, eos_token_id=2,
)  # fmt: skip
DREAM = dict(
  model_type='Dream', architectures=['DreamModel'], hidden_size=32, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=96,
  max_position_embeddings=128, rope_theta=1000.0, rms_norm_eps=1e-6, hidden_act='silu',
  tie_word_embeddings=False, use_sliding_window=False, mask_token_id=95, eos_token_id=2,
)  # fmt: skip


def random_tensors(config, seed: int = 0) -> dict[str, np.ndarray]:
  """Returns random weights f32 under the family's names, large enough for every part to show."""
  rng = np.random.default_rng(seed)
  llada = config['model_type'] == 'llada'
  size, width = (config[k] for k in (('d_model', 'mlp_hidden_size') if llada
                                     else ('hidden_size', 'intermediate_size')))  # fmt: skip
  kv = size // 2
  if llada:
    top = {'wte': (96, size), 'ff_out': (96, size), 'ln_f': (size,)}
    layer = {
      'q_proj': (size, size), 'k_proj': (kv, size), 'v_proj': (kv, size),
      'attn_out': (size, size), 'ff_proj': (width, size), 'up_proj': (width, size),
      'ff_out': (size, width), 'attn_norm': (size,), 'ff_norm': (size,),
    }  # fmt: skip
    prefix, inside = 'model.transformer.', 'model.transformer.blocks.{}.'
  else:
    top = {'embed_tokens': (96, size), 'norm': (size,)}
    layer = {
      'self_attn.q_proj': (size, size), 'self_attn.k_proj': (kv, size),
      'self_attn.v_proj': (kv, size), 'self_attn.o_proj': (size, size),
      'mlp.gate_proj': (width, size), 'mlp.up_proj': (width, size), 'mlp.down_proj': (size, width),
      'input_layernorm': (size,), 'post_attention_layernorm': (size,),
    }  # fmt: skip
    prefix, inside = 'model.', 'model.layers.{}.'
  shapes = {f'{prefix}{name}.weight': shape for name, shape in top.items()}
  for index in range(2):
    shapes |= {f'{inside.format(index)}{name}.weight': shape for name, shape in layer.items()}
    if not llada:
      shapes |= {
        f'{inside.format(index)}self_attn.{which}_proj.bias': (n,)
        for which, n in zip('qkv', (size, kv, kv), strict=True)
      }
  if not llada:
    shapes['lm_head.weight'] = (96, size)

  def draw(name, shape):
    if 'norm' in name or 'ln_f' in name:
      return 1 + 0.2 * rng.standard_normal(shape)
    scale = 0.3 if len(shape) == 1 else 0.5 if 'wte' in name or 'embed' in name else 1.5
    return rng.standard_normal(shape) * scale / (1 if len(shape) == 1 else np.sqrt(shape[-1]))

  return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}

"""One decoder for Llama, SmolLM2, Mistral, Qwen, Gemma and bidirectional relatives.

Axes: `B` batch, `T` tokens, `N` block nodes, `L` layers, `D` hidden size, `F` MLP size, `V`
vocabulary, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `Dh` head size, `X` experts.

Layers are stacked along a leading L axis and run by one scan, so compile time does not grow with
depth. Projections that read the same input are stored as one matrix, `[in, out]`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from decodax.kv_cache import KVBlock
from decodax.kv_cache import KVCache
from decodax.kv_cache import write_kv_block
from decodax.types import ModelOutput
from models.config import TransformerConfig
from models.config import layer_windows
from models.config import rope_frequencies
from models.moe import ExpertMLP
from pallas_kernels.block_attention import Prefix
from pallas_kernels.block_attention import block_attention
from pallas_kernels.skinny_matmul import skinny_matmul

_ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}
_normal = nnx.initializers.normal(0.02)


class PerLayer(NamedTuple):
  """Matrices of all layers, each an array of its own, and which layer's is meant.

  The place of one stacked array `[L, in, ...]`, see `with_separate_layers`.
  """

  matrices: tuple[jax.Array, ...]  # L times f[in, ...]
  layer: jax.Array | None = None  # i32[]; None while no layer runs


class RMSNorm(nnx.Module):
  """Root-mean-square norm, computed in float32."""

  def __init__(self, size: int, config: TransformerConfig, *, param_dtype):
    start = jnp.zeros if config.norm_plus_one else jnp.ones
    self.scale = nnx.Param(start((size,), param_dtype))
    self.eps, self.plus_one = config.norm_eps, config.norm_plus_one

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x[..., size] normalised over its last axis, in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(_mean_square(wide) + self.eps)
    scale = self.scale[...].astype(jnp.float32)
    return (wide * _as_row(scale + 1 if self.plus_one else scale, x)).astype(x.dtype)


class Attention(nnx.Module):
  """Projections around block attention. Query heads are grouped by the key head they read.

  Args:
    config: shape and options.
    rngs: where initial parameters come from.
    param_dtype: storage dtype of the parameters.
    input_size: width of what is read, if it is not the hidden size, which is written.
  """

  def __init__(
    self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype, input_size: int | None = None
  ):
    heads, kv, group, dim = (
      config.num_heads,
      config.num_kv_heads,
      config.group_size,
      config.head_dim,
    )
    self.config = config
    input_size = config.hidden_size if input_size is None else input_size
    # For each key head: its G queries, the key, the value.
    self.qkv = nnx.Param(_normal(rngs.params(), (input_size, kv, group + 2, dim), param_dtype))
    self.out = nnx.Param(_normal(rngs.params(), (heads * dim, config.hidden_size), param_dtype))
    norm = functools.partial(RMSNorm, dim, config, param_dtype=param_dtype)
    zeros = _zeros(param_dtype)
    self.qkv_bias = zeros(kv, group + 2, dim) if config.qkv_bias else None
    self.out_bias = zeros(config.hidden_size) if config.out_bias else None
    self.q_norm = norm() if config.qk_norm else None
    self.k_norm = norm() if config.qk_norm else None

  def __call__(self, x: jax.Array, site: 'AttentionSite') -> tuple[jax.Array, tuple]:
    """Returns (f[B, T, D], this block's own (keys, values) f[B, Hkv, T, Dh])."""
    config = self.config
    batch, length, _ = x.shape
    qkv = _multiply(x, self.qkv)
    qkv = qkv.reshape(batch, length, config.num_kv_heads, config.group_size + 2, config.head_dim)
    if self.qkv_bias is not None:
      qkv = qkv + self.qkv_bias[...].astype(x.dtype)[None, None]
    queries, keys, values = jnp.split(qkv, [config.group_size, config.group_size + 1], axis=3)
    queries = queries.reshape(batch, length, config.num_heads, config.head_dim)
    keys = keys[:, :, :, 0]
    if self.q_norm is not None and self.k_norm is not None:
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    queries, keys = _rotate(queries, site.rotation), _rotate(keys, site.rotation)
    own = tuple(a.transpose(0, 2, 1, 3) for a in (keys, values[:, :, :, 0]))
    mixed = site.attend(queries, *own).reshape(batch, length, -1)
    y = _multiply(mixed, self.out)
    if self.out_bias is not None:
      y = y + _as_row(self.out_bias[...].astype(x.dtype), y)
    return y, own


class MLP(nnx.Module):
  """Gated MLP (SwiGLU or GeGLU)."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype):
    size, width = config.hidden_size, config.intermediate_size
    self.activation = config.activation
    self.gate_up = nnx.Param(_normal(rngs.params(), (size, 2, width), param_dtype))
    self.down = nnx.Param(_normal(rngs.params(), (width, size), param_dtype))
    zeros = _zeros(param_dtype)
    self.gate_up_bias = zeros(2, width) if config.mlp_bias else None
    self.down_bias = zeros(size) if config.mlp_bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns f[B, T, D]."""
    both = _multiply(x, self.gate_up)
    if self.gate_up_bias is not None:
      both = both + _as_row(self.gate_up_bias[...].astype(x.dtype).reshape(-1), both)
    gate, up = jnp.split(both, 2, axis=-1)
    y = _multiply(_ACTIVATIONS[self.activation](gate) * up, self.down)
    if self.down_bias is not None:
      y = y + _as_row(self.down_bias[...].astype(x.dtype), y)
    return y


class Layer(nnx.Module):
  """One transformer layer."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    norm = functools.partial(RMSNorm, config.hidden_size, config, param_dtype=param_dtype)
    self.attention_norm, self.mlp_norm = norm(), norm()
    self.attention_post_norm = norm() if config.post_norms else None
    self.mlp_post_norm = norm() if config.post_norms else None
    self.attention = Attention(config, rngs=rngs, param_dtype=param_dtype)
    mlp = ExpertMLP if config.num_experts else MLP
    self.mlp = mlp(config, rngs=rngs, param_dtype=param_dtype)

  def __call__(self, x: jax.Array, site: 'AttentionSite') -> tuple[jax.Array, tuple]:
    """Returns (the residual stream f[B, T, D], this block's own keys and values)."""
    y, own = self.attention(self.attention_norm(x), site)
    x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
    y = self.mlp(self.mlp_norm(x))
    return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), own


class AttentionSite(NamedTuple):
  """What a layer needs to know about where it stands."""

  rotation: tuple[jax.Array, jax.Array]  # cos and sin, f32[B, T, 1, Dh/2]
  attend: Callable  # (queries f[B, T, H, Dh], keys, values f[B, Hkv, T, Dh]) -> f[B, T, H, Dh]


class Transformer(nnx.Module):
  """A decoder: embedding, stacked layers, final norm, head.

  Args:
    config: shape and options.
    rngs: where initial parameters come from.
    param_dtype: storage dtype of the parameters.
    dtype: dtype of activations and of the cache.
  """

  def __init__(
    self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, dtype=jnp.float32
  ):
    self.config, self.dtype = config, dtype
    shape = (config.vocab_size, config.hidden_size)
    self.embedding = nnx.Param(_normal(rngs.params(), shape, param_dtype))
    self.layers = nnx.vmap(
      lambda keys: Layer(config, rngs=nnx.Rngs(params=keys), param_dtype=param_dtype)
    )(jax.random.split(rngs.params(), config.num_layers))
    self.final_norm = RMSNorm(config.hidden_size, config, param_dtype=param_dtype)
    self.head = (
      None if config.tie_embeddings else nnx.Param(_normal(rngs.params(), shape[::-1], param_dtype))
    )

  def embed(self, tokens: jax.Array, more: jax.Array | None = None) -> jax.Array:
    """Returns f[B, T, D] for tokens i32[B, T]; with more f[E, D] the token V + e is its row e."""
    x = self.embedding[...][tokens].astype(self.dtype)
    if more is not None:
      place = tokens - self.config.vocab_size
      x = jnp.where((place >= 0)[..., None], more[jnp.maximum(place, 0)].astype(self.dtype), x)
    return x * jnp.asarray(self.config.embedding_scale, self.dtype)

  def unembed(self, hidden: jax.Array, tokens: jax.Array | None = None) -> jax.Array:
    """Returns logits f32[..., V] for hidden f[..., D] after the final norm.

    With tokens i32[n] only theirs, f32[..., n].
    """
    chosen = slice(None) if tokens is None else tokens
    if self.head is None:
      kernel = self.embedding[...][chosen].astype(hidden.dtype)
      logits = jnp.einsum('...d,vd->...v', hidden, kernel, preferred_element_type=jnp.float32)
    elif tokens is None and hidden.dtype == self.head.dtype == jnp.float32:
      logits = _times(hidden, [self.head[...]])
    else:
      kernel = self.head[...][:, chosen].astype(hidden.dtype)
      logits = jnp.einsum('...d,dv->...v', hidden, kernel, preferred_element_type=jnp.float32)
    cap = self.config.logit_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    *,
    cache: KVCache | None = None,
    scratch: KVBlock | None = None,
    offset: jax.Array | int = 0,
    num_layers: int | None = None,
    taps: Sequence[int] = (),
    embeddings: jax.Array | None = None,
  ) -> tuple[ModelOutput, KVBlock]:
    """Returns (what the head multiplies and the taps, the block's keys and values).

    Args:
      tokens: i32[B, T].
      positions: i32[B, T], for the rotary embedding and the windows.
      mask: bool[B, T, T] within the block, or bool[B, T, N] over `scratch`.
      cache: committed tokens that every query sees up to the cache's length; None: there are none.
      scratch: an earlier block of N nodes; the T tokens are written into it at `offset`.
      offset: i32[], where in `scratch`.
      num_layers: run only the first layers and the final norm (early exit).
      taps: which residual streams to return as `features['layer_i']`: the one entering layer i,
        or, for i equal to the number of layers, the one leaving the last.
      embeddings: f[E, D], rows that the tokens V + e stand for; None: there are no such tokens.
    """
    num_layers = self.config.num_layers if num_layers is None else num_layers
    graph, stacked = nnx.split(self.layers)
    run = functools.partial(
      self._run_layer, graph, stacked, self._tables(), positions, mask, cache, scratch, offset
    )

    x = self.embed(tokens, embeddings)
    tapped = tuple(jnp.zeros_like(x) for _ in taps)

    def step(carry, layer):
      x, tapped = carry
      tapped = tuple(jnp.where(layer == tap, x, old) for tap, old in zip(taps, tapped, strict=True))
      x, own = run(x, layer)
      return (x, tapped), own

    (x, tapped), (keys, values) = lax.scan(step, (x, tapped), jnp.arange(num_layers))
    features = {
      f'layer_{tap}': x if tap == num_layers else old for tap, old in zip(taps, tapped, strict=True)
    }
    block = KVBlock(keys, values, positions)
    if scratch is not None:
      block = write_kv_block(scratch, block, offset)
    return ModelOutput(self.final_norm(x), features), block

  def _tables(self):
    frequencies, factor = rope_frequencies(self.config)
    windows = layer_windows(self.config)
    windows = None if windows is None else jnp.asarray(windows)
    return jnp.asarray(frequencies), factor, windows

  def _run_layer(self, graph, stacked, tables, positions, mask, cache, scratch, offset, x, layer):
    one = jax.tree.map(
      functools.partial(_of_layer, layer), stacked, is_leaf=lambda a: isinstance(a, PerLayer)
    )
    site = _site(self.config, tables, positions, mask, cache, scratch, offset, layer)
    return nnx.merge(graph, one)(x, site)


def attention_site(
  config: TransformerConfig,
  positions: jax.Array,
  mask: jax.Array,
  *,
  cache: KVCache | None = None,
  scratch: KVBlock | None = None,
  offset: jax.Array | int = 0,
) -> AttentionSite:
  """Returns where the only layer of a small model stands; arguments as `Transformer.__call__`."""
  frequencies, factor = rope_frequencies(config)
  windows = layer_windows(config)
  windows = None if windows is None else jnp.asarray(windows)
  tables = jnp.asarray(frequencies), factor, windows
  return _site(config, tables, positions, mask, cache, scratch, offset, 0)


def _site(config, tables, positions, mask, cache, scratch, offset, layer) -> AttentionSite:
  frequencies, factor, windows = tables
  angles = positions[..., None, None].astype(jnp.float32) * frequencies[layer][None, None, None]

  def attend(queries, keys, values):
    key_positions = positions
    if scratch is not None:
      scratch_layer = KVBlock(
        scratch.keys[layer][None], scratch.values[layer][None], scratch.positions
      )
      block = write_kv_block(scratch_layer, KVBlock(keys[None], values[None], positions), offset)
      keys, values, key_positions = block.keys[0], block.values[0], block.positions
    prefix = None if cache is None else Prefix(*cache, layer=layer)
    return block_attention(
      queries,
      keys,
      values,
      mask,
      prefix,
      scale=config.attention_scale or config.head_dim**-0.5,
      soft_cap=config.attention_soft_cap,
      window=None if windows is None else windows[layer],
      query_positions=positions,
      key_positions=key_positions,
    )

  return AttentionSite((jnp.cos(angles) * factor, jnp.sin(angles) * factor), attend)


def unembedding(transformer: Transformer) -> jax.Array:
  """Returns f[D, V], the matrix that `Transformer.unembed` multiplies with."""
  return transformer.embedding[...].T if transformer.head is None else transformer.head[...]


def with_own_head(transformer: Transformer) -> Transformer:
  """Returns the transformer with a head of its own, a transposed copy of a tied embedding.

  It costs the memory of one embedding. On CPU a block of several tokens is unembedded faster from
  `[in, out]`.
  """
  config = transformer.config
  if not config.tie_embeddings:
    return transformer
  graph, state = nnx.split(transformer)
  own = nnx.merge(graph, state)
  own.config = dataclasses.replace(config, tie_embeddings=False)
  own.head = nnx.data(nnx.Param(transformer.embedding[...].T))
  return own


def with_separate_layers(transformer: Transformer) -> Transformer:
  """Returns the transformer with the large matrices of each layer as arrays of their own.

  For decoding on CPU. There XLA copies a layer's part of a stacked array before it multiplies with
  it: a quarter of the time of a step on one token. Layers still run in one scan, which hands all of
  them and the layer's number to `skinny_matmul`. Not for training, which would make a gradient of
  every layer at each layer.
  """
  graph, state = nnx.split(transformer)
  flat = dict(nnx.to_flat_state(state))
  for path, variable in flat.items():
    stacked = variable.get_value()
    if path[1:] in _separable(transformer.config) and not isinstance(stacked, PerLayer):
      flat[path] = variable.replace(PerLayer(tuple(stacked)))
  return nnx.merge(graph, nnx.from_flat_state(flat))


def for_decoding(transformer: Transformer) -> Transformer:
  """Returns the transformer laid out as it decodes fastest on the default backend.

  On CPU with its own head and separate layers, elsewhere as it is.
  """
  if jax.default_backend() != 'cpu':
    return transformer
  return with_separate_layers(with_own_head(transformer))


def full_mask(config: TransformerConfig, batch_size: int, length: int) -> jax.Array:
  """Returns bool[B, T, T], causal or all ones as the configuration says."""
  ones = jnp.ones((length, length), bool)
  mask = ones if config.bidirectional else jnp.tril(ones)
  return jnp.broadcast_to(mask, (batch_size, length, length))


def _separable(config):
  mlp = () if config.num_experts else (('mlp', 'gate_up'), ('mlp', 'down'))
  return (('attention', 'qkv'), ('attention', 'out'), *mlp)


def _of_layer(layer, stacked):
  if isinstance(stacked, PerLayer):
    return stacked._replace(layer=layer)
  return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _multiply(x, param):
  """Returns f[..., out], x[..., in] times a parameter f[in, ...] whose other axes become one."""

  kernel = param.get_value()
  if isinstance(kernel, PerLayer):
    flat = [matrix.reshape(matrix.shape[0], -1) for matrix in kernel.matrices]
    return _times(x, flat, 0 if kernel.layer is None else kernel.layer)
  return x @ kernel.astype(x.dtype).reshape(kernel.shape[0], -1)


def _times(x, matrices, layer: jax.Array | int = 0):
  """Returns f[..., out], x[..., in] times one of the matrices [in, out]."""
  return skinny_matmul(x.reshape(-1, x.shape[-1]), matrices, layer).reshape(*x.shape[:-1], -1)


def _zeros(param_dtype):
  return lambda *shape: nnx.Param(jnp.zeros(shape, param_dtype))


def _as_row(vector, like):
  """Returns vector[n] with leading axes of size one, to combine with like[..., n]."""
  return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _mean_square(x):
  """Returns f32[..., 1], the mean over the last axis of x squared.

  On CPU in two steps that XLA must not merge: it would turn one long sum into a slow window
  reduction, which costs a tenth of a decoding step.
  """
  size = x.shape[-1]

  def in_two_steps(x):
    width = math.gcd(size, 32)
    parts = jnp.square(x).reshape(*x.shape[:-1], size // width, width).sum(-1)
    return lax.optimization_barrier(parts).sum(-1, keepdims=True) / size

  def at_once(x):
    return jnp.mean(jnp.square(x), -1, keepdims=True)

  return lax.platform_dependent(x, cpu=in_two_steps, default=at_once)


def _rotate(x, rotation):
  """Returns f[B, T, heads, Dh] turned by its position: half-split rotary embedding."""
  cos, sin = (table.astype(x.dtype) for table in rotation)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

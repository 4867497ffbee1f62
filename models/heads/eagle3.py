"""EAGLE-3: a layer that reads features from three depths of the target and drafts on its own.

Axes: `B` batch, `T` tokens, `D` width, `Dt` width of the target, `V` vocabulary, `Vd` draft
vocabulary.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from decodax.drafters.expander import Expander
from decodax.types import ModelOutput
from models.config import TransformerConfig
from models.heads.recurrent import recurrent_expander
from models.heads.vocabulary import DraftVocabulary
from models.transformer import MLP
from models.transformer import Attention
from models.transformer import AttentionSite
from models.transformer import RMSNorm
from models.transformer import Transformer
from models.transformer import unembedding


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
  """Shape and options of an EAGLE-3 head. Weights made with one set of options fit no other."""

  layer: TransformerConfig  # of its one layer; `vocab_size` is the target's
  taps: tuple[int, ...]  # the residual streams that enter these layers, shallow to deep
  target_hidden_size: int
  draft_vocab_size: int | None = None
  own_embedding: bool = False  # else the target's is used; then the widths are equal
  norm_before_fuse: bool = False  # one norm over all taps together
  norm_taps: bool = False  # one norm for each tap
  norm_before_residual: bool = False  # the residual is the normed state
  feed_normed: bool = False  # the state that goes on is the normed one

  def __post_init__(self):
    if not self.own_embedding and self.layer.hidden_size != self.target_hidden_size:
      raise ValueError(
        f'a head that is {self.layer.hidden_size} wide cannot use the embedding of a target that '
        f'is {self.target_hidden_size} wide: it needs own_embedding'
      )


def default_taps(num_layers: int) -> tuple[int, int, int]:
  """Returns the layers whose incoming streams the published heads read: 2, L // 2, L - 3.

  A target of fewer than seven layers is too shallow for that: a quarter, a half, and the stream
  that leaves the last one.
  """
  if num_layers < 7:
    return max(1, num_layers // 4), max(1, num_layers // 2), num_layers
  return 2, num_layers // 2, num_layers - 3


class Eagle3(nnx.Module):
  """g = F [taps]; then for each token of a chain one decoder layer that reads 2 D and writes D.

  The attention reads [norm(embedding); norm(g)], the residual is g. Logits are a trained projection
  of norm(g) to the draft vocabulary.

  Args:
    config: shape and options.
    target: whose head the projection starts from, where the widths agree.
    rngs: where initial parameters come from.
    vocabulary: draft vocabulary, or None.

  Source: EAGLE-3, arXiv:2503.01840, section 3 and its code.
  """

  def __init__(
    self,
    config: Eagle3Config,
    target: Transformer,
    *,
    rngs: nnx.Rngs,
    vocabulary: DraftVocabulary | None = None,
  ):
    layer, dtype = config.layer, target.embedding[...].dtype
    size, width, taps = layer.hidden_size, config.target_hidden_size, len(config.taps)
    self.config = config
    self.vocabulary = vocabulary

    def normal(*shape):
      return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

    def norm(size):
      return RMSNorm(size, layer, param_dtype=dtype)

    self.fuse = normal(taps * width, size)
    self.fuse_norm = norm(taps * width) if config.norm_before_fuse else None
    self.tap_norms = nnx.List([norm(width) for _ in range(taps)]) if config.norm_taps else None
    self.embedding = normal(layer.vocab_size, size) if config.own_embedding else None
    self.embedding_norm, self.state_norm = norm(size), norm(size)
    self.attention = Attention(layer, rngs=rngs, param_dtype=dtype, input_size=2 * size)
    self.mlp_norm, self.final_norm = norm(size), norm(size)
    self.mlp = MLP(layer, rngs=rngs, param_dtype=dtype)
    if size == width:
      start = unembedding(target)
      start = start if vocabulary is None else vocabulary.restrict(start)
      self.head = nnx.Param(jnp.array(start, dtype))
    else:
      self.head = normal(size, layer.vocab_size if vocabulary is None else vocabulary.size)

  @property
  def layer_config(self) -> TransformerConfig:
    """Of its layer."""
    return self.config.layer

  def start(self, output: ModelOutput) -> jax.Array:
    """Returns f[B, T, D], the fused taps: features 'layer_i' f[B, T, Dt] of the target."""
    taps = [output.features[f'layer_{tap}'] for tap in self.config.taps]
    if self.tap_norms is not None:
      taps = [norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)]
    x = jnp.concatenate(taps, axis=-1)
    if self.fuse_norm is not None:
      x = self.fuse_norm(x)
    return x @ self.fuse[...].astype(x.dtype)

  def embed(self, target: Transformer, tokens: jax.Array) -> jax.Array:
    """Returns f[B, T, D] for tokens i32[B, T]."""
    if self.embedding is None:
      return target.embed(tokens)
    return self.embedding[...][tokens].astype(target.dtype)

  def step(
    self, state: jax.Array, embedded: jax.Array, site: AttentionSite
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (the next states f[B, T, D], the layer's keys and values)."""
    normed = self.state_norm(state)
    both = jnp.concatenate([self.embedding_norm(embedded), normed], axis=-1)
    y, own = self.attention(both, site)
    x = (normed if self.config.norm_before_residual else state) + y
    x = x + self.mlp(self.mlp_norm(x))
    return self.final_norm(x) if self.config.feed_normed else x, own

  def draft_logits(self, state: jax.Array) -> jax.Array:
    """Returns f32[..., Vd] for states f[..., D]."""
    x = state if self.config.feed_normed else self.final_norm(state)
    kernel = self.head[...].astype(x.dtype)
    return jnp.einsum('...d,dv->...v', x, kernel, preferred_element_type=jnp.float32)

  def logits(self, target: Transformer, state: jax.Array) -> jax.Array:
    """Returns f32[..., V], -inf outside the draft vocabulary."""
    del target
    logits = self.draft_logits(state)
    return logits if self.vocabulary is None else self.vocabulary.widen(logits)


def eagle3_expander(eagle: Eagle3, target: Transformer) -> Expander:
  """Returns how an EAGLE-3 head drafts; parameters: `Params.drafter` is `nnx.state(eagle)`.

  The target must show its taps: `as_model(target, taps=eagle.config.taps)`.

  Source: EAGLE-3, arXiv:2503.01840.
  """
  return recurrent_expander(
    eagle,
    target,
    vocab_size=target.config.vocab_size,
    draft_vocab_size=eagle.config.draft_vocab_size,
  )

"""EAGLE: a layer that guesses the target's next hidden state, and drafts with the target's head.

Axes: `B` batch, `T` tokens, `D` width, `V` vocabulary.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from decodax.drafters.expander import Expander
from decodax.types import ModelOutput
from models.config import TransformerConfig
from models.heads.recurrent import recurrent_expander
from models.transformer import MLP
from models.transformer import Attention
from models.transformer import AttentionSite
from models.transformer import RMSNorm
from models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class EagleConfig:
  """Shape and options of an EAGLE head."""

  layer: TransformerConfig  # of its one layer; width and vocabulary are the target's
  bias: bool = True  # of the fusion


class Eagle(nnx.Module):
  """u = F [embedding of the next token; hidden state] + b, then a decoder layer without its input
  norm. The result stands for the target's next hidden state after the final norm.

  Args:
    config: shape and options.
    target: for the dtype of the parameters.
    rngs: where initial parameters come from.

  Source: EAGLE, arXiv:2401.15077, section 4.1 and its code.
  """

  def __init__(self, config: EagleConfig, target: Transformer, *, rngs: nnx.Rngs):
    layer, dtype = config.layer, target.embedding[...].dtype
    size = layer.hidden_size
    self.config = config
    self.fuse = nnx.Param(0.02 * jax.random.normal(rngs.params(), (2 * size, size), dtype))
    self.fuse_bias = nnx.Param(jnp.zeros((size,), dtype)) if config.bias else None
    self.attention = Attention(layer, rngs=rngs, param_dtype=dtype)
    self.mlp_norm = RMSNorm(size, layer, param_dtype=dtype)
    self.mlp = MLP(layer, rngs=rngs, param_dtype=dtype)

  @property
  def layer_config(self) -> TransformerConfig:
    """Of its layer."""
    return self.config.layer

  def start(self, output: ModelOutput) -> jax.Array:
    """Returns f[B, T, D], the target's hidden state after the final norm."""
    return output.hidden

  def embed(self, target: Transformer, tokens: jax.Array) -> jax.Array:
    """Returns the target's embedding f[B, T, D] of tokens i32[B, T]."""
    return target.embed(tokens)

  def step(
    self, state: jax.Array, embedded: jax.Array, site: AttentionSite
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (the guess f[B, T, D] of the next hidden state, the layer's keys and values)."""
    both = jnp.concatenate([embedded, state], axis=-1)
    x = both @ self.fuse[...].astype(both.dtype)
    if self.fuse_bias is not None:
      x = x + self.fuse_bias[...].astype(x.dtype)[None, None]
    y, own = self.attention(x, site)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), own

  def logits(self, target: Transformer, state: jax.Array) -> jax.Array:
    """Returns f32[..., V] by the target's head, without another norm."""
    return target.unembed(state)


def eagle_expander(eagle: Eagle, target: Transformer) -> Expander:
  """Returns how an EAGLE head drafts; parameters: `Params.drafter` is `nnx.state(eagle)`.

  Source: EAGLE, arXiv:2401.15077. With `decodax.drafters.eagle2_tree`: EAGLE-2, arXiv:2406.16858.
  """
  return recurrent_expander(eagle, target, vocab_size=target.config.vocab_size)

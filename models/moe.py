"""A mixture-of-experts MLP with top-k routing.

Axes: `B` batch, `T` tokens, `D` hidden size, `F` expert width, `X` experts, `k` experts a token.
"""

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from models.config import TransformerConfig

_normal = nnx.initializers.normal(0.02)


class ExpertMLP(nnx.Module):
  """Gated experts; every token is sent to its k best and none is dropped.

  Tokens are sorted by expert and multiplied group by group (`lax.ragged_dot`), so the work is k
  experts a token whatever the routing.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype):
    size, width, experts = config.hidden_size, config.intermediate_size, config.num_experts
    self.config = config
    self.router = nnx.Param(_normal(rngs.params(), (size, experts), param_dtype))
    self.gate_up = nnx.Param(_normal(rngs.params(), (experts, size, 2, width), param_dtype))
    self.down = nnx.Param(_normal(rngs.params(), (experts, width, size), param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns f[B, T, D]."""
    config, flat = self.config, x.reshape(-1, x.shape[-1])
    chosen = config.num_experts_per_token
    laws = jax.nn.softmax((flat @ self.router[...].astype(x.dtype)).astype(jnp.float32), -1)
    weights, experts = lax.top_k(laws, chosen)  # [B * T, k]
    if config.normalize_expert_weights:
      weights = weights / weights.sum(-1, keepdims=True)

    order = jnp.argsort(experts.reshape(-1))
    rows = flat[order // chosen]
    sizes = jnp.bincount(experts.reshape(-1), length=config.num_experts).astype(jnp.int32)
    gate_up = self.gate_up[...].astype(x.dtype).reshape(config.num_experts, x.shape[-1], -1)
    gate, up = jnp.split(lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
    mixed = lax.ragged_dot(jax.nn.silu(gate) * up, self.down[...].astype(x.dtype), sizes)
    mixed = mixed * weights.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(flat).at[order // chosen].add(mixed).reshape(x.shape)

"""The configuration of the one decoder that serves every supported family.

Axes: L layers, D hidden size, H query heads, Dh head size.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the pretraining context.

  `kind` is `linear`, `llama3` or `yarn`; fields that a kind does not use are ignored.
  """

  kind: str
  factor: float = 1.0
  original_max_position: int = 8192
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float | None = None  # yarn; None means 0.1 ln(factor) + 1


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape and options of a decoder. Frozen and hashable, so it can be a static argument."""

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  intermediate_size: int
  max_position: int = 2048
  # norms
  norm_eps: float = 1e-5
  norm_plus_one: bool = False  # Gemma stores scale - 1
  qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm over Dh of queries and keys
  post_norms: bool = False  # Gemma: RMSNorm of each branch's output too
  # attention
  qkv_bias: bool = False
  out_bias: bool = False
  attention_scale: float | None = None  # None means Dh ** -0.5
  attention_soft_cap: float | None = None
  window: int | None = None  # a windowed layer attends to positions > own - window
  windowed_layers: tuple[bool, ...] | None = None  # None: every layer is windowed, if `window`
  bidirectional: bool = False  # what `full_mask` gives: all ones instead of causal
  # rotary embedding
  rope_theta: float = 10000.0
  rope_local_theta: float | None = None  # Gemma 3: theta of the windowed layers, unscaled
  rope_scaling: RopeScaling | None = None
  # MLP
  activation: str = 'silu'  # 'silu' (SwiGLU) or 'gelu_tanh' (GeGLU)
  mlp_bias: bool = False
  num_experts: int = 0  # 0: dense
  num_experts_per_token: int = 0
  normalize_expert_weights: bool = True
  # embedding and head
  tie_embeddings: bool = False
  embedding_scale: float = 1.0  # Gemma: sqrt(D)
  logit_soft_cap: float | None = None

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads must be a multiple of num_kv_heads: {self.num_heads=}, {self.num_kv_heads=}'
      )
    if self.activation not in ('silu', 'gelu_tanh'):
      raise ValueError(f"activation must be 'silu' or 'gelu_tanh': {self.activation=}")
    if self.head_dim % 2:
      raise ValueError(f'rotary embedding needs an even head_dim: {self.head_dim=}')
    if self.windowed_layers is not None and len(self.windowed_layers) != self.num_layers:
      raise ValueError(
        f'windowed_layers needs one entry per layer: {len(self.windowed_layers)=}, '
        f'{self.num_layers=}'
      )
    if self.num_experts and not 0 < self.num_experts_per_token <= self.num_experts:
      raise ValueError(
        f'need 0 < num_experts_per_token <= num_experts: '
        f'{self.num_experts_per_token=}, {self.num_experts=}'
      )

  @property
  def group_size(self) -> int:
    """Query heads per key/value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def layer_is_windowed(self) -> tuple[bool, ...]:
    """One bool per layer: does it attend through the sliding window?"""
    if self.window is None:
      return (False,) * self.num_layers
    return self.windowed_layers or (True,) * self.num_layers


def layer_windows(config: TransformerConfig) -> np.ndarray | None:
  """Returns i32[L], the attention window of each layer in tokens, or None if no layer has one."""
  if not any(config.layer_is_windowed):
    return None
  unlimited = np.iinfo(np.int32).max
  window = config.window or unlimited
  return np.where(config.layer_is_windowed, window, unlimited).astype(np.int32)


def rope_frequencies(config: TransformerConfig) -> tuple[np.ndarray, float]:
  """Returns (f32[L, Dh/2] radians per position for each layer, the factor on cos and sin).

  Source: RoFormer, arXiv:2104.09864; Llama 3 scaling from its release; YaRN, arXiv:2309.00071,
  section 3.2 and equation 22 (attention factor).
  """
  exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
  base = config.rope_theta**-exponent
  scaled, attention_factor = _scale_frequencies(base, config)
  local_theta = config.rope_local_theta
  local = scaled if local_theta is None else local_theta**-exponent
  table = np.where(np.asarray(config.layer_is_windowed)[:, None], local, scaled)
  return table.astype(np.float32), attention_factor


def _scale_frequencies(base, config):
  scaling = config.rope_scaling
  if scaling is None:
    return base, 1.0
  if scaling.kind == 'linear':
    return base / scaling.factor, 1.0
  if scaling.kind == 'llama3':
    turns = scaling.original_max_position * base / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * base + (1 - keep) * base / scaling.factor, 1.0
  if scaling.kind == 'yarn':
    keep = 1 - _yarn_ramp(config)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
      attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return keep * base + (1 - keep) * base / scaling.factor, attention_factor
  raise ValueError(f"rope scaling must be 'linear', 'llama3' or 'yarn': {scaling.kind=}")


def _yarn_ramp(config):
  """Returns f64[Dh/2], 0 where a frequency is kept and 1 where it is fully interpolated."""
  scaling, dim = config.rope_scaling, config.head_dim

  def dim_of(turns):
    ratio = scaling.original_max_position / (turns * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(config.rope_theta))

  low = max(math.floor(dim_of(scaling.beta_fast)), 0)
  high = min(math.ceil(dim_of(scaling.beta_slow)), dim - 1)
  return np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)

"""Acceptance heads: how likely the target accepts a draft, told from the drafter's hidden state.

Axes: `B` batch, `D` width of the drafter, `n` blocks.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from decodax import controllers
from decodax.controllers import Controller
from decodax.controllers import DraftStep


@dataclasses.dataclass(frozen=True)
class AcceptanceConfig:
  """Shape and options of an acceptance head."""

  hidden_size: int  # of the drafter
  num_blocks: int = 3
  tie_blocks: bool = False  # one block, applied num_blocks times: what published weights hold


class AcceptanceHead(nnx.Module):
  """Residual blocks x + silu(A x + b) and two logits: rejected, accepted.

  Args:
    config: shape and options.
    rngs: where initial parameters come from.

  Source: SpecDec++, arXiv:2405.19715, section 3.2 and its code.
  """

  def __init__(self, config: AcceptanceConfig, *, rngs: nnx.Rngs):
    size, blocks = config.hidden_size, 1 if config.tie_blocks else config.num_blocks
    self.config = config
    self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (blocks, size, size)))
    self.bias = nnx.Param(jnp.zeros((blocks, size)))
    self.out = nnx.Param(0.02 * jax.random.normal(rngs.params(), (size, 2)))
    self.out_bias = nnx.Param(jnp.zeros((2,)))

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Returns logits f32[..., 2], rejected and accepted, for hidden f[..., D]."""
    x, row = hidden.astype(jnp.float32), (1,) * (hidden.ndim - 1)
    for block in range(self.config.num_blocks):
      block = 0 if self.config.tie_blocks else block
      y = x @ self.kernel[...][block] + self.bias[...][block].reshape(*row, -1)
      x = x + jax.nn.silu(y)
    return x @ self.out[...] + self.out_bias[...].reshape(*row, 2)

  def probability(self, hidden: jax.Array) -> jax.Array:
    """Returns f32[...], the predicted probability of acceptance."""
    return jax.nn.softmax(self(hidden))[..., 1]


def specdec_controller(
  head: AcceptanceHead, *, threshold: float = 0.3, min_drafts: int = 2
) -> Controller:
  """Returns the stop rule of a trained head; its parameters are `Params.controller`.

  Exactness: as `decodax.controllers.specdec_pp`; it leaves a lossless method lossless.

  Args:
    head: only its structure is kept.
    threshold: on the predicted probability of at least one rejection.
    min_drafts: drafts made in any case.

  Source: SpecDec++, arXiv:2405.19715, section 3.
  """
  graph = nnx.graphdef(head)

  def score(params, step: DraftStep):
    return nnx.merge(graph, params).probability(step.hidden)

  return controllers.specdec_pp(score, threshold=threshold, min_drafts=min_drafts)

"""Medusa heads: several tokens ahead, each guessed from the target's last hidden state alone.

Axes: `B` batch, `T` tokens, `K` heads, `D` width, `V` vocabulary, `Vd` draft vocabulary, `W` nodes.
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from decodax.drafters.expander import Expander
from decodax.drafters.expander import Grown
from models.heads import rows as rows_lib
from models.heads.vocabulary import DraftVocabulary
from models.transformer import Transformer
from models.transformer import unembedding


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
  """Shape and options of Medusa heads."""

  hidden_size: int
  vocab_size: int
  num_heads: int = 4
  num_layers: int = 1
  tie_blocks: bool = False  # one block, applied num_layers times: what published weights hold
  share_head: bool = False  # the target's head for all, instead of one each
  draft_vocab_size: int | None = None


class Medusa(nnx.Module):
  """K heads, each a few residual blocks and a projection to the vocabulary.

  Block: x + silu(A x + b). All start at zero with the target's own head as the projection, so that
  an untrained head repeats the target's law.

  Args:
    config: shape and options.
    target: whose head the projections start from.
    rngs: not used; here so that all heads are made alike.
    vocabulary: draft vocabulary, or None.

  Source: Medusa, arXiv:2401.10774, section 2.1.1 and its code.
  """

  def __init__(
    self,
    config: MedusaConfig,
    target: Transformer,
    *,
    rngs: nnx.Rngs | None = None,
    vocabulary: DraftVocabulary | None = None,
  ):
    del rngs
    heads, size = config.num_heads, config.hidden_size
    blocks = 1 if config.tie_blocks else config.num_layers
    dtype = target.embedding[...].dtype
    self.config = config
    self.kernel = nnx.Param(jnp.zeros((heads, blocks, size, size), dtype))
    self.bias = nnx.Param(jnp.zeros((heads, blocks, size), dtype))
    self.vocabulary = vocabulary
    start = unembedding(target)
    start = start if vocabulary is None else vocabulary.restrict(start)
    many = jnp.broadcast_to(start[None], (heads, *start.shape)).astype(dtype)
    self.heads = None if config.share_head else nnx.Param(many)

  def vectors(self, hidden: jax.Array) -> jax.Array:
    """Returns f[B, T, K, D], what each head's projection multiplies, for hidden f[B, T, D]."""
    config = self.config
    x = jnp.broadcast_to(hidden[:, :, None], (*hidden.shape[:2], config.num_heads, hidden.shape[2]))
    for layer in range(config.num_layers):
      layer = 0 if config.tie_blocks else layer
      kernel = self.kernel[...][:, layer].astype(x.dtype)
      bias = self.bias[...][:, layer].astype(x.dtype)
      x = x + jax.nn.silu(jnp.einsum('btkd,kde->btke', x, kernel) + bias[None, None])
    return x

  def project(self, target: Transformer, vectors: jax.Array, head: int) -> jax.Array:
    """Returns the logits f32[..., Vd] of one head for its vectors f[..., D]."""
    if self.heads is None:
      return target.unembed(vectors, None if self.vocabulary is None else self.vocabulary.ids[...])
    kernel = self.heads[...][head].astype(vectors.dtype)
    return jnp.einsum('...d,dv->...v', vectors, kernel, preferred_element_type=jnp.float32)

  def logits(self, target: Transformer, vectors: jax.Array) -> jax.Array:
    """Returns f32[B, K, V] of all heads for vectors f[B, K, D]."""
    each = [self.project(target, vectors[:, k], k) for k in range(self.config.num_heads)]
    logits = jnp.stack(each, axis=1)
    return logits if self.vocabulary is None else self.vocabulary.widen(logits)


class _Guesses(NamedTuple):
  """What the heads say after the root, made once a round."""

  vectors: jax.Array  # f[B, K, D]
  logits: jax.Array  # f32[B, K, V]


def medusa_expander(medusa: Medusa, target: Transformer) -> Expander:
  """Returns how Medusa heads draft: a node's law depends on its depth only.

  All heads run once a round. Parameters: `Params.drafter` is `nnx.state(medusa)`.

  Source: Medusa, arXiv:2401.10774.
  """
  graph, target_graph = nnx.graphdef(medusa), nnx.graphdef(target)
  config, dtype = medusa.config, target.dtype
  num_heads, vocab_size = config.num_heads, config.vocab_size

  def init(params, request, capacity, num_slots):
    del params, capacity, num_slots
    batch_size = request.tokens.shape[0]
    guesses = _Guesses(
      vectors=jnp.zeros((batch_size, num_heads, config.hidden_size), dtype),
      logits=jnp.zeros((batch_size, num_heads, vocab_size), jnp.float32),
    )
    return jnp.zeros((batch_size, 1, config.hidden_size), dtype), guesses

  def prefill(params, own, tokens, positions, count, output):
    del params, tokens, positions
    return rows_lib.newest(output.hidden, count, own)

  def begin(params, state, own, block, *, num_slots, wanted):
    del state, num_slots

    def guess():
      heads = nnx.merge(graph, params.drafter)
      vectors = heads.vectors(own)[:, 0]
      return _Guesses(vectors, heads.logits(nnx.merge(target_graph, params.target), vectors))

    block = guess() if wanted is None else lax.cond(wanted.any(), guess, lambda: block)
    return Grown(block.vectors[:, :1], block.logits[:, :1]), own, block

  def expand(params, state, own, block, nodes, offset):
    del params, own, offset
    head = jnp.clip(nodes.positions - state.length[:, None] + 1, 0, num_heads - 1)[:, :, None]
    grown = Grown(*(jnp.take_along_axis(a, head, axis=1) for a in block))
    return grown, block

  def observe(params, own, observation, state):
    del params
    read = rows_lib.accepted(observation, state)
    return rows_lib.newest(read.output.hidden, read.count, own)

  return Expander(
    init=init, prefill=prefill, begin=begin, expand=expand, observe=observe,
    commit=lambda own, block, slots, count: own,
    vocab_size=vocab_size, max_depth=num_heads, draft_vocab_size=config.draft_vocab_size,
  )  # fmt: skip

"""Kangaroo: the target's first layers and a small adapter draft for all of it.

Axes: `B` batch, `T` tokens, `W` nodes, `M` slots, `D` width, `V` vocabulary.
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from decodax.decode import root_tokens
from decodax.drafters.expander import Expander
from decodax.drafters.expander import Grown
from decodax.kv_cache import KVBlock
from decodax.kv_cache import init_kv_block
from decodax.kv_cache import write_kv_block
from decodax.types import PyTree
from models.adapter import as_model
from models.config import TransformerConfig
from models.heads import rows as rows_lib
from models.transformer import Attention
from models.transformer import AttentionSite
from models.transformer import RMSNorm
from models.transformer import Transformer
from models.transformer import attention_site


@dataclasses.dataclass(frozen=True)
class KangarooConfig:
  """Shape and options of a Kangaroo adapter."""

  layer: TransformerConfig  # of its attention; the width is the target's
  exit_layer: int  # how many of the target's layers run before the adapter


class Kangaroo(nnx.Module):
  """norm(h + attention(norm(h))) for the stream h after the first layers; the target's head reads.

  Args:
    config: shape and options.
    target: whose final norm its own starts from.
    rngs: where initial parameters come from.

  Source: Kangaroo, arXiv:2404.18911, section 3.2 and its code.
  """

  def __init__(self, config: KangarooConfig, target: Transformer, *, rngs: nnx.Rngs):
    layer, dtype = config.layer, target.embedding[...].dtype
    self.config = config
    self.norm = RMSNorm(layer.hidden_size, layer, param_dtype=dtype)
    self.attention = Attention(layer, rngs=rngs, param_dtype=dtype)
    self.final_norm = RMSNorm(layer.hidden_size, layer, param_dtype=dtype)
    self.final_norm.scale = nnx.Param(jnp.array(target.final_norm.scale[...]))

  def __call__(self, hidden: jax.Array, site: AttentionSite) -> tuple[jax.Array, tuple]:
    """Returns (what the target's head multiplies f[B, T, D], the layer's keys and values)."""
    y, own = self.attention(self.norm(hidden), site)
    return self.final_norm(hidden + y), own


class _Scratch(NamedTuple):
  """The nodes of a round, the root in slot 0."""

  shallow: PyTree  # of the target's first layers
  block: KVBlock  # of the adapter


def kangaroo_expander(kangaroo: Kangaroo, target: Transformer) -> Expander:
  """Returns how a Kangaroo adapter drafts; parameters: `Params.drafter` is `nnx.state(kangaroo)`.

  The first layers read the target's own cache. The adapter has a cache of its own, filled from the
  stream that the target shows: `as_model(target, taps=(exit_layer,))`. The second exit of the paper
  is a controller, `decodax.controllers.confidence(0.6)`.

  Source: Kangaroo, arXiv:2404.18911.
  """
  graph, target_graph = nnx.graphdef(kangaroo), nnx.graphdef(target)
  config, dtype = kangaroo.config.layer, target.dtype
  exit_layer = kangaroo.config.exit_layer
  shallow = as_model(target, exit_layer=exit_layer, taps=(exit_layer,))
  assert shallow.init_scratch is not None
  init_shallow = shallow.init_scratch
  tap = f'layer_{exit_layer}'

  def init(params, request, capacity, num_slots):
    batch_size, num_slots = request.tokens.shape[0], 1 + num_slots
    block = init_kv_block(1, batch_size, config.num_kv_heads, num_slots, config.head_dim, dtype)
    scratch = _Scratch(init_shallow(params.target, batch_size, num_slots), block)
    return rows_lib.init_rows(config, batch_size, capacity, dtype), scratch

  def read(params, own, read: rows_lib.Read):
    adapter = nnx.merge(graph, params.drafter)

    def layer(site):
      return adapter(read.output.features[tap], site)

    return rows_lib.read_rows(config, own, layer, read.positions, read.count)

  def prefill(params, own, tokens, positions, count, output):
    return read(params, own, rows_lib.Read(output, tokens, positions, count))

  def extend(params, state, own, block, tokens, positions, mask, slot):
    """Returns (f[B, W, D], block) of nodes read into the slots from `slot` on."""
    mask = jnp.pad(mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)  # all see the root
    output, first = shallow.extend(
      params.target, state.cache, tokens, positions, mask, scratch=block.shallow, offset=slot
    )
    site = attention_site(
      config, positions, mask, cache=own.cache, scratch=block.block, offset=slot
    )
    y, (keys, values) = nnx.merge(graph, params.drafter)(output.features[tap], site)
    new = KVBlock(keys[None], values[None], positions)
    return y, _Scratch(first, write_kv_block(block.block, new, slot))

  def unembed(params, y):
    return nnx.merge(target_graph, params.target).unembed(y)

  def begin(params, state, own, block, *, num_slots, wanted):
    def root():
      mask = jnp.zeros((state.length.shape[0], 1, num_slots), bool)
      tokens, positions = root_tokens(state)[:, None], state.length[:, None] - 1
      y, filled = extend(params, state, own, block, tokens, positions, mask, 0)
      return Grown(y, unembed(params, y)), filled

    if wanted is None:
      grown, block = root()
      return grown, own, block
    like = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(root)[0])
    grown, block = lax.cond(wanted.any(), root, lambda: (like, block))
    return grown, own, block

  def expand(params, state, own, block, nodes, offset):
    y, block = extend(
      params, state, own, block, nodes.tokens, nodes.positions, nodes.mask, offset + 1
    )
    return Grown(y, unembed(params, y)), block

  def observe(params, own, observation, state):
    return read(params, own, rows_lib.accepted(observation, state))

  return Expander(
    init=init, prefill=prefill, begin=begin, expand=expand, observe=observe,
    commit=lambda own, block, slots, count: own, vocab_size=target.config.vocab_size,
  )  # fmt: skip

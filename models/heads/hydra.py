"""Hydra heads: like Medusa's, but each one also reads the tokens drafted before it.

Axes: `B` batch, `T` tokens, `K` heads, `D` width, `V` vocabulary, `Vd` draft vocabulary, `W` nodes,
`M` slots.
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from decodax.drafters.expander import Expander
from decodax.drafters.expander import Grown
from decodax.types import PyTree
from models.config import TransformerConfig
from models.heads import rows as rows_lib
from models.heads.vocabulary import DraftVocabulary
from models.transformer import AttentionSite
from models.transformer import Layer
from models.transformer import RMSNorm
from models.transformer import Transformer
from models.transformer import unembedding

Dropout = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class HydraConfig:
  """Shape and options of Hydra heads. `prefix` makes them Hydra++."""

  hidden_size: int
  vocab_size: int
  num_heads: int = 4
  num_layers: int = 1
  tie_blocks: bool = False  # one block after the first, repeated: what published weights hold
  share_head: bool = False  # the target's head for all, instead of one each
  draft_vocab_size: int | None = None
  prefix: TransformerConfig | None = None  # a layer over all that the target read


class HydraHead(nnx.Module):
  """The head that guesses k + 1 tokens after what the target has read, from k known ones.

  r = C u + c + silu(A u + b) for u = [feature; embeddings of the k tokens]; then residual blocks
  r + silu(A' r + b'). C starts as the identity on the feature, all else at or near zero, and the
  projection is the target's head, so that training starts from the target's own law.
  """

  def __init__(self, config: HydraConfig, target: Transformer, depth: int, vocabulary, *, rngs):
    size = config.hidden_size
    blocks = min(config.num_layers - 1, 1) if config.tie_blocks else config.num_layers - 1
    dtype = target.embedding[...].dtype
    width = (depth + 1) * size
    start = 0.02 * jax.random.normal(rngs.params(), (width, size), dtype)
    self.num_layers = config.num_layers
    self.skip = nnx.Param(start.at[:size].set(jnp.eye(size, dtype=dtype)))
    self.skip_bias = nnx.Param(jnp.zeros((size,), dtype))
    self.kernel = nnx.Param(jnp.zeros((width, size), dtype))
    self.bias = nnx.Param(jnp.zeros((size,), dtype))
    # Absent rather than empty: an array without elements cannot be saved.
    self.blocks = nnx.Param(jnp.zeros((blocks, size, size), dtype)) if blocks else None
    self.block_biases = nnx.Param(jnp.zeros((blocks, size), dtype)) if blocks else None
    head = unembedding(target)
    head = head if vocabulary is None else vocabulary.restrict(head)
    self.head = None if config.share_head else nnx.Param(jnp.array(head, dtype))
    self.head_bias = None if config.share_head else nnx.Param(jnp.zeros(head.shape[1:], dtype))

  def vector(self, u: jax.Array, dropout: Dropout) -> jax.Array:
    """Returns f[..., D], what the projection multiplies, for u f[..., (k + 1) D]."""
    u = dropout(u)
    x = _affine(u, self.skip, self.skip_bias) + jax.nn.silu(_affine(u, self.kernel, self.bias))
    if self.blocks is not None and self.block_biases is not None:
      for layer in range(self.num_layers - 1):
        layer = min(layer, self.blocks.shape[0] - 1)
        y = dropout(x)
        x = y + jax.nn.silu(_affine(y, self.blocks[...][layer], self.block_biases[...][layer]))
    return dropout(x)

  def project(self, target: Transformer, vector: jax.Array, vocabulary) -> jax.Array:
    """Returns logits f32[..., Vd] of its own projection, or of the target's."""
    if self.head is None or self.head_bias is None:
      return target.unembed(vector, None if vocabulary is None else vocabulary.ids[...])
    kernel, bias = self.head[...].astype(vector.dtype), self.head_bias[...]
    logits = jnp.einsum('...d,dv->...v', vector, kernel, preferred_element_type=jnp.float32)
    return logits + bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + bias.shape)


class PrefixLayer(nnx.Module):
  """A decoder layer over the target's hidden states, and a norm: the ++ of Hydra++."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype):
    self.layer = Layer(config, rngs=rngs, param_dtype=param_dtype)
    self.norm = RMSNorm(config.hidden_size, config, param_dtype=param_dtype)

  def __call__(self, hidden: jax.Array, site: AttentionSite) -> tuple[jax.Array, tuple]:
    """Returns (f[B, T, D], the layer's keys and values) for hidden f[B, T, D]."""
    y, own = self.layer(hidden, site)
    return self.norm(y), own


class Hydra(nnx.Module):
  """K heads that read what was drafted before them.

  Args:
    config: shape and options.
    target: whose head the projections start from.
    rngs: where initial parameters come from.
    vocabulary: draft vocabulary, or None.

  Source: Hydra, arXiv:2402.05109, section 3 (heads) and 4 (Hydra++), and its code.
  """

  def __init__(
    self,
    config: HydraConfig,
    target: Transformer,
    *,
    rngs: nnx.Rngs,
    vocabulary: DraftVocabulary | None = None,
  ):
    self.config = config
    self.vocabulary = vocabulary
    self.heads = nnx.List(
      [
        HydraHead(config, target, depth, vocabulary, rngs=rngs)
        for depth in range(1, config.num_heads + 1)
      ]
    )
    dtype = target.embedding[...].dtype
    prefix = config.prefix
    self.prefix = None if prefix is None else PrefixLayer(prefix, rngs=rngs, param_dtype=dtype)

  def vector(
    self, feature: jax.Array, embedded: jax.Array, depth: int, dropout: Dropout = lambda x: x
  ) -> jax.Array:
    """Returns f[..., D], what the projection of the head at `depth` multiplies.

    Args:
      feature: f[..., D], the target's hidden state, or the prefix layer's output.
      embedded: f[..., k, D] with k = depth, the embeddings of the tokens after it.
      depth: 1 for the head that guesses the child of the root.
      dropout: applied before every linear map.
    """
    flat = embedded.reshape(*feature.shape[:-1], -1)
    return self.heads[depth - 1].vector(jnp.concatenate([feature, flat], axis=-1), dropout)

  def project(self, target: Transformer, vector: jax.Array, depth: int) -> jax.Array:
    """Returns logits f32[..., Vd] of the head at `depth`."""
    return self.heads[depth - 1].project(target, vector, self.vocabulary)


def with_own_projections(hydra: Hydra, target: Transformer) -> Hydra:
  """Returns the heads with the target's projection to the draft vocabulary as their own.

  For decoding: heads that share the target's would gather its columns every round. They draft as
  before; what has own projections, or drafts all tokens, is returned as it is.
  """
  config = hydra.config
  if not config.share_head or hydra.vocabulary is None:
    return hydra
  kernel = hydra.vocabulary.restrict(unembedding(target))
  own = nnx.merge(*nnx.split(hydra))
  own.config = dataclasses.replace(config, share_head=False)
  for head in own.heads:
    head.head = nnx.data(nnx.Param(kernel))
    head.head_bias = nnx.data(nnx.Param(jnp.zeros(kernel.shape[1:], kernel.dtype)))
  return own


def hydra_expander(hydra: Hydra, target: Transformer) -> Expander:
  """Returns how Hydra heads draft; parameters: `Params.drafter` is `nnx.state(hydra)`.

  Source: Hydra, arXiv:2402.05109.
  """
  graph, target_graph = nnx.graphdef(hydra), nnx.graphdef(target)
  config, dtype = hydra.config, target.dtype
  num_heads = config.num_heads

  def init(params, request, capacity, num_slots):
    del params
    batch_size = request.tokens.shape[0]
    own = _init_features(config, batch_size, capacity, dtype)
    return own, jnp.zeros((batch_size, num_slots, num_heads), jnp.int32)

  def read(params, own, read: rows_lib.Read):
    if config.prefix is None:
      return rows_lib.newest(read.output.hidden, read.count, own)
    prefix = nnx.merge(graph, params.drafter).prefix

    def layer(site):
      return prefix(read.output.hidden, site)

    return rows_lib.read_rows(config.prefix, own, layer, read.positions, read.count)

  def prefill(params, own, tokens, positions, count, output):
    return read(params, own, rows_lib.Read(output, tokens, positions, count))

  def guess(params, own, paths, depth):
    """Returns the `Grown` of nodes whose last `depth` tokens are paths i32[B, W, K]."""
    heads, frozen = nnx.merge(graph, params.drafter), nnx.merge(target_graph, params.target)
    feature = own if config.prefix is None else own.last

    def at(depth):
      tokens = paths[:, :, :depth]
      embedded = frozen.embed(tokens.reshape(tokens.shape[0], -1)).reshape(*tokens.shape, -1)
      wide = jnp.broadcast_to(feature, (*tokens.shape[:2], feature.shape[-1]))
      vector = heads.vector(wide, embedded, depth)
      logits = heads.project(frozen, vector, depth)
      return Grown(vector, logits if heads.vocabulary is None else heads.vocabulary.widen(logits))

    if isinstance(depth, int):
      return at(depth)
    branches = [lambda d=d: at(d) for d in range(1, num_heads + 1)]
    return lax.switch(jnp.clip(depth - 1, 0, num_heads - 1), branches)

  def begin(params, state, own, block, *, num_slots, wanted):
    del num_slots
    paths = _root_paths(state, num_heads)[:, None]

    def root():
      return guess(params, own, paths, 1)

    if wanted is None:
      return root(), own, block
    like = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(root))
    return lax.cond(wanted.any(), root, lambda: like), own, block

  def expand(params, state, own, block, nodes, offset):
    depth = nodes.positions[0, 0] - state.length[0] + 2  # tokens known below the feature
    before = jnp.concatenate([_root_paths(state, num_heads)[:, None], block], axis=1)
    paths = jnp.take_along_axis(before, nodes.parents[:, :, None] + 1, axis=1)
    here = (jnp.arange(num_heads) == depth - 1)[None, None]
    paths = jnp.where(here, nodes.tokens[:, :, None], paths)
    block = lax.dynamic_update_slice_in_dim(block, paths, offset, 1)
    return guess(params, own, paths, depth), block

  def observe(params, own, observation, state):
    return read(params, own, rows_lib.accepted(observation, state))

  return Expander(
    init=init, prefill=prefill, begin=begin, expand=expand, observe=observe,
    commit=lambda own, block, slots, count: own,
    vocab_size=config.vocab_size, max_depth=num_heads, draft_vocab_size=config.draft_vocab_size,
  )  # fmt: skip


def _init_features(config, batch_size, capacity, dtype) -> PyTree:
  if config.prefix is None:
    return jnp.zeros((batch_size, 1, config.hidden_size), dtype)
  return rows_lib.init_rows(config.prefix, batch_size, capacity, dtype)


def _root_paths(state, num_heads):
  """Returns i32[B, K], the root's token and then zeros."""
  root = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
  return jnp.pad(root, ((0, 0), (0, num_heads - 1)))


def _affine(x, kernel, bias):
  kernel, bias = kernel[...].astype(x.dtype), bias[...].astype(x.dtype)
  return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + bias.shape)

"""A `Transformer` as a decodax `Model`."""

from collections.abc import Sequence

from flax import nnx

from decodax.kv_cache import commit_kv
from decodax.kv_cache import init_kv_block
from decodax.kv_cache import init_kv_cache
from decodax.types import Model
from models.transformer import Transformer


def as_model(
  transformer: Transformer, *, exit_layer: int | None = None, taps: Sequence[int] = ()
) -> Model:
  """Returns the pure functions of a transformer; their parameters are `nnx.state(transformer)`.

  Args:
    transformer: the module; only its structure is kept.
    exit_layer: run only this many layers, for self-speculation. Parameters and cache are those of
      the whole model.
    taps: residual streams to return as features, see `Transformer.__call__`.

  Raises:
    ValueError: if a layer is out of range.
  """
  config, dtype = transformer.config, transformer.dtype
  graph, _ = nnx.split(transformer)
  if exit_layer is not None and not 0 < exit_layer <= config.num_layers:
    raise ValueError(f'exit_layer must be in 1..{config.num_layers}: {exit_layer=}')
  depth = config.num_layers if exit_layer is None else exit_layer
  if not all(0 <= tap <= depth for tap in taps):
    raise ValueError(f'taps must be in 0..{depth}: {taps=}')

  def init_cache(params, batch_size, capacity):
    del params
    return init_kv_cache(
      config.num_layers, batch_size, config.num_kv_heads, capacity, config.head_dim, dtype
    )

  def init_scratch(params, batch_size, num_nodes):
    del params
    return init_kv_block(depth, batch_size, config.num_kv_heads, num_nodes, config.head_dim, dtype)

  def extend(params, cache, tokens, positions, mask, *, scratch=None, offset=0, embeddings=None):
    return nnx.merge(graph, params)(
      tokens, positions, mask, cache=cache, scratch=scratch, offset=offset,
      num_layers=exit_layer, taps=taps, embeddings=embeddings,
    )  # fmt: skip

  def unembed(params, hidden):
    return nnx.merge(graph, params).unembed(hidden)

  return Model(
    init_cache=init_cache,
    extend=extend,
    commit=commit_kv,
    unembed=unembed,
    vocab_size=config.vocab_size,
    init_scratch=init_scratch,
  )

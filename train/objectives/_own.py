"""What the objectives share that train the target itself: it starts as a copy and decodes alone."""

from flax import nnx
import jax
import jax.numpy as jnp

from decodax.types import Params
from models.transformer import Transformer


def copy_of(target: Transformer) -> Transformer:
  """Returns a copy of the target, to be trained while the target stays as it is."""
  graph, state = nnx.split(target)
  return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def place(target: nnx.State, head: nnx.State) -> Params:
  """Returns decoding parameters in which the trained copy is the target."""
  del target
  return Params(head)

"""A network that knows every law of the list tasks exactly: what no training can improve on.

Its parameters are, for each row, all right canvases ("worlds"), equally likely. What is written
selects among them, and a slot's law is that of the worlds that are left. Where what is written fits
no world, those that fit best are taken: as a trained network would, it goes on.

Axes: `B` rows, `N` worlds, `W` slots of the canvas, `T` nodes, `V` vocabulary.
"""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decodax.diffusion import MaskedModel
from decodax.types import Model
from decodax.types import ModelOutput
from train import list_tasks
from train.list_tasks import Example

MASK_ID = len(list_tasks.VOCABULARY)
_DOUBT = 14.0  # nats by which a world that contradicts one slot is less likely
_NOISE = 1e-4  # of the law: uniform, so that nothing is impossible


class Worlds(NamedTuple):
  """All right canvases of each row."""

  canvases: jax.Array  # i32[B, N, W]
  log_weights: jax.Array  # f32[B, N] 0, and -inf where a row has fewer
  start: jax.Array  # i32[B] where the canvas starts


def worlds_of(example: Example) -> list[tuple[str, ...]]:
  """Returns every right answer."""
  if example.task == 'shuffle':
    return [p for p in itertools.permutations(example.line) if p != example.line]
  if example.task in list_tasks.INDEPENDENT:
    return [example.answer]
  return list_tasks.possible_answers(example)


def make_worlds(examples: Sequence[Example]) -> Worlds:
  """Returns the parameters of the network for some examples, in their order."""
  tables = [
    [list_tasks.canvas_of(example._replace(answer=answer)) for answer in worlds_of(example)]
    for example in examples
  ]
  most = max(map(len, tables))
  canvases = np.zeros((len(tables), most, list_tasks.CANVAS), np.int32)
  weights = np.full((len(tables), most), -np.inf, np.float32)
  for row, table in enumerate(tables):
    canvases[row, : len(table)] = table
    weights[row, : len(table)] = 0
  starts = [len(example.prompt) for example in examples]
  return Worlds(jnp.asarray(canvases), jnp.asarray(weights), jnp.asarray(starts, jnp.int32))


def exact_network() -> MaskedModel:
  """Returns the network. It has no cache; rows must come in the order of its parameters."""

  def init_cache(params, batch_size, capacity):
    del params, capacity
    return jnp.zeros((batch_size,), jnp.int32)

  def extend(params: Worlds, cache, tokens, positions, mask, *, scratch=None, offset=0):
    del cache, scratch, offset
    copies = tokens.shape[0] // params.start.shape[0]
    canvases, weights, start = jax.tree.map(lambda a: jnp.repeat(a, copies, axis=0), params)
    slot = positions - start[:, None]
    inside = (slot >= 0) & (slot < list_tasks.CANVAS)
    index = jnp.clip(slot, 0, list_tasks.CANVAS - 1)
    there = jnp.take_along_axis(canvases, index[:, None, :], axis=2)  # i32[B, N, T]
    wrong = (there != tokens[:, None]) & (inside & (tokens != MASK_ID))[:, None]
    contradicted = jnp.einsum('btk,bnk->btn', mask.astype(jnp.float32), wrong.astype(jnp.float32))
    posterior = jax.nn.softmax(weights[:, None] - _DOUBT * contradicted, axis=-1)
    one_hot = jax.nn.one_hot(there, MASK_ID + 1, dtype=jnp.float32)  # f32[B, N, T, V]
    return ModelOutput(jnp.einsum('btn,bntv->btv', posterior, one_hot)), tokens

  def unembed(params, hidden):
    del params
    return jnp.log((1 - _NOISE) * hidden + _NOISE / (MASK_ID + 1))

  model = Model(init_cache, extend, lambda cache, *_: cache, unembed, MASK_ID + 1)
  return MaskedModel(model, MASK_ID)

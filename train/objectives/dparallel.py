"""dParallel: a masked diffusion network learns to be sure of many slots at the same time.

On answers that the network itself has written, each is shown with the blocks before one clean, that
one partly masked and everything behind masked. The masked slots of that block are learnt, and where
the prediction is already right, its entropy is pressed down, so that more slots pass a threshold at
once. A second copy masks the other slots of the block. The result is a new network: what it writes
is no longer what the old one would.

Source: dParallel, arXiv:2509.26488, section 4.
"""

import jax
import jax.numpy as jnp

from models.transformer import Transformer
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives._own import copy_of
from train.objectives.masked_diffusion import document_mask
from train.objectives.masked_diffusion import predict
from train.tape import Tape


def make_objective(
  *,
  mask_id: int,
  block_size: int = 32,
  lowest_rate: float = 0.5,
  highest_rate: float = 0.5,
  entropy_weight: float = 2.0,
  temperature: float = 0.5,
) -> Objective:
  """Returns certainty-forcing distillation of a masked diffusion target, all of it trained.

  Args:
    mask_id: the target's mask token.
    block_size: S, slots of the blocks that it will be decoded in, counted from the answer's start.
    lowest_rate: the active block is masked at a rate between this
      and `highest_rate`; the original takes 0.5.
    highest_rate: see above.
    entropy_weight: of the entropy of right predictions.
    temperature: of that entropy; below 1 it presses harder.

  Raises:
    ValueError: if block_size < 1, or not 0 < lowest_rate <= highest_rate <= 1.
  """
  if block_size < 1 or not 0 < lowest_rate <= highest_rate <= 1:
    raise ValueError(
      f'need block_size >= 1 and 0 < lowest_rate <= highest_rate <= 1: {block_size=}, '
      f'{lowest_rate=}, {highest_rate=}'
    )

  def init(rngs, target, token_counts):
    del rngs, token_counts
    assert target is not None
    return copy_of(target)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del target, step
    active, later, draw = draw_blocks(tape, rng_key, block_size, lowest_rate, highest_rate)
    parts = []
    for ours in (active & draw, active & ~draw):
      parts.append(certainty_loss(head, tape, ours, ours | later, mask_id, entropy_weight,
                                  temperature))  # fmt: skip
    return jax.tree.map(jnp.add, *parts)

  return Objective(init=init, loss=loss)


def draw_blocks(tape: Tape, key: jax.Array, block_size: int, lowest: float, highest: float):
  """Returns (active bool[B, T], later bool[B, T], draw bool[B, T]).

  `active` is one random block of each answer, `later` what is behind it, `draw` which slots the
  first copy masks if they are active; the second one masks the others.
  """
  block_key, rate_key, mask_key = jax.random.split(key, 3)
  answer = tape.loss_mask & (tape.segments > 0)
  same = document_mask(tape.segments)
  before = jnp.tril(jnp.ones((answer.shape[1],) * 2, bool), -1)[None]
  place = jnp.sum(same & before & answer[:, None], axis=-1)  # in the answer
  length = jnp.sum(same & answer[:, None], axis=-1)
  block = place // block_size
  num_blocks = jnp.maximum(-(-length // block_size), 1)
  chosen = jnp.floor(_per_document(block_key, tape) * num_blocks).astype(jnp.int32)
  rate = lowest + (highest - lowest) * _per_document(rate_key, tape)
  draw = jax.random.uniform(mask_key, answer.shape) < rate
  return answer & (block == chosen), answer & (block > chosen), draw


def _per_document(key, tape):
  """Returns f32[B, T] in [0, 1), one number for each document."""
  table = jax.random.uniform(key, (tape.tokens.shape[0], tape.tokens.shape[1] + 1))
  return jnp.take_along_axis(table, tape.segments, axis=1)


def certainty_loss(
  head: Transformer,
  tape: Tape,
  scored: jax.Array,
  masked: jax.Array,
  mask_id: int,
  entropy_weight: float,
  temperature: float,
) -> Loss:
  """Returns cross entropy of the scored slots, and the mean entropy of the right ones among them.

  Args:
    head: the network.
    tape: documents.
    scored: bool[B, T], masked slots that are learnt.
    masked: bool[B, T], all masked slots.
    mask_id: the mask token.
    entropy_weight: of the entropy.
    temperature: of the law whose entropy it is.
  """
  hidden = predict(head, tape, masked, document_mask(tape.segments), mask_id)

  def one(hidden, labels):
    logits = head.unembed(hidden).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return losses.cross_entropy(logits, labels), entropy, right

  found, entropy, right = losses.by_chunk(one, hidden, tape.tokens)
  weights = scored.astype(jnp.float32)
  right = jax.lax.stop_gradient(right) * weights
  number = weights.sum()
  # A mean over the right ones, times the number of all: the weight must not depend on parameters.
  sure = jnp.sum(entropy * right) / jnp.maximum(right.sum(), 1) * number
  total = jnp.sum(found * weights) + entropy_weight * sure
  metrics = {
    'masked_accuracy': losses.masked(right, weights),
    'entropy_of_right': losses.masked(entropy, right),
  }
  return Loss(total, number, metrics)

"""D2F: a bidirectional diffusion network becomes one whose later blocks start before it is done.

On answers that the network itself has written, later blocks are masked at higher rates than earlier
ones. The student sees each block and the blocks before it, masks and all; the teacher, which is the
network as it was, sees the whole answer. The student learns the teacher's laws of the masked slots.
It is decoded with several blocks in flight (`decodax.diffusion.policies.pipelined`), and what it
writes is no longer what the old network would.

Source: Discrete Diffusion Forcing, arXiv:2508.09192, section 4.
"""

import jax
import jax.numpy as jnp

from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives._own import copy_of
from train.objectives.masked_diffusion import Noise
from train.objectives.masked_diffusion import document_mask
from train.objectives.masked_diffusion import predict
from train.tape import Tape


def make_objective(
  *,
  mask_id: int,
  block_size: int = 16,
  lowest_rate: float = 0.2,
  highest_first_rate: float = 0.7,
  highest_rate: float = 0.7,
) -> Objective:
  """Returns the distillation of a masked diffusion target into a block-causal one, all of it.

  Args:
    mask_id: the target's mask token.
    block_size: S, slots of a block, counted from position 0 as `MaskedModel.block_size` is.
    lowest_rate: the first block of an answer is masked at a rate uniform between this
      and `highest_first_rate`.
    highest_first_rate: see above.
    highest_rate: later blocks add random steps that would lead there on average, and not beyond.

  Raises:
    ValueError: if block_size < 1, or rates are not in that order in (0, 1].
  """
  if block_size < 1 or not 0 < lowest_rate <= highest_first_rate <= highest_rate <= 1:
    raise ValueError(
      'need block_size >= 1 and 0 < lowest_rate <= highest_first_rate <= highest_rate <= 1: '
      f'{block_size=}, {lowest_rate=}, {highest_first_rate=}, {highest_rate=}'
    )

  def init(rngs, target, token_counts):
    del rngs, token_counts
    assert target is not None
    return copy_of(target)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del step
    noise = draw_rising(
      tape, rng_key, block_size, lowest_rate, highest_first_rate, highest_rate
    )  # fmt: skip
    seen = block_causal_mask(tape, block_size)
    student = predict(head, tape, noise.masked, seen, mask_id)
    teacher = predict(target, tape, noise.masked, document_mask(tape.segments), mask_id)
    teacher = jax.lax.stop_gradient(teacher)

    def one(teacher, student):
      p, q = (f(h).astype(jnp.float32) for f, h in ((target.unembed, teacher),
                                                    (head.unembed, student)))  # fmt: skip
      agree = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
      return losses.soft_cross_entropy(p, q), agree.astype(jnp.float32)

    found, agree = losses.by_chunk(one, teacher, student)
    masked = noise.masked.astype(jnp.float32)
    total = jnp.where(noise.masked, found / noise.rate, 0).sum()
    return Loss(total, masked.sum(), {'agreement': losses.masked(agree, masked)})

  return Objective(init=init, loss=loss)


def block_causal_mask(tape: Tape, block_size: int) -> jax.Array:
  """Returns bool[B, T, T]: each block of a document sees itself and the blocks before it."""
  block = tape.positions // block_size
  return document_mask(tape.segments) & (block[:, None, :] <= block[:, :, None])


def draw_rising(
  tape: Tape, key: jax.Array, block_size: int, lowest: float, highest_first: float, highest: float
) -> Noise:
  """Returns which tokens are masked, at rates that do not fall from block to block of an answer.

  The first block has a rate uniform in [lowest, highest_first); each later one adds a random step,
  of the size that would lead to `highest` in the last block on average, and stays below it.
  """
  first_key, step_key, mask_key = jax.random.split(key, 3)
  answer = tape.loss_mask & (tape.segments > 0)
  same = document_mask(tape.segments) & answer[:, None]
  block = tape.positions // block_size
  opens = answer & ~jnp.any(
    same & _earlier(answer) & _equal(block), axis=-1
  )  # a block's first slot
  before = same & opens[:, None] & (block[:, None, :] <= block[:, :, None])
  number = jnp.sum(before, axis=-1) - 1  # of the block, in its answer
  others = jnp.maximum(jnp.sum(same & opens[:, None], axis=-1) - 1, 1)
  table = jax.random.uniform(first_key, (answer.shape[0], answer.shape[1] + 1))
  start = lowest + (highest_first - lowest) * jnp.take_along_axis(table, tape.segments, axis=1)
  steps = jax.random.uniform(step_key, answer.shape)
  later = before & jnp.any(same & opens[:, None] & _before(block), axis=-1)[:, None]
  risen = jnp.sum(jnp.where(later, steps[:, None], 0), axis=-1)
  rate = jnp.minimum(start + 2 * (highest - start) * risen / others, highest)
  rate = jnp.where(number > 0, rate, start)
  draw = jax.random.uniform(mask_key, answer.shape)
  return Noise(answer & (draw < rate), rate)


def _earlier(answer):
  """Returns bool[1, T, T]: does the key stand before the query?"""
  return jnp.tril(jnp.ones((answer.shape[1],) * 2, bool), -1)[None]


def _equal(block):
  return block[:, None, :] == block[:, :, None]


def _before(block):
  """Returns bool[B, T, T]: is the key's block before the query's?"""
  return block[:, None, :] < block[:, :, None]

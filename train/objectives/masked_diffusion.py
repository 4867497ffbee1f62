"""Masked diffusion: a network that predicts masked tokens from all the others.

Of each document, at a rate of its own, tokens worth predicting are masked; the network sees what is
left, before and behind, and learns the masked ones. Weighted by one over the rate the loss bounds
the negative log likelihood. Three kinds:

* from scratch, every token seeing every other (MDLM, LLaDA);
* in blocks: every block has a rate of its own and is predicted from itself and the clean blocks
  before it, so that finished blocks can be cached (BD3-LM);
* from an autoregressive target: its head, which predicts the next token, is kept, and its causal
  mask opens while it trains (DiffuLLaMA, Dream).

Source: MDLM, arXiv:2406.07524, equation 8; LLaDA, arXiv:2502.09992, equation 3; BD3-LM,
arXiv:2503.09573, section 3; DiffuLLaMA, arXiv:2410.17891, algorithm 1; Dimple, arXiv:2505.16990.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.transformer import Transformer
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives._own import copy_of
from train.tape import Tape

_GOLDEN = 0.6180339887498949


class Noise(NamedTuple):
  """Which tokens are masked, and at which rate they were."""

  masked: jax.Array  # bool[B, T]
  rate: jax.Array  # f32[B, T]


def make_objective(
  *,
  hidden_size: int = 128,
  num_layers: int = 4,
  num_heads: int = 4,
  num_kv_heads: int = 4,
  intermediate_size: int = 384,
  max_position: int = 512,
  block_size: int | None = None,
  weighting: str = 'inverse',
  lowest_rate: float = 1e-3,
  highest_rate: float = 1.0,
  from_target: bool = False,
  mask_id: int | None = None,
  anneal_steps: int = 1,
) -> Objective:
  """Returns masked prediction, for a Llama-shaped network with a tied head.

  Args:
    hidden_size: D. The sizes are those of a network from scratch.
    num_layers: L.
    num_heads: query heads; D must be a multiple.
    num_kv_heads: key/value heads.
    intermediate_size: of the MLP.
    max_position: longest text it is meant for.
    block_size: of a block-causal network; None if every token is to see every other.
    weighting: 'inverse' of the rate, which bounds the likelihood, or 'uniform'.
    lowest_rate: masking rates are uniform between this
      and `highest_rate`: a narrower range has less variance (the clipped schedules of BD3-LM).
    highest_rate: see above.
    from_target: start from an autoregressive target, and keep its shifted head.
    mask_id: which token masks; None adds one behind the vocabulary, from scratch only.
    anneal_steps: steps, with from_target, until every token sees every other.

  Raises:
    ValueError: if options do not go together.
  """
  if weighting not in ('inverse', 'uniform'):
    raise ValueError(f"weighting must be 'inverse' or 'uniform': {weighting!r}")
  if not 0 < lowest_rate < highest_rate <= 1:
    raise ValueError(f'need 0 < lowest_rate < highest_rate <= 1: {lowest_rate=}, {highest_rate=}')
  if from_target and mask_id is None:
    raise ValueError('from_target needs mask_id: a token of the target that stands for a mask')
  if from_target and block_size is not None:
    raise ValueError('a shifted head is not trained in blocks here: drop block_size or from_target')

  def init(rngs, target, token_counts):
    if from_target:
      assert target is not None
      return copy_of(target)
    config = TransformerConfig(
      vocab_size=len(token_counts) + (mask_id is None),
      hidden_size=hidden_size,
      num_layers=num_layers,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=hidden_size // num_heads,
      intermediate_size=intermediate_size,
      max_position=max_position,
      tie_embeddings=True,
    )
    return Transformer(config, rngs=rngs)

  def mask_of(head):
    return head.config.vocab_size - 1 if mask_id is None else mask_id

  def loss(head, target, tape, rng_key, step) -> Loss:
    del target
    noise_key, attention_key = jax.random.split(rng_key)
    noise = draw_noise(tape, noise_key, lowest_rate, highest_rate, block_size)
    if from_target:
      ratio = jnp.minimum((step + 1) / anneal_steps, 1)
      mask = annealed_mask(tape.segments, ratio, attention_key)
      hidden = shift_right(predict(head, tape, noise.masked, mask, mask_of(head)))
      first = tape.positions == 0  # nothing stands before it
      noise = noise._replace(masked=noise.masked & ~first)
    elif block_size is not None:
      hidden = predict_blocks(head, tape, noise.masked, block_size, mask_of(head))
    else:
      mask = document_mask(tape.segments)
      hidden = predict(head, tape, noise.masked, mask, mask_of(head))
    found, right = losses.label_losses(head.unembed, hidden, tape.tokens)
    scale = 1 / noise.rate if weighting == 'inverse' else jnp.ones_like(noise.rate)
    total = jnp.where(noise.masked, found * scale, 0).sum()
    masked = noise.masked.astype(jnp.float32)
    metrics = {
      'masked_accuracy': losses.masked(right, masked),
      'accuracy_mostly_masked': losses.masked(right, masked * (noise.rate > 0.8)),
    }
    weight = tape.loss_mask.sum(dtype=jnp.float32)
    return Loss(total, weight if weighting == 'inverse' else masked.sum(), metrics)

  def describe(head):
    facts = {'mask_token_id': mask_of(head), 'shifted': from_target}
    return facts if block_size is None else {**facts, 'block_size': block_size}

  return Objective(
    init=init,
    loss=loss,
    needs_target=from_target,
    is_target=from_target,
    describe=describe,
  )


# --- Noise ----------------------------------------------------------------------------------------


def draw_noise(
  tape: Tape, key: jax.Array, lowest: float, highest: float, block_size: int | None = None
) -> Noise:
  """Returns which tokens are masked: each of a document (or block) with the same probability.

  Rates are uniform for each document, and evenly spread over those of a batch, which makes the loss
  steadier: one random start, and steps of the golden ratio from document to document.
  """
  offset_key, mask_key = jax.random.split(key)
  rows = jnp.arange(tape.tokens.shape[0])[:, None]
  number = rows * 37 + tape.segments
  if block_size is not None:
    number = number + 101 * (tape.positions // block_size)
  start = jax.random.uniform(offset_key)
  spread = jnp.mod(start + (number * _GOLDEN) % 1, 1)
  rate = lowest + (highest - lowest) * spread
  draw = jax.random.uniform(mask_key, tape.tokens.shape)
  return Noise(tape.loss_mask & (tape.segments > 0) & (draw < rate), rate)


# --- What sees what -------------------------------------------------------------------------------


def document_mask(segments: jax.Array) -> jax.Array:
  """Returns bool[B, T, T]: every token sees every other of its document; padding sees itself."""
  same = segments[:, :, None] == segments[:, None, :]
  padding = jnp.eye(segments.shape[1], dtype=bool)[None]
  return jnp.where((segments > 0)[:, :, None], same, padding)


def annealed_mask(segments: jax.Array, ratio: jax.Array, key: jax.Array) -> jax.Array:
  """Returns bool[B, T, T]: causal, each later token of the document too with probability ratio.

  Source: DiffuLLaMA, arXiv:2410.17891, section 3.3.
  """
  length = segments.shape[1]
  opened = jax.random.uniform(key, (segments.shape[0], length, length)) < ratio
  return document_mask(segments) & (jnp.tril(jnp.ones((length, length), bool))[None] | opened)


def block_mask(segments: jax.Array, positions: jax.Array, block_size: int) -> jax.Array:
  """Returns bool[B, 2 T, 2 T] over a noisy stream and, behind it, the clean one.

  A noisy block sees itself and the clean blocks before it; a clean block sees the clean blocks up
  to itself.

  Source: BD3-LM, arXiv:2503.09573, section 3.1.
  """
  block = positions // block_size
  same = document_mask(segments)
  equal = block[:, :, None] == block[:, None, :]
  later = block[:, :, None] > block[:, None, :]
  padding = jnp.eye(segments.shape[1], dtype=bool)[None] & (segments == 0)[:, :, None]
  noisy = jnp.concatenate([same & equal, same & later], axis=2)
  clean = jnp.concatenate([jnp.zeros_like(same), (same & (equal | later)) | padding], axis=2)
  return jnp.concatenate([noisy, clean], axis=1)


def predict(head: Transformer, tape: Tape, masked: jax.Array, mask: jax.Array, mask_id: int):
  """Returns hidden f[B, T, D] of the noisy documents."""
  tokens = jnp.where(masked, mask_id, tape.tokens)
  output, _ = head(tokens, tape.positions, mask)
  return output.hidden


def predict_blocks(
  head: Transformer, tape: Tape, masked: jax.Array, block_size: int, mask_id: int
) -> jax.Array:
  """Returns hidden f[B, T, D] of every noisy block, given the clean ones before it."""
  noisy = jnp.where(masked, mask_id, tape.tokens)
  tokens = jnp.concatenate([noisy, tape.tokens], axis=1)
  positions = jnp.concatenate([tape.positions, tape.positions], axis=1)
  output, _ = head(tokens, positions, block_mask(tape.segments, tape.positions, block_size))
  return output.hidden[:, : tape.tokens.shape[1]]


def shift_right(hidden: jax.Array) -> jax.Array:
  """Returns f[B, T, D] with the entry of t - 1 at t, as a shifted head is read."""
  return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))

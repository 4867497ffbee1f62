"""A language model trained on text: a target from scratch, or an independent draft model.

As a draft model it shares the target's tokenizer and drafts chains. Trained on what the target has
written (`train.regenerate`) this is sequence-level distillation.

Source: FastDraft, arXiv:2411.11055, section 3.
"""

import jax.numpy as jnp

from decodax import drafters
from decodax import verifiers
from models.adapter import as_model
from models.config import TransformerConfig
from models.transformer import Transformer
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.tape import shift_left
from train.tape import supervised


def make_objective(
  *,
  hidden_size: int = 128,
  num_layers: int = 4,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  intermediate_size: int = 384,
  max_position: int = 512,
  num_drafts: int = 4,
  as_target: bool = False,
) -> Objective:
  """Returns next-token prediction with cross entropy, for a Llama-shaped model with a tied head.

  Args:
    hidden_size: D.
    num_layers: L.
    num_heads: query heads; D must be a multiple.
    num_kv_heads: key/value heads.
    intermediate_size: of the MLP.
    max_position: longest text it is meant for.
    num_drafts: tokens it drafts a round when it decodes for a target.
    as_target: there is no target; it is to become one.
  """

  def init(rngs, target, token_counts):
    vocab_size = len(token_counts) if target is None else target.config.vocab_size
    config = TransformerConfig(
      vocab_size=vocab_size,
      hidden_size=hidden_size,
      num_layers=num_layers,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=hidden_size // num_heads,
      intermediate_size=intermediate_size,
      max_position=max_position,
      tie_embeddings=True,
    )
    return Transformer(config, rngs=rngs, dtype=jnp.float32 if target is None else target.dtype)

  def make_drafter(head, target):
    del target
    return drafters.draft_model(as_model(head), num_drafts=num_drafts)

  return Objective(
    init=init,
    loss=next_token_loss,
    make_drafter=None if as_target else make_drafter,
    verifier=verifiers.speculative,
    needs_target=not as_target,
  )


def next_token_loss(head, target, tape, rng_key, step) -> Loss:
  """Returns the cross entropy of each supervised token given those before it."""
  del target, rng_key, step
  output, _ = head(tape.tokens, tape.positions, tape.mask())
  labels, _ = shift_left(tape.tokens, 1, tape.segments)
  weights = supervised(tape, 1)
  loss, right = losses.label_losses(head.unembed, output.hidden, labels)
  total = losses.masked(loss, weights)
  return Loss(total.total, total.weight, {'token_accuracy': losses.masked(right, weights)})

"""Hydra and Hydra++: heads that read the tokens drafted before them.

Hydra learns the text; Hydra++ has a layer over all that the target read, deeper heads, and learns
the target's law.

Source: Hydra, arXiv:2402.05109, sections 3 and 4.
"""

import jax
import jax.numpy as jnp

from models.heads.hydra import Hydra
from models.heads.hydra import HydraConfig
from models.heads.hydra import hydra_expander
from models.heads.vocabulary import make_vocabulary
from models.transformer import attention_site
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads


def make_objective(
  *,
  num_heads: int = 4,
  num_layers: int = 1,
  prefix: bool = False,
  share_head: bool = False,
  draft_vocab_size: int | None = None,
  divergence: str = 'labels',
  decay: float = 1.0,
  dropout: float = 0.0,
  tree_nodes: int = 0,
  beam: int = 4,
) -> Objective:
  """Returns the sum over heads of decay^k times the loss of head k.

  Args:
    num_heads: K, and the depth of drafts.
    num_layers: residual blocks of a head; 4 in Hydra++.
    prefix: put a decoder layer between the target and the heads (Hydra++).
    share_head: project with the target's head.
    draft_vocab_size: tokens that are drafted; None is all.
    divergence: 'labels' learns the text; Hydra++ learns the target's law, 'forward_kl'.
    decay: factor on the loss from one head to the next; 1 in the paper.
    dropout: before every linear map; 0.2 in Hydra++ of large targets.
    tree_nodes: nodes verified a round when decoding; 0 is a chain.
    beam: nodes of a tree read at a time.
  """
  loss_between = _heads.divergence_of(divergence)

  def init(rngs, target, token_counts):
    config = HydraConfig(
      hidden_size=target.config.hidden_size,
      vocab_size=target.config.vocab_size,
      num_heads=num_heads,
      num_layers=num_layers,
      share_head=share_head,
      draft_vocab_size=draft_vocab_size,
      prefix=_heads.layer_like(target.config) if prefix else None,
    )
    vocabulary = make_vocabulary(token_counts, draft_vocab_size)
    return Hydra(config, target, rngs=rngs, vocabulary=vocabulary)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del step
    feature = tape.hidden
    if prefix:
      site = attention_site(head.config.prefix, tape.positions, tape.mask())
      feature, _ = head.prefix(feature, site)
    embedded = [_heads.embed_ahead(target, tape, k) for k in range(1, num_heads + 1)]
    teacher, depths = _heads.teach(tape, target, head.vocabulary), []
    for k in range(1, num_heads + 1):
      known = jnp.stack(embedded[:k], axis=2)
      drop = _dropout(jax.random.fold_in(rng_key, k), dropout)
      depths.append(
        _heads.compare_at(
          tape, teacher, lambda x, k=k: head.project(target, x, k),
          head.vector(feature, known, k, drop), k + 1, loss_between,
        )
      )  # fmt: skip
    return _heads.total_loss(depths, [decay**k for k in range(num_heads)])

  def make_drafter(head, target):
    return _heads.make_drafter(
      hydra_expander(head, target), num_drafts=num_heads, tree_nodes=tree_nodes, beam=beam
    )

  return Objective(init, loss, make_drafter, verifier=_heads.verifier_for(tree_nodes))


def _dropout(rng_key, rate):
  """Returns the function that drops numbers of an array, other ones at each call."""
  calls = 0

  def drop(x):
    nonlocal calls
    if rate == 0:
      return x
    calls += 1
    keep = jax.random.bernoulli(jax.random.fold_in(rng_key, calls), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)

  return drop

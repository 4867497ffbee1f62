"""Medusa-1: heads on a frozen target, each learning the token its own number of places ahead.

Source: Medusa, arXiv:2401.10774, section 2.2.1.
"""

from models.heads.medusa import Medusa
from models.heads.medusa import MedusaConfig
from models.heads.medusa import medusa_expander
from models.heads.vocabulary import make_vocabulary
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads


def make_objective(
  *,
  num_heads: int = 4,
  num_layers: int = 1,
  share_head: bool = False,
  draft_vocab_size: int | None = None,
  divergence: str = 'labels',
  decay: float = 0.8,
  tree_nodes: int = 0,
  beam: int = 4,
) -> Objective:
  """Returns the sum over heads of decay^k times the loss of head k.

  Args:
    num_heads: K, and the depth of drafts.
    num_layers: residual blocks of a head.
    share_head: project with the target's head, so that only the blocks are trained.
    draft_vocab_size: tokens that are drafted; None is all.
    divergence: 'labels' learns the text, as the paper; else a name of `losses.DIVERGENCES`.
    decay: factor on the loss from one head to the next.
    tree_nodes: nodes verified a round when decoding; 0 is a chain.
    beam: nodes of a tree read at a time.
  """
  loss_between = _heads.divergence_of(divergence)

  def init(rngs, target, token_counts):
    config = MedusaConfig(
      hidden_size=target.config.hidden_size,
      vocab_size=target.config.vocab_size,
      num_heads=num_heads,
      num_layers=num_layers,
      share_head=share_head,
      draft_vocab_size=draft_vocab_size,
    )
    vocabulary = make_vocabulary(token_counts, draft_vocab_size)
    return Medusa(config, target, rngs=rngs, vocabulary=vocabulary)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del rng_key, step
    vectors = head.vectors(tape.hidden)
    teacher = _heads.teach(tape, target, head.vocabulary)
    depths = [
      _heads.compare_at(
        tape, teacher, lambda x, k=k: head.project(target, x, k), vectors[:, :, k], k + 2,
        loss_between,
      )
      for k in range(num_heads)
    ]  # fmt: skip
    return _heads.total_loss(depths, losses.geometric_weights(num_heads, decay))

  def make_drafter(head, target):
    return _heads.make_drafter(
      medusa_expander(head, target), num_drafts=num_heads, tree_nodes=tree_nodes, beam=beam
    )

  return Objective(init, loss, make_drafter, verifier=_heads.verifier_for(tree_nodes))

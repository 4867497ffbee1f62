"""Kangaroo: an adapter learns what the target's last layers would have said.

Source: Kangaroo, arXiv:2404.18911, section 3.2.
"""

from decodax import controllers
from decodax import drafters
from models.heads.kangaroo import Kangaroo
from models.heads.kangaroo import KangarooConfig
from models.heads.kangaroo import kangaroo_expander
from models.transformer import attention_site
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads


def make_objective(
  *,
  exit_layer: int = 2,
  divergence: str = 'forward_kl',
  num_drafts: int = 6,
  confidence: float = 0.6,
  tree_nodes: int = 0,
  beam: int = 4,
) -> Objective:
  """Returns the divergence from the target's law at the same token; nothing is shifted.

  Args:
    exit_layer: how many of the target's layers run before the adapter.
    divergence: a name of `losses.DIVERGENCES`, or 'labels'.
    num_drafts: depth of drafts at most.
    confidence: a chain ends after a draft whose law had no probability above this, the second exit;
      0 never ends it.
    tree_nodes: nodes verified a round when decoding; 0 is a chain.
    beam: nodes of a tree read at a time.
  """
  loss_between = _heads.divergence_of(divergence)

  def init(rngs, target, token_counts):
    del token_counts
    return Kangaroo(KangarooConfig(_heads.layer_like(target.config), exit_layer), target, rngs=rngs)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del rng_key, step
    site = attention_site(head.config.layer, tape.positions, tape.mask())
    y, _ = head(tape.taps[f'layer_{exit_layer}'], site)
    teacher = _heads.teach(tape, target)
    depth = _heads.compare_at(tape, teacher, target.unembed, y, 1, loss_between)
    return _heads.total_loss([depth], [1.0])

  def make_drafter(head, target):
    expander = kangaroo_expander(head, target)
    if tree_nodes or not confidence:
      return _heads.make_drafter(expander, num_drafts=num_drafts, tree_nodes=tree_nodes, beam=beam)
    second_exit = controllers.confidence(confidence)
    return drafters.chain_drafter(expander, num_drafts=num_drafts, controller=second_exit)

  return Objective(
    init, loss, make_drafter, _heads.verifier_for(tree_nodes),
    taps=lambda config: (exit_layer,),
  )  # fmt: skip

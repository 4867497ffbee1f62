"""EAGLE-1: regress the target's next hidden state, and agree with its law.

Source: EAGLE, arXiv:2401.15077, section 4.2. Trees as in EAGLE-2, arXiv:2406.16858, need no other
training.
"""

import jax
import jax.numpy as jnp

from models.heads.eagle import Eagle
from models.heads.eagle import EagleConfig
from models.heads.eagle import eagle_expander
from models.heads.recurrent import unroll
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads
from train.tape import shift_left


def make_objective(
  *,
  bias: bool = True,
  feature_weight: float = 1.0,
  law_weight: float = 0.1,
  divergence: str = 'forward_kl',
  noise: float = 0.1,
  num_drafts: int = 4,
  tree_nodes: int = 0,
  beam: int = 4,
) -> Objective:
  """Returns smooth L1 to the next hidden state plus a share of the divergence of laws, at depth 1.

  Deeper, where the head goes on from its own output, it is only measured.

  Args:
    bias: of the fusion of embedding and hidden state.
    feature_weight: of the regression.
    law_weight: of the divergence.
    divergence: a name of `losses.DIVERGENCES`, or 'labels'.
    noise: hidden states are read with uniform noise in [-noise, noise].
    num_drafts: depth of drafts.
    tree_nodes: nodes verified a round when decoding; 0 is a chain.
    beam: nodes of a tree read at a time.
  """
  loss_between = _heads.divergence_of(divergence)

  def init(rngs, target, token_counts):
    del token_counts
    return Eagle(EagleConfig(_heads.layer_like(target.config), bias), target, rngs=rngs)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del step
    spread = noise * jax.random.uniform(rng_key, tape.hidden.shape, minval=-1.0, maxval=1.0)
    embedded = [_heads.embed_ahead(target, tape, k) for k in range(1, num_drafts + 1)]
    inputs = tape.hidden + spread.astype(tape.hidden.dtype)
    states = unroll(head, inputs, embedded, tape.positions, tape.mask())
    states = [states[0], *(jax.lax.stop_gradient(state) for state in states[1:])]
    teacher = _heads.teach(tape, target)
    depths = [
      _heads.compare_at(tape, teacher, target.unembed, state, k + 2, loss_between)
      for k, state in enumerate(states)
    ]
    following, ok = shift_left(tape.hidden, 1, tape.segments)
    weights = depths[0].weights * ok
    regression = losses.masked(losses.smooth_l1(states[0], following), weights)
    law = losses.masked(depths[0].comparison.loss, depths[0].weights)
    metrics = {**_heads.depth_metrics(depths), 'feature_loss': regression, 'law_loss': law}
    total = feature_weight * regression.total + law_weight * law.total
    return Loss(total, jnp.sum(depths[0].weights), metrics)

  def make_drafter(head, target):
    return _heads.make_drafter(
      eagle_expander(head, target), num_drafts=num_drafts, tree_nodes=tree_nodes, beam=beam
    )

  return Objective(init, loss, make_drafter, verifier=_heads.verifier_for(tree_nodes))

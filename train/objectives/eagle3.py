"""EAGLE-3: learn to draft on one's own output, as in decoding, from features of three depths.

Source: EAGLE-3, arXiv:2503.01840, section 3; its variants as in vllm-project/speculators.
"""

from decodax.types import ModelOutput
from models.heads.eagle3 import Eagle3
from models.heads.eagle3 import Eagle3Config
from models.heads.eagle3 import default_taps
from models.heads.eagle3 import eagle3_expander
from models.heads.recurrent import unroll
from models.heads.vocabulary import make_vocabulary
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads


def make_objective(
  *,
  steps: int = 5,
  taps: tuple[int, ...] = (),
  draft_vocab_size: int | None = None,
  intermediate_size: int | None = None,
  norm_before_fuse: bool = False,
  norm_taps: bool = False,
  norm_before_residual: bool = False,
  feed_normed: bool = False,
  divergence: str = 'forward_kl',
  decay: float = 0.8,
  num_drafts: int = 0,
  tree_nodes: int = 0,
  beam: int = 4,
) -> Objective:
  """Returns the sum over steps of an unrolled chain of decay^j times the divergence of laws.

  Tokens whose likeliest successor is not in the draft vocabulary do not count; for the others the
  target's law is normalised over it.

  Args:
    steps: J, of the training-time test.
    taps: the layers whose incoming streams are read; () is `default_taps`.
    draft_vocab_size: tokens that are drafted; None is all.
    intermediate_size: of the MLP; None is the target's.
    norm_before_fuse: one norm over all taps before they are fused.
    norm_taps: one norm for each tap.
    norm_before_residual: the residual is the normed state.
    feed_normed: the state that goes on is the normed one.
    divergence: a name of `losses.DIVERGENCES`, or 'labels'.
    decay: factor on the loss from one step to the next.
    num_drafts: depth of drafts; 0 is `steps`.
    tree_nodes: nodes verified a round when decoding; 0 is a chain.
    beam: nodes of a tree read at a time.
  """
  loss_between = _heads.divergence_of(divergence)

  def taps_of(config):
    return taps or default_taps(config.num_layers)

  def init(rngs, target, token_counts):
    changes = {} if intermediate_size is None else {'intermediate_size': intermediate_size}
    config = Eagle3Config(
      layer=_heads.layer_like(target.config, **changes),
      taps=taps_of(target.config),
      target_hidden_size=target.config.hidden_size,
      draft_vocab_size=draft_vocab_size,
      norm_before_fuse=norm_before_fuse,
      norm_taps=norm_taps,
      norm_before_residual=norm_before_residual,
      feed_normed=feed_normed,
    )
    vocabulary = make_vocabulary(token_counts, draft_vocab_size)
    return Eagle3(config, target, rngs=rngs, vocabulary=vocabulary)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del rng_key, step
    start = head.start(ModelOutput(tape.hidden, tape.taps))
    embedded = [_heads.embed_ahead(target, tape, k) for k in range(1, steps + 1)]
    states = unroll(head, start, embedded, tape.positions, tape.mask())
    teacher = _heads.teach(tape, target, head.vocabulary)
    depths = [
      _heads.compare_at(tape, teacher, head.draft_logits, state, k + 2, loss_between)
      for k, state in enumerate(states)
    ]
    return _heads.total_loss(depths, losses.geometric_weights(steps, decay))

  def make_drafter(head, target):
    return _heads.make_drafter(
      eagle3_expander(head, target), num_drafts=num_drafts or steps, tree_nodes=tree_nodes,
      beam=beam,
    )  # fmt: skip

  return Objective(init, loss, make_drafter, _heads.verifier_for(tree_nodes), taps=taps_of)

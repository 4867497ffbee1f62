"""PPD: prompt tokens behind many places of a text learn what the frozen target says of later ones.

Axes: `B` rows, `T` tokens, `A` anchors, `K` prompt tokens, `R` ranks.

Source: Hardware-Aware Parallel Prompt Decoding, arXiv:2405.18628, section 3.
"""

import jax
import jax.numpy as jnp
import numpy as np

from decodax import static_trees
from decodax import verifiers
from models.heads.ppd import PromptTokens
from models.heads.ppd import PromptTokensConfig
from models.heads.ppd import ppd_drafter
from models.heads.ppd import read_prompts
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads
from train.tape import Tape
from train.tape import supervised


def make_objective(
  *,
  num_prompts: int = 3,
  num_copies: int = 1,
  num_anchors: int = 64,
  divergence: str = 'forward_kl',
  decay: float = 0.8,
  num_inputs: int = 16,
  first_accuracy: float = 0.4,
) -> Objective:
  """Returns the sum over prompt tokens of decay^k times the divergence from the target's law.

  Where the paper cuts each text at one random place, here prompt tokens stand behind many places of
  a text that is read once.

  Args:
    num_prompts: K, and the depth of drafts.
    num_copies: of each prompt token, whose logits are averaged.
    num_anchors: A, random places of a row that are learnt from; 0 is all.
    divergence: a name of `losses.DIVERGENCES`, or 'labels'.
    decay: factor on the loss from one prompt token to the next.
    num_inputs: drafts and prompt tokens that the target reads a round when decoding.
    first_accuracy: of the likeliest guess of the first prompt token, for which the trees are
      chosen; see `assumed_acceptance`.

  Raises:
    ValueError: if num_anchors < 0, or as `static_trees.ppd`.
  """
  if num_anchors < 0:
    raise ValueError(f'num_anchors must be at least 0: {num_anchors=}')
  loss_between = _heads.divergence_of(divergence)
  table = assumed_acceptance(num_prompts, first_accuracy)
  trees = static_trees.ppd(table, num_inputs, max_prompts=num_prompts)

  def init(rngs, target, token_counts):
    config = PromptTokensConfig(target.config.hidden_size, num_prompts, num_copies)
    return PromptTokens(config, target, rngs=rngs, token_counts=token_counts)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del step
    anchors = choose_anchors(tape, rng_key, num_anchors)
    text, hidden = read_prompts(head, target, tape.tokens, tape.positions, tape.mask(), anchors)
    tape = tape._replace(hidden=text)  # the same; where nothing reads the tape's it is not made
    teacher = _heads.teach(tape, target)
    depths = [
      _heads.compare_at(
        tape, teacher, lambda x: head.logits(target, x), hidden[:, :, k], k + 2, loss_between,
        anchors=anchors,
      )
      for k in range(num_prompts)
    ]  # fmt: skip
    return _heads.total_loss(depths, losses.geometric_weights(num_prompts, decay))

  def make_drafter(head, target):
    return ppd_drafter(head, target, trees)

  return Objective(init, loss, make_drafter, verifiers.coupled)


def choose_anchors(tape: Tape, rng_key: jax.Array, num_anchors: int) -> jax.Array:
  """Returns i32[B, A], random places of each row, those first whose first draft is supervised.

  Args:
    tape: the text.
    rng_key: draws them.
    num_anchors: A; 0, or more than there are, is all of them.
  """
  batch_size, length = tape.tokens.shape
  if not 0 < num_anchors < length:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))
  scores = jax.random.uniform(rng_key, tape.tokens.shape) + supervised(tape, 2)
  return jax.lax.top_k(scores, num_anchors)[1].astype(jnp.int32)


def assumed_acceptance(num_prompts: int, first_accuracy: float, num_ranks: int = 8) -> np.ndarray:
  """Returns f64[K, R], an acceptance by depth and rank, for trees that none was measured for.

  From depth to depth it falls to 0.7, from rank to rank to 0.4 of what it was.
  `experiments.laws.prompt_acceptance` measures the true one.

  Args:
    num_prompts: K.
    first_accuracy: of the first guess at depth 1.
    num_ranks: R.
  """
  depth, rank = np.indices((num_prompts, num_ranks))
  return first_accuracy * 0.7**depth * 0.4**rank

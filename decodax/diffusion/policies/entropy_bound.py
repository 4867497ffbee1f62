"""Fill as many slots as a bound on their dependence allows.

Axes: `B` batch, `W` window slots.
"""

import jax
from jax import lax
import jax.numpy as jnp

from decodax.diffusion.policies.stateless import no_state
from decodax.diffusion.scores import by_rank
from decodax.diffusion.scores import longest_prefix
from decodax.diffusion.scores import ranks
from decodax.diffusion.scores import score_fn
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def entropy_bound(gamma: float | jax.Array = 0.1, score: str = 'confidence') -> Policy:
  """Returns EB-Sampler: the longest prefix of the order with sum H - max H <= gamma nats.

  That difference bounds the total correlation of the slots, which is what is lost, in nats, by
  drawing them apart.

  Lossy (by at most gamma nats of total correlation per step, if the network's laws are right). With
  gamma = 0 only certain slots go together; with an infinite one all do.

  Args:
    gamma: f[] or f[B], nats; may be traced. Published values differ a hundredfold: sweep it.
    score: which order, see `decodax.diffusion.scores.SCORES`.

  Raises:
    ValueError: if gamma < 0, or there is no such score.

  Source: Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking,
  arXiv:2505.24857, equation 7.
  """
  check_knob('gamma', gamma, 0, float('inf'))
  score_of = score_fn(score)

  def select(params, state, view: View) -> Selection:
    del params
    rank = ranks(score_of(view), view.eligible)
    ours = by_rank(view.eligible, rank)
    entropy = jnp.where(ours, by_rank(view.summary.entropy, rank), 0)
    lost = jnp.cumsum(entropy, axis=1) - lax.cummax(entropy, axis=1)
    count = longest_prefix((lost <= per_row(gamma, lost)) & ours)
    return Selection(view.eligible & (rank < count[:, None]), state)

  return Policy('entropy-bound', 'lossy: at most gamma nats of dependence a step', no_state, select)

"""Real decoding while training: how many tokens a target call really makes, on held-out prompts.

Teacher-forced accuracies flatter a drafter: it never has to live with its own mistakes. Here the
decoding loop itself runs, with the parameters of the moment; it is compiled once.

Axes: `B` prompts, `D` maximal draft depth.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import numpy as np

import decodax
from decodax.types import PyTree
from models.adapter import as_model
from train.config import EvalConfig
from train.step import Learner


class Measured(NamedTuple):
  """What was measured at one temperature."""

  temperature: float
  tokens_per_call: float  # emitted tokens by verifying target calls, all prompts together
  conditional: tuple[float, ...]  # by depth: accepted, of those whose predecessors all were
  num_tokens: int


class Rollout:
  """Decodes the same prompts again and again with parameters that change."""

  def __init__(
    self,
    learner: Learner,
    head: nnx.Module,
    target: nnx.Module,
    prompts: Sequence[Sequence[int]],
    config: EvalConfig,
    *,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
  ):
    objective = learner.objective
    if objective.make_drafter is None:
      raise ValueError('this objective has no drafter to decode with')
    drafter = objective.make_drafter(head, target)
    model = as_model(target, taps=learner.taps)  # pyright: ignore[reportArgumentType]
    self._learner, self._config = learner, config
    self._decode = jax.jit(
      functools.partial(decodax.decode, model=model, drafter=drafter, verifier=objective.verifier)
    )
    self._request = functools.partial(
      decodax.make_request,
      prompts,
      max_new_tokens=config.max_new_tokens,
      vocab_size=model.vocab_size,
      eos_ids=eos_ids,
      seed=seed,
    )

  def measure(self, target_params: PyTree, head_params: Any) -> list[Measured]:
    """Returns what the head, `nnx.State` of all its variables, reaches at each temperature."""
    params = self._learner.objective.place(target_params, head_params)
    found = []
    for temperature in self._config.temperatures:
      result = self._decode(params, self._request(temperature=temperature))
      found.append(_summary(temperature, jax.device_get(result.stats)))
    return found


def _summary(temperature, stats) -> Measured:
  tested, accepted = stats.num_tested_at.sum(0), stats.num_accepted_at.sum(0)
  emitted = int(stats.num_emitted.sum())
  return Measured(
    temperature=float(temperature),
    tokens_per_call=emitted / max(int(stats.num_target_calls.sum()), 1),
    conditional=tuple(np.divide(accepted, np.maximum(tested, 1)).tolist()),
    num_tokens=emitted,
  )

"""Checkpoints by Orbax, the only module that knows it.

A checkpoint is the whole `TrainState` (step, parameters, optimizer, average) with the facts a
resumed run is compared with. The order of the data and all random numbers are functions of the
step and the seed, so nothing else is needed to go on to the bit. Saving is asynchronous; a
checkpoint appears under its name when it is complete.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from decodax.types import PyTree


class Checkpoints:
  """The checkpoints of a run: the last ones, and the best one by tokens/call."""

  def __init__(self, directory: pathlib.Path, *, keep_last: int):
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(keep_last),
        checkpoint_managers.BestN(
          get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=_metric, cleanup_tmp_directories=True
      ),
    )

  @property
  def last_step(self) -> int | None:
    """The last complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  @property
  def best_step(self) -> int | None:
    """The one with most tokens/call; the last one where nothing was measured."""
    return self._manager.best_step() if self._measured() else self.last_step

  def save(
    self, step: int, state: PyTree, facts: Mapping[str, Any], tokens_per_call: float | None
  ) -> None:
    """Saves the state after `step` steps, unless that is saved already."""
    if step in self._manager.all_steps():
      return
    metrics = None if tokens_per_call is None else {'tokens_per_call': float(tokens_per_call)}
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(dict(facts))
    )
    self._manager.save(step, args=args, metrics=metrics)

  def restore(self, step: int, like: PyTree) -> PyTree:
    """Returns the state of a checkpoint.

    Args:
      step: which one.
      like: the shapes, dtypes and shardings wanted: `jax.ShapeDtypeStruct`s or arrays. They may
        be of another mesh than the one that saved.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    return self._manager.restore(step, args=args)['state']

  def facts(self, step: int) -> dict[str, Any]:
    """Returns the facts saved with a checkpoint."""
    args = ocp.args.Composite(facts=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)['facts']

  def preempted(self, step: int) -> bool:
    """Has the scheduler of a multi-process run asked to stop? All processes learn it together."""
    return jax.process_count() > 1 and self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the directory."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _measured(self):
    return self._manager.best_step() is not None


def _metric(metrics):
  return (metrics or {}).get('tokens_per_call', 0.0)

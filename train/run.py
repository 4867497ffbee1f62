"""A training run: builds everything from a configuration, then steps, saves, decodes and reports.

  run = Run(config, workdir)
  outcome = run.train()

A run is resumed by starting it again in the same folder: it goes on from its last checkpoint, to
the bit. What a folder holds:

  config.json        what was asked for; another configuration is refused
  data/, tokenizer/  packed rows; a tokenizer that was trained
  checkpoints/       the last ones and the best one
  export/            the best head (or model), ready to be loaded
  metrics.jsonl, tensorboard/, *.png
  non_finite/        the batch that broke a run
"""

import contextlib
import enum
import json
import pathlib
import signal
import threading
from typing import Any

from flax import nnx
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from models.registry import load_model
from train import export
from train import packing
from train import sharding
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.config import as_dict
from train.display import Reporter
from train.display import draw_curves
from train.objective import get_objective
from train.rollout import Measured
from train.rollout import Rollout
from train.step import StepInfo
from train.step import TrainState
from train.step import make_learner
from train.step import make_step_fn
from train.tape_cache import TapeCache


class Outcome(enum.Enum):
  """How a run ended."""

  FINISHED = 0
  NON_FINITE = 1  # the loss stopped being a number; the last checkpoint is good
  STOPPED = 143  # asked to by SIGTERM; saved


class Run:
  """Everything of one training run, on this process's part of the mesh."""

  def __init__(self, config: TrainConfig, workdir: pathlib.Path, *, show: bool = True):
    self.config, self.workdir = config, workdir
    self.is_first = jax.process_index() == 0
    self.show = show and self.is_first
    self.objective = get_objective(config.objective, config.options)
    self.mesh = sharding.make_mesh(config.mesh)
    self.rows = sharding.my_rows(config.batch_size, self.mesh)
    sharding.my_rows(config.batch_size // config.accumulation, self.mesh)
    self._check_workdir()
    self.dtype = jnp.dtype(config.compute_dtype or _default_dtype())
    self._load_target()
    self._prepare_data()
    self._build()

  # --- Building ----------------------------------------------------------------------------------

  def _check_workdir(self):
    """Writes config.json, or compares it with the one that is there."""
    path = self.workdir / 'config.json'
    wanted = json.loads(json.dumps(as_dict(self.config)))
    if path.exists():
      found = json.loads(path.read_text(encoding='utf-8'))
      different = _differences(found, wanted)
      if different:
        raise ValueError(
          f'{self.workdir} holds a run with other settings: {"; ".join(different)}. Resume with '
          'the same ones, or take another --workdir.'
        )
    elif self.is_first:
      self.workdir.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(wanted, indent=2), encoding='utf-8')

  def _load_target(self):
    self.target, self.loaded = None, None
    if self.objective.needs_target != bool(self.config.target):
      need = 'needs' if self.objective.needs_target else 'has no use for'
      raise ValueError(f'objective {self.config.objective!r} {need} a target (setting: target)')
    if self.config.target:
      self.loaded = load_model(self.config.target, dtype=self.dtype, for_training=True)
      self.target = self.loaded.transformer

  def _prepare_data(self):
    config = self.config.data
    own = None if self.loaded is None else self.loaded.tokenizer
    directory = pathlib.Path(config.directory) if config.directory else self.workdir / 'data'
    if self.is_first:
      self._corpus(config, own, directory)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('data')
    self.tokenizer, self.corpus = self._corpus(config, own, directory)

  def _corpus(self, config, own, directory):
    tokenizer = packing.prepare_tokenizer(config, self.workdir / 'tokenizer', own)
    vocab_size = tokenizer.vocab_size if self.target is None else self.target.config.vocab_size
    return tokenizer, packing.prepare(config, tokenizer, vocab_size, directory)

  def _build(self):
    config, corpus = self.config, self.corpus
    self.learner, init = make_learner(config, self.objective, self.target, corpus.token_counts)
    like = jax.eval_shape(init)
    self.shardings = sharding.parameter_shardings(like, self.mesh)
    self.like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, self.shardings
    )
    self._init = jax.jit(init, out_shardings=self.shardings)
    self.target_params: Any = ()
    if self.target is not None:
      state = nnx.state(self.target)
      self.target_params = sharding.place(state, sharding.parameter_shardings(state, self.mesh))
    self.step_fn = jax.jit(
      make_step_fn(self.learner, self.dtype),
      donate_argnums=0,
      out_shardings=(self.shardings, sharding.replicated(self.mesh)),
    )
    self.tapes = TapeCache(self) if config.tape_cache else None
    self.rollout = None

  def first_state(self) -> TrainState:
    """Returns the state of step 0."""
    state = self._init()
    if not self.config.init_from:
      return state
    assert self.target is not None
    head = export.load_head(self.config.init_from, self.target).head
    _, params, fixed = nnx.split(head, self.objective.trainable, ...)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    if jax.tree.structure(params) != jax.tree.structure(state.params):
      raise ValueError(f'{self.config.init_from} holds another kind of head than this run trains')
    params, fixed = (
      sharding.place(new, where)
      for new, where in ((params, self.shardings.params), (fixed, self.shardings.fixed))
    )
    average = () if isinstance(state.average, tuple) else jax.tree.map(jnp.copy, params)
    return state._replace(params=params, fixed=fixed, average=average)

  # --- Training ----------------------------------------------------------------------------------

  def train(self) -> Outcome:
    """Trains to the end, or until something stops it, and returns what did."""
    checkpoints = Checkpoints(
      self.workdir / 'checkpoints', keep_last=self.config.checkpoint.keep_last
    )
    with contextlib.closing(checkpoints):  # whatever happens, a save that has begun is finished
      start = checkpoints.last_step or 0
      state = checkpoints.restore(start, self.like) if start else self.first_state()
      with _Terminations() as stop, self._reporter(start) as report:
        self._say(report, self._describe(start))
        outcome, state = self._loop(state, start, checkpoints, report, stop)
        if outcome is Outcome.FINISHED:
          self._finish(state, checkpoints, report)
    return outcome

  def _loop(self, state, start, checkpoints, report, stop):
    """Returns (outcome, the last good state)."""
    config, self._measured_last = self.config, None
    pending: StepInfo | None = None
    if start == 0 and config.eval.every and self.objective.make_drafter is not None:
      self._evaluate(state, 0, report)
    for step in range(start, config.num_steps):
      batch, features = self._batch(step)
      state, info = self.step_fn(state, self.target_params, batch, features)
      done = step + 1
      stopping = stop.requested or checkpoints.preempted(done)
      boundary = stopping or self._is_boundary(done)
      for each in (pending, info) if boundary else (pending,):
        if each is not None and not bool(each.finite):
          self._keep_batch(int(each.step))
          return Outcome.NON_FINITE, state
      pending = None if boundary else info
      if done % config.log_every == 0 or done == config.num_steps:
        self._log(info, done, report)
      if self._is_due(config.eval.every, done) and self.objective.make_drafter is not None:
        self._evaluate(state, done, report)
      if self._is_due(config.checkpoint.every, done) or stopping:
        checkpoints.save(done, state, self._facts(), self._measured_at(done))
      if stopping and done < config.num_steps:
        checkpoints.wait()
        return Outcome.STOPPED, state
    return Outcome.FINISHED, state

  def _is_due(self, every, done):
    return every > 0 and (done % every == 0 or done == self.config.num_steps)

  def _is_boundary(self, done):
    """Is anything read from the state after this step?"""
    every = (self.config.log_every, self.config.eval.every, self.config.checkpoint.every)
    return any(self._is_due(each, done) for each in every)

  def _batch(self, step):
    """Returns (global arrays of the batch, its tape's features if they were kept)."""
    config = self.config
    ids = self.corpus.row_ids(step, config.batch_size, config.seed)[self.rows]
    batch = sharding.to_mesh(self.corpus.gather(ids), self.mesh)
    return batch, None if self.tapes is None else self.tapes.features(ids, batch)

  def _log(self, info, done, report):
    numbers = {
      'loss': float(info.loss),
      'gradient_norm': float(info.gradient_norm),
      'learning_rate': float(info.learning_rate),
      **{name: float(mean.value) for name, mean in info.metrics.items()},
    }
    if report is not None:
      tokens = done * self.config.batch_size * self.config.data.sequence_length
      report.step(done, numbers, tokens)

  def _keep_batch(self, step):
    folder = self.workdir / 'non_finite'
    if self.is_first:
      folder.mkdir(exist_ok=True)
      batch = self.corpus.batch(step, self.config.batch_size, self.config.seed)
      np.savez(folder / f'step_{step}.npz', **batch._asdict())

  # --- Measuring and the end ---------------------------------------------------------------------

  def _evaluate(self, state, done, report):
    """Decodes on process 0; the others only take part in gathering the parameters."""
    found = self.measure(state)
    self._measured_last = (done, found)
    if report is not None:
      report.measured(done, found)

  def measure(self, state: TrainState) -> list[Measured]:
    """Returns what the head of a state reaches on the held-out prompts."""
    if self.rollout is None:
      assert self.target is not None
      head = self.learner.head(state)
      prompts = self.prompts(self.config.eval.num_prompts)
      eos = () if self.loaded is None else self.loaded.eos_ids
      self.rollout = Rollout(
        self.learner, head, self.target, prompts, self.config.eval, eos_ids=eos,
        seed=self.config.seed,
      )  # fmt: skip
    params = nnx.state(self.learner.merge(self.learner.best_params(state), state.fixed))
    target_params = self.target_params
    if self.mesh.size > 1:
      params, target_params = sharding.to_host((params, target_params), self.mesh)
    return self.rollout.measure(target_params, _cast_like(params, self.dtype))

  def prompts(self, num: int) -> list[list[int]]:
    """Returns held-out prompts."""
    longest = self.config.data.sequence_length
    length = self.config.eval.prompt_length
    return packing.prompts_of(self.corpus.held_out, num, length, longest=longest)

  def _measured_at(self, done):
    """Returns the greedy tokens/call if it was measured at this step."""
    if self._measured_last is None or self._measured_last[0] != done:
      return None
    return self._measured_last[1][0].tokens_per_call

  def _finish(self, state, checkpoints, report):
    """Exports the best checkpoint and draws the curves."""
    checkpoints.wait()
    best = checkpoints.best_step
    if best is not None and best != int(state.step):
      state = checkpoints.restore(best, self.like)
    head_state = sharding.to_host((self.learner.best_params(state), state.fixed), self.mesh)
    if self.is_first:
      self._export(self.learner.merge(*head_state), best)
      names = draw_curves(self.workdir)
      self._say(report, f'Written to {self.workdir}/: export/ (step {best}), {", ".join(names)}')

  def _export(self, head, step):
    facts = {**self._facts(), 'step': step}
    directory = self.workdir / 'export'
    if not self.objective.needs_target or self.objective.is_target:
      more = {} if self.objective.describe is None else self.objective.describe(head)
      export.save_language_model(
        directory, head, tokenizer_directory=self._tokenizer_directory(),
        facts={**more, 'decodax': facts},
      )  # fmt: skip
      return
    export.save_head(
      directory, head, objective=self.config.objective, options=self.config.options, facts=facts
    )

  def _tokenizer_directory(self):
    own = self.workdir / 'tokenizer'
    return own if own.exists() else pathlib.Path(self.config.data.tokenizer or self.config.target)

  def _facts(self):
    source = None if self.loaded is None else self.loaded.source.get('sha256')
    return {
      'target': self.config.target,
      'target_sha256': source,
      'data': {k: v for k, v in self.corpus.facts.items() if k != 'signature'},
      'num_steps': self.config.num_steps,
      'batch_size': self.config.batch_size,
      'sequence_length': self.config.data.sequence_length,
      'seed': self.config.seed,
    }

  def num_parameters(self) -> int:
    """Returns how many parameters are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.like.params))

  def _describe(self, start):
    facts, devices = self.corpus.facts, self.mesh.devices.size
    at = f'resumed at step {start}' if start else 'from the start'
    return (
      f'{self.config.objective}: {self.num_parameters() / 1e6:.2f} M trained parameters, '
      f'{facts["num_documents"]} documents in {facts["num_rows"]} rows '
      f'({facts["num_supervised"] / max(facts["num_tokens"], 1):.0%} of tokens supervised), '
      f'{devices} device{"s" if devices > 1 else ""} as {dict(self.mesh.shape)}, {at}'
    )

  def _reporter(self, start):
    if not self.is_first:
      return _Nothing()
    title = self.workdir.name
    return Reporter(self.workdir, title, self.config.num_steps, start, show=self.show)

  def _say(self, report, text):
    if report is not None:
      report.stage(text)


class _Nothing:
  """Stands where process 0 has its reporter."""

  def __enter__(self):
    return None

  def __exit__(self, *_):
    return None


class _Terminations:
  """Notes SIGTERM, so that the step that is running can end and be saved."""

  requested = False

  def __enter__(self):
    self._old = None
    if threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_):
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def _note(self, number, frame):
    del number, frame
    self.requested = True


def _default_dtype():
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def _cast_like(state, dtype):
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
  )


def _differences(found, wanted, prefix=''):
  """Returns 'key: old, now new' for every setting that differs."""
  changes = []
  for key in sorted({*found, *wanted}):
    old, new = found.get(key), wanted.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
      changes += _differences(old, new, f'{prefix}{key}.')
    elif old != new:
      changes.append(f'{prefix}{key}: {old!r}, now {new!r}')
  return changes

"""How many tokens to draft: rules that plug into any drafter.

A controller says before a round how much to draft at most, is asked after every draft of a chain
whether to stop, and learns from what was accepted. It stops *after* a draft and never takes one
back: the drafts that are submitted keep their law, so every controller leaves a lossless method
lossless. A tree drafter asks for the limit only, as a number of nodes.

All of a controller's state is per row, and so are its decisions: neighbours change nothing.

Axes: `B` batch, `A` lengths to choose from, `G` drafts of a round at most, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decodax import theory
from decodax import trees
from decodax.types import DecodeState
from decodax.types import Observation
from decodax.types import PyTree

Numbers = float | Sequence[float] | np.ndarray | jax.Array


class DraftStep(NamedTuple):
  """What a controller sees of the draft just made."""

  index: jax.Array  # i32[] drafts made this round, this one included
  token: jax.Array  # i32[B] the draft
  logits: jax.Array  # f32[B, V] the model's, before penalties and warping, that it was drawn from
  hidden: jax.Array  # f[B, hidden] what the head multiplied; it has not read the draft itself


class Feedback(NamedTuple):
  """What became of a round's drafts."""

  num_drafted: jax.Array  # i32[B] nodes that were proposed
  num_accepted: jax.Array  # i32[B]
  num_tested: jax.Array  # i32[B] depths at which the target judged a draft: accepted ones, and the
  # one at which it rejected; drafts below a rejection were not tested
  live: jax.Array  # bool[B] rows that emitted anything


class Controller(NamedTuple):
  """Decides how much to draft. Pure functions around a state whose leaves are [B, ...]."""

  init: Callable[..., PyTree]
  """(batch_size) -> the controller's state."""
  start: Callable[..., tuple[jax.Array, PyTree]]
  """(params, ctl, state: DecodeState) -> i32[B] drafts to make at most this round, ctl. The drafter
  clips the limit to [min_drafts, its own maximum]. `params` is `Params.controller`."""
  should_stop: Callable[..., tuple[jax.Array, PyTree]]
  """(params, ctl, step: DraftStep) -> bool[B] whether this draft is the round's last, ctl."""
  update: Callable[..., PyTree]
  """(params, ctl, feedback: Feedback) -> ctl. Rows that are not live keep what they had."""
  min_drafts: int = 1  # drafts made whatever the controller says; 0 allows rounds without any
  lengths: tuple[int, ...] = ()  # numbers of drafts worth a compiled width; () means powers of two


Score = Callable[[PyTree, DraftStep], jax.Array]
"""(params, step) -> f32[B], a predicted probability of acceptance."""


def feedback_of(observation: Observation) -> Feedback:
  """Returns what became of a round's drafts, for chains and trees."""
  proposal, verdict = observation.proposal, observation.verdict
  last = jnp.take_along_axis(verdict.path, verdict.num_accepted[:, None], axis=1)[:, 0]
  rejected = trees.children_of(proposal, last).any(-1)
  return Feedback(
    num_drafted=proposal.valid.sum(-1, dtype=jnp.int32) - 1,
    num_accepted=verdict.num_accepted,
    num_tested=verdict.num_accepted + rejected,
    live=observation.num_emitted > 0,
  )


def widths_of(controller: Controller, max_drafts: int) -> tuple[int, ...]:
  """Returns the block widths worth compiling for at most `max_drafts` drafts, the root included."""
  lengths = controller.lengths or [2**i for i in range(max_drafts.bit_length())]
  lengths = {length for length in lengths if controller.min_drafts <= length < max_drafts}
  return tuple(length + 1 for length in sorted({*lengths, max_drafts}))


def keep_rows(rows: jax.Array, new: PyTree, old: PyTree) -> PyTree:
  """Returns `new` in rows bool[B] and `old` elsewhere; every leaf is [B, ...]."""
  return jax.tree.map(
    lambda a, b: jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - 1)), a, b), new, old
  )


# --- A length settled before the round -----------------------------------------------------------


def fixed(num_drafts: int) -> Controller:
  """Returns the controller that always drafts `num_drafts` tokens; 0 is plain decoding.

  Raises:
    ValueError: if it is negative.
  """
  if num_drafts < 0:
    raise ValueError(f'num_drafts must be at least 0: {num_drafts=}')
  return Controller(
    init=lambda batch_size: (),
    start=lambda params, ctl, state: (jnp.full_like(state.length, num_drafts), ctl),
    should_stop=_never,
    update=_learn_nothing,
    min_drafts=min(num_drafts, 1),
    lengths=(num_drafts,),
  )


def optimal_length(acceptance: Numbers, times_ms: Numbers) -> Controller:
  """Returns the controller of the one length with the most tokens per second, as measured.

  Args:
    acceptance: f[] or f[G]: the probability that a draft is accepted given that all before it were,
      the same everywhere or by position.
    times_ms: f[G + 1], entry g the time of a round with g drafts, as from `round_times_ms`.

  Raises:
    ValueError: if the two disagree about G.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, section 3.5.
  """
  times = np.asarray(times_ms, np.float64)
  acceptance = np.asarray(acceptance, np.float64)
  if times.ndim != 1 or not len(times):
    raise ValueError(f'times_ms must hold the times of 0, 1, .. drafts: {times.shape=}')
  if acceptance.shape not in ((), (len(times) - 1,)):
    raise ValueError(f'acceptance must be one number, or one per draft: {acceptance.shape=}')
  by_position = np.broadcast_to(acceptance, len(times) - 1)
  tokens = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(by_position))])
  return fixed(int(np.argmax(tokens / times)))


def additive(
  max_drafts: int, *, start: int = 4, increase: int = 2, decrease: int = 1
) -> Controller:
  """Returns the controller that drafts more after full acceptance and less after a rejection.

  Args:
    max_drafts: the most it goes up to.
    start: drafts of the first round.
    increase: added when every draft was accepted.
    decrease: subtracted otherwise, down to 1.

  Source: SpecDec++, arXiv:2405.19715, the heuristic baseline of its code.
  """

  def update(params, ctl, feedback):
    del params
    grown = jnp.minimum(ctl + increase, max_drafts)
    shrunk = jnp.maximum(ctl - decrease, 1)
    return jnp.where(feedback.num_accepted == feedback.num_drafted, grown, shrunk)

  return Controller(
    init=lambda batch_size: jnp.full((batch_size,), min(start, max_drafts), jnp.int32),
    start=lambda params, ctl, state: (ctl, ctl),
    should_stop=_never,
    update=update,
  )


class Posterior(NamedTuple):
  """What a row has seen of its drafts: Beta counts beyond the prior."""

  accepted: jax.Array  # f32[B]
  rejected: jax.Array  # f32[B]


def online(
  times_ms: Numbers,
  lengths: Sequence[int] = (0, 1, 2, 4, 8),
  *,
  prior: tuple[float, float] = (2.0, 1.0),
  memory: float = 0.98,
  value_fn: Callable[..., jax.Array] = theory.expected_tokens,
) -> Controller:
  """Returns the controller that learns each row's acceptance and picks the best of a few lengths.

  The acceptance has a Beta posterior per row. A round adds its accepted drafts and, if the target
  rejected one, that one; drafts below a rejection were never tested and count for nothing. The row
  takes the length of most expected tokens per millisecond at the posterior's mean.

  Args:
    times_ms: f[A], the time of a round with each length, in any unit.
    lengths: numbers of drafts to choose from, each a compiled width of the target call; 0 is a
      round without drafting.
    prior: Beta parameters that the row starts with, as drafts accepted and rejected.
    memory: factor on the counts per round. Below 1 a row follows a text that changes, and a row
      that stopped drafting returns to the prior in time and tries again.
    value_fn: (acceptance f32[B, A], lengths f32[B, A]) -> f32[B, A], expected tokens of a round;
      for a tree, give one that says what so many of its nodes are worth.

  Raises:
    ValueError: if times and lengths do not match, or an option is out of range.

  Source: our own; the closed form of the value is Fast Inference from Transformers via Speculative
  Decoding, arXiv:2211.17192, equation 1.
  """
  choices = np.asarray(lengths, np.int32)
  times = np.asarray(times_ms, np.float32)
  if choices.ndim != 1 or times.shape != choices.shape or not len(choices):
    raise ValueError(f'there must be one time per length: {times.shape=}, {choices.shape=}')
  if (choices < 0).any() or (np.diff(choices) <= 0).any() or (times <= 0).any():
    raise ValueError(
      f'lengths must rise from 0 or more, times be positive: {lengths=}, {times_ms=}'
    )
  if min(prior) <= 0 or not 0 < memory <= 1:
    raise ValueError(f'prior must be positive and memory in (0, 1]: {prior=}, {memory=}')

  def init(batch_size):
    return Posterior(*(jnp.zeros((batch_size,), jnp.float32) for _ in range(2)))

  def start(params, ctl, state):
    del params, state
    acceptance = jnp.broadcast_to(posterior_mean(ctl, prior)[:, None], (len(ctl[0]), len(choices)))
    drafts = jnp.broadcast_to(jnp.asarray(choices, jnp.float32)[None], acceptance.shape)
    rate = value_fn(acceptance, drafts) / jnp.asarray(times)[None]
    return jnp.asarray(choices)[jnp.argmax(rate, axis=-1)], ctl

  return Controller(
    init=init,
    start=start,
    should_stop=_never,
    update=lambda params, ctl, feedback: _count(ctl, feedback, memory),
    min_drafts=min(int(choices[0]), 1),
    lengths=tuple(int(length) for length in choices),
  )


def posterior_mean(posterior: Posterior, prior: tuple[float, float]) -> jax.Array:
  """Returns f32[B], the mean acceptance after what was seen, from Beta parameters `prior`."""
  accepted = prior[0] + posterior.accepted
  return accepted / (accepted + prior[1] + posterior.rejected)


def round_times_ms(
  curve: theory.CostCurve, max_drafts: int, draft_step_ms: float, overhead_ms: float = 0.0
) -> np.ndarray:
  """Returns f64[G + 1], the time of a round with 0, 1, .. `max_drafts` drafts in a chain.

  A round without drafts is one plain target call and has no overhead. NaN where the curve was not
  measured.

  Source: our own.
  """
  drafts = np.arange(max_drafts + 1)
  call_ms = np.asarray(theory.call_time_ms(curve, drafts + 1), np.float64)
  return call_ms + np.where(drafts > 0, drafts * draft_step_ms + overhead_ms, 0.0)


def cost_ratio_times(cost_ratio: float, max_drafts: int) -> np.ndarray:
  """Returns f64[G + 1], the time of a round with 0, 1, .. drafts, in units of a target call.

  For targets whose call costs the same at any width.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, theorem 3.8.
  """
  return 1.0 + cost_ratio * np.arange(max_drafts + 1)


# --- A stop while drafting -----------------------------------------------------------------------


def confidence(threshold: float = 0.6, *, min_drafts: int = 1) -> Controller:
  """Returns the controller that stops after a draft whose law had no probability above `threshold`.

  The law is the drafter's at temperature 1. What counts is its largest probability and not that of
  the token that was drawn, though both would be exact.

  Source: Kangaroo, arXiv:2404.18911 (0.6); Draft & Verify, arXiv:2309.08168.
  """
  return _stop_when(lambda step: largest_probability(step.logits) < threshold, min_drafts)


def entropy(threshold: float, *, min_drafts: int = 1) -> Controller:
  """Returns the controller that stops after a draft whose law had too much entropy.

  That is, above `threshold`, in nats. The law is the drafter's at temperature 1.

  Source: AdaEDL, arXiv:2410.18351, where the entropy bounds the acceptance from below.
  """
  return _stop_when(lambda step: _entropy(step.logits) > threshold, min_drafts)


def cumulative(
  threshold: float = 0.3, *, score_fn: Score | None = None, min_drafts: int = 1
) -> Controller:
  """Returns the controller that stops once the whole chain is likely enough to fail somewhere.

  That is, after the draft at which the product of the scores falls below `threshold`.

  Args:
    threshold: on the product.
    score_fn: (params, step) -> f32[B], the predicted acceptance of the draft just made; None is the
      largest probability of its law.
    min_drafts: drafts made in any case.

  Source: our own; for trees the same quantity is the node value of EAGLE-2, arXiv:2406.16858.
  """
  score = score_fn or (lambda params, step: largest_probability(step.logits))

  def should_stop(params, ctl, step):
    product = ctl * score(params, step)
    return product < threshold, product

  return Controller(
    init=_ones,
    start=_restart,
    should_stop=should_stop,
    update=_learn_nothing,
    min_drafts=min_drafts,
  )


def specdec_pp(score_fn: Score, *, threshold: float = 0.3, min_drafts: int = 2) -> Controller:
  """Returns the controller that stops once a rejection is likely, by a trained acceptance head.

  The head judges a draft from the hidden state that has read it, which exists one draft later. So
  the newest draft is not judged yet when it is decided whether to go on: after draft s the product
  is over the drafts 1 .. s - 1, and drafting stops if 1 minus it exceeds `threshold`.

  Args:
    score_fn: (params, step) -> f32[B], the predicted acceptance of the draft *before* `step.token`,
      from `step.hidden`, which has read it. Not used at the first draft, which has none before it.
    threshold: on the predicted probability of at least one rejection.
    min_drafts: drafts made in any case.

  Source: SpecDec++, arXiv:2405.19715, section 3: the optimal policy is such a threshold.
  """

  def should_stop(params, ctl, step):
    judged = jnp.where(step.index > 1, score_fn(params, step), 1.0)
    product = ctl * judged
    return 1 - product > threshold, product

  return Controller(
    init=_ones,
    start=_restart,
    should_stop=should_stop,
    update=_learn_nothing,
    min_drafts=min_drafts,
  )


class GainState(NamedTuple):
  """What `expected_gain` carries."""

  reach: jax.Array  # f32[B] predicted probability that all drafts of this round are accepted
  posterior: Posterior
  tokens: jax.Array  # f32[B] emitted lately
  time: jax.Array  # f32[B] spent on them, in target calls


def expected_gain(
  cost_ratio: float,
  *,
  score_fn: Score | None = None,
  prior: tuple[float, float] = (4.0, 2.0),
  memory: float = 0.95,
  min_drafts: int = 1,
) -> Controller:
  """Returns the controller that drafts on while one more draft earns more than its time does.

  One more draft is accepted with the probability that all so far are, by the product of their
  scores, times the row's mean acceptance. It costs `cost_ratio` target calls, in which the row
  would otherwise emit `cost_ratio` times the tokens per target call that it lately reached: the
  marginal rule that maximises tokens per time in the long run.

  Args:
    cost_ratio: time of one draft step in units of one target call.
    score_fn: (params, step) -> f32[B], the predicted acceptance of the draft just made; None is the
      largest probability of its law.
    prior: Beta parameters of the mean acceptance, as drafts accepted and rejected.
    memory: factor per round on what was counted.
    min_drafts: drafts made in any case.

  Source: our own; the costs are those of Fast Inference from Transformers via Speculative Decoding,
  arXiv:2211.17192, theorem 3.8.
  """
  score = score_fn or (lambda params, step: largest_probability(step.logits))

  def init(batch_size):
    zeros = jnp.zeros((batch_size,), jnp.float32)
    # As if one plain call had been made: a rate of 1, soon outweighed.
    return GainState(zeros + 1, Posterior(zeros, zeros), zeros + 1, zeros + 1)

  def start(params, ctl, state):
    del params
    return jnp.full_like(state.length, _NO_LIMIT), ctl._replace(reach=jnp.ones_like(ctl.reach))

  def should_stop(params, ctl, step):
    reach = ctl.reach * score(params, step)
    gain = reach * posterior_mean(ctl.posterior, prior)
    return gain < cost_ratio * ctl.tokens / ctl.time, ctl._replace(reach=reach)

  def update(params, ctl, feedback):
    del params
    return ctl._replace(
      posterior=_count(ctl.posterior, feedback, memory),
      tokens=memory * ctl.tokens + feedback.num_accepted + 1,
      time=memory * ctl.time + 1 + cost_ratio * feedback.num_drafted,
    )

  return Controller(init, start, should_stop, update, min_drafts=min_drafts)


def largest_probability(logits: jax.Array) -> jax.Array:
  """Returns f32[B], the probability of the most likely token under logits f32[B, V]."""
  return jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))


# --- Shared pieces -------------------------------------------------------------------------------

_NO_LIMIT = np.iinfo(np.int32).max


def _entropy(logits):
  log_law = jax.nn.log_softmax(logits, axis=-1)
  law = jnp.exp(log_law)
  return -jnp.sum(jnp.where(law > 0, law * log_law, 0), axis=-1)


def _count(posterior, feedback, memory):
  return Posterior(
    accepted=memory * posterior.accepted + feedback.num_accepted,
    rejected=memory * posterior.rejected + feedback.num_tested - feedback.num_accepted,
  )


def _stop_when(rule, min_drafts):
  return Controller(
    init=lambda batch_size: (),
    start=lambda params, ctl, state: (jnp.full_like(state.length, _NO_LIMIT), ctl),
    should_stop=lambda params, ctl, step: (rule(step), ctl),
    update=_learn_nothing,
    min_drafts=min_drafts,
  )


def _ones(batch_size):
  return jnp.ones((batch_size,), jnp.float32)


def _restart(params, ctl, state: DecodeState):
  del params
  return jnp.full_like(state.length, _NO_LIMIT), jnp.ones_like(ctl)


def _never(params, ctl, step):
  del params
  return jnp.zeros_like(step.token, bool), ctl


def _learn_nothing(params, ctl, feedback):
  del params, feedback
  return ctl

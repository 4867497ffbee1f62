"""SpecDec++: learn how likely the target is to accept a draft, from what the drafter thought.

The data are the drafter's own rounds. It drafts for prompts of the batch with the target verifying,
as in decoding, and every draft that it has read itself becomes an example: its hidden state after
reading the draft, and the probability min(1, p/q) with which the target accepts it there. The
paper samples one draft at each token of a text instead, and reads a mixture of both; here the
states are those that decoding meets, and count as often as it meets them, whatever the drafter.

Source: SpecDec++, arXiv:2405.19715, section 3.2.
"""

import json
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

import decodax
from decodax import controllers
from decodax import drafters
from decodax import sampling as sampling_lib
from decodax import verifiers
from decodax.controllers import Controller
from decodax.types import Drafter
from decodax.types import Params
from decodax.types import PyTree
from models.adapter import as_model
from models.heads import head_expander
from models.heads import head_taps
from models.heads import head_width
from models.heads.acceptance import AcceptanceConfig
from models.heads.acceptance import AcceptanceHead
from models.heads.acceptance import specdec_controller
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objective import get_objective


class Judged(nnx.Module):
  """A trained chain drafter, which stays as it is, and the acceptance head that is learnt."""

  def __init__(self, drafter: Any, acceptance: AcceptanceHead):
    self.drafter = drafter
    self.acceptance = acceptance


def make_objective(
  *,
  drafter: str = '',
  num_blocks: int = 3,
  reject_weight: float = 6.0,
  collect_drafts: int = 8,
  rounds: int = 8,
  temperature: float = 1.0,
  num_drafts: int = 8,
  threshold: float = 0.3,
  min_drafts: int = 2,
) -> Objective:
  """Returns the weighted binary cross entropy of predicted acceptance.

  Args:
    drafter: folder of a trained head that drafts chains.
    num_blocks: residual blocks of the acceptance head.
    reject_weight: how much more a rejection counts than an acceptance. It divides the odds of
      acceptance that the stop rule sees, so it goes with `threshold`.
    collect_drafts: drafts of a round while collecting.
    rounds: rounds collected a step, from one place of each row.
    temperature: at which drafts are drawn and judged while collecting.
    num_drafts: the most drafts of a round when decoding.
    threshold: drafting stops at a predicted probability of a rejection above this.
    min_drafts: drafts made in any case when decoding.
  """

  def init(rngs, target, token_counts):
    del token_counts
    from train.export import load_head  # not at the top: it imports objectives

    if not drafter:
      raise ValueError('the acceptance objective needs the folder of a trained head: drafter=')
    head = load_head(drafter, target).head
    config = AcceptanceConfig(head_width(head), num_blocks)
    return Judged(head, AcceptanceHead(config, rngs=rngs))

  def loss(head, target, tape, rng_key, step) -> Loss:
    del step
    data = collect(
      head.drafter, target, tape, rng_key,
      num_drafts=collect_drafts, rounds=rounds, temperature=temperature,
    )  # fmt: skip
    return acceptance_loss(head.acceptance, data, reject_weight)

  def make_drafter(head, target):
    rule = specdec_controller(head.acceptance, threshold=threshold, min_drafts=min_drafts)
    expander = head_expander(head.drafter, target)
    return drafters.chain_drafter(expander, num_drafts=num_drafts, controller=rule)

  def place(target, head) -> Params:
    return Params(target, drafter=head['drafter'], controller=head['acceptance'])

  return Objective(
    init, loss, make_drafter, verifiers.speculative, place,
    taps=lambda config: _taps(drafter, config),
    trainable=nnx.All(nnx.Param, nnx.PathContains('acceptance')),
  )  # fmt: skip


def _taps(folder, config) -> tuple[int, ...]:
  """Returns the streams that the drafter in a folder reads, for the decoding while training."""
  facts = json.loads((pathlib.Path(folder) / 'config.json').read_text(encoding='utf-8'))
  return get_objective(facts['objective'], facts['options']).taps(config)


class Examples(NamedTuple):
  """Drafts that the drafter has read. Axes: `R` rounds, `B` rows, `D` drafts less the last."""

  hidden: jax.Array  # f32[R, B, D, hidden] after reading the draft
  accepted: jax.Array  # f32[R, B, D] the probability of acceptance, min(1, p/q)
  drafted: jax.Array  # f32[R, B, D] q of the draft: the predictor to beat
  weights: jax.Array  # f32[R, B, D] the probability that the drafts before were all accepted


def acceptance_loss(head: AcceptanceHead, data: Examples, reject_weight: float) -> Loss:
  """Returns the cross entropy with soft labels, rejections counting `reject_weight` times.

  The metrics tell how far the prediction is from the labels, in nats, and how far are the two
  predictors that need no training: the draft's own probability, and the mean of the labels.

  Source: SpecDec++, arXiv:2405.19715, equation 6.
  """
  log_law = jax.nn.log_softmax(head(data.hidden))
  rejected = 1 - data.accepted
  losses_here = -reject_weight * rejected * log_law[..., 0] - data.accepted * log_law[..., 1]
  mass = reject_weight * rejected + data.accepted

  def mean(values):
    return losses.masked(values, data.weights)

  # What the head says of acceptance once the odds are freed of the weight of rejections.
  predicted = jax.nn.sigmoid(log_law[..., 1] - log_law[..., 0] + jnp.log(reject_weight))
  constant = mean(data.accepted).value
  return Loss(
    mean(losses_here).total,
    mean(mass).total,
    {
      'divergence': mean(binary_divergence(data.accepted, predicted)),
      'divergence_of_q': mean(binary_divergence(data.accepted, data.drafted)),
      'divergence_of_constant': mean(binary_divergence(data.accepted, constant)),
      'accepted': mean(data.accepted),
      'predicted': mean(predicted),
    },
  )


def binary_divergence(wanted: jax.Array, predicted: jax.Array) -> jax.Array:
  """Returns KL(Bernoulli(wanted) || Bernoulli(predicted)), f32[...]."""
  predicted = jnp.clip(predicted, 1e-6, 1 - 1e-6)
  entropy = jax.scipy.special.xlogy(wanted, wanted) + jax.scipy.special.xlogy(
    1 - wanted, 1 - wanted
  )
  return entropy - wanted * jnp.log(predicted) - (1 - wanted) * jnp.log1p(-predicted)


def collect(
  head: Any, target, tape, rng_key: jax.Array, *, num_drafts: int, rounds: int, temperature: float
) -> Examples:
  """Returns the drafts of some rounds of decoding, from a place in each row's first document.

  Args:
    head: a trained drafter.
    target: its target.
    tape: tokens i32[B, T] and segments.
    rng_key: for places, drafts and decisions.
    num_drafts: drafts of a round.
    rounds: rounds.
    temperature: of sampling, above 0.
  """
  drafter = _recording(head_expander(head, target), head_width(head), num_drafts)
  model = as_model(target, taps=head_taps(head))
  params = Params(*jax.lax.stop_gradient((nnx.state(target), nnx.state(head))))
  request = _request(tape, rng_key, rounds * (num_drafts + 1), temperature)
  state = decodax.init_state(params, request, model=model, drafter=drafter)
  state = decodax.prefill(params, state, model=model, drafter=drafter)

  def one_round(state, _):
    live = state.result == decodax.Result.RUNNING
    state, info = decodax.speculative_step(
      params, state, model=model, drafter=drafter, verifier=verifiers.speculative
    )
    return state, _examples(state, info.proposal, live)

  _, examples = lax.scan(one_round, state, None, length=rounds)
  return lax.stop_gradient(examples)


def _request(tape, rng_key, room, temperature):
  batch_size, length = tape.tokens.shape
  document = jnp.sum(tape.segments == 1, axis=1)
  keys = jax.random.split(rng_key, batch_size + 1)
  place = jax.random.uniform(keys[-1], (batch_size,))
  prompt = jnp.clip(jnp.floor(place * document), 2, length).astype(jnp.int32)
  return decodax.Request(
    tokens=jnp.pad(tape.tokens, ((0, 0), (0, room))),
    prompt_length=prompt,
    rng_keys=keys[:-1],
    sampling=decodax.Sampling(jnp.full((batch_size,), temperature, jnp.float32)),
    max_new_tokens=jnp.full((batch_size,), room, jnp.int32),
    eos_ids=jnp.full((batch_size, 1), -1, jnp.int32),
  )


class _Recorded(NamedTuple):
  """A drafter's state, and what the target said about its last proposal."""

  inner: PyTree
  logits: jax.Array  # f32[B, N, V]


def _recording(expander, width, num_drafts) -> Drafter:
  """Returns a drafter of whole chains whose state shows hidden states and the target's logits."""
  recorder = _recorder(width, num_drafts)
  inner = drafters.chain_drafter(expander, num_drafts=num_drafts, controller=recorder)

  def init(params, request, capacity):
    shape = (request.tokens.shape[0], num_drafts + 1, expander.vocab_size)
    return _Recorded(inner.init(params, request, capacity), jnp.zeros(shape))

  def propose(params, state, **options):
    proposal, own = inner.propose(params, state._replace(drafter=state.drafter.inner), **options)
    return proposal, state.drafter._replace(inner=own)

  def prefill(params, own, *args):
    return own._replace(inner=inner.prefill(params, own.inner, *args))

  def observe(params, own, observation, state):
    return _Recorded(
      inner.observe(params, own.inner, observation, state),
      sampling_lib.warp(observation.logits, state.sampling),
    )

  shape = inner.shape._replace(needs_logits=True, widths=())
  return Drafter(shape, init, prefill, propose, observe)


def _recorder(width, num_drafts) -> Controller:
  """Returns a controller that never stops and keeps the hidden states f32[B, D, hidden] it sees."""

  def init(batch_size):
    return jnp.zeros((batch_size, num_drafts, width), jnp.float32)

  def should_stop(params, ctl, step):
    del params
    here = (jnp.arange(num_drafts) == step.index - 1)[None, :, None]
    return jnp.zeros_like(step.token, bool), jnp.where(here, step.hidden[:, None], ctl)

  fixed = controllers.fixed(num_drafts)
  return fixed._replace(init=init, should_stop=should_stop)


def _examples(state, proposal, live) -> Examples:
  """Returns the examples of one round, [B, D - 1, ...]: the last draft is never read."""
  drafts = proposal.tokens[:, 1:, None]

  def chance(logits):
    law = jax.nn.log_softmax(logits[:, :-1])
    return jnp.take_along_axis(law, drafts, axis=-1)[:, :-1, 0]

  log_p, log_q = chance(state.drafter.logits), chance(proposal.laws)
  hidden = state.drafter.inner.controller[:, 1:]
  accepted = jnp.minimum(jnp.exp(log_p - log_q), 1.0)
  reached = jnp.cumprod(jnp.pad(accepted[:, :-1], ((0, 0), (1, 0)), constant_values=1.0), axis=1)
  return Examples(hidden, accepted, jnp.exp(log_q), reached * live[:, None])

"""A filter that sees how the predictions of two slots go together, in place of confidences alone.

An extension of Learn2PD that is ours. A slot's own confidence does not say whether its prediction
is final where an answer leaves a choice: of two masked slots that would both take the same token
one will change, and of two that each give the other's token no chance both may stay. So every two
slots exchange a message made of what each would make of the other's token.

Axes: `B` batch, `W` window slots, `N` rounds of messages, `H` hidden size, `F` facts of a slot, `P`
facts of a pair.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decodax.diffusion.types import View

NUM_SLOT_FACTS, NUM_PAIR_FACTS = 6, 5
REACH = 8  # distances between slots are told apart up to here
_FLOOR = -12.0  # of log probabilities


class PairFilter(NamedTuple):
  """A small network over slots and pairs of slots, for windows of any width."""

  slot: jax.Array  # f32[F, H]
  slot_bias: jax.Array  # f32[H]
  send: jax.Array  # f32[N, H, H]
  receive: jax.Array  # f32[N, H, H]
  pair: jax.Array  # f32[N, P, H]
  distance: jax.Array  # f32[N, 2 REACH + 1, H] also the bias of a message
  update: jax.Array  # f32[N, 2 H, H] of the mean and the maximum of messages
  update_bias: jax.Array  # f32[N, H]
  outer: jax.Array  # f32[H]
  outer_bias: jax.Array  # f32[]


class Evidence(NamedTuple):
  """What a `PairFilter` sees of one step."""

  slots: jax.Array  # f32[B, W, F]
  pairs: jax.Array  # f32[B, W, W, P] of the slot that hears and the slot that speaks


def init_pair_filter(key: jax.Array, hidden_size: int = 24, num_rounds: int = 2) -> PairFilter:
  """Returns a random filter; with the defaults it has 5905 parameters.

  Without rounds of messages it judges each slot by itself.
  """
  keys = iter(jax.random.split(key, 7))
  size, rounds = hidden_size, num_rounds

  def normal(*shape):
    return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

  return PairFilter(
    slot=normal(NUM_SLOT_FACTS, size),
    slot_bias=jnp.zeros(size),
    send=normal(rounds, size, size),
    receive=normal(rounds, size, size),
    pair=normal(rounds, NUM_PAIR_FACTS, size),
    distance=normal(rounds, 2 * REACH + 1, size),
    update=normal(rounds, 2 * size, size),
    update_bias=jnp.zeros((rounds, size)),
    outer=normal(size, 1)[:, 0],
    outer_bias=jnp.zeros(()),
  )


def gather_evidence(view: View) -> Evidence:
  """Returns what is to be known of each slot and of each two, from one pass over W^2 logits.

  A slot's token is its candidate while it is masked, and then what stands there. Facts of a slot:
  is it to be filled; its candidate's probability, that as log odds, the runner-up's, the entropy;
  the share of slots still to be filled. Facts of a pair: the log probability that the one gives the
  other's token, and the other way round; whether the tokens are the same; whether the other is
  still to be filled, and surer.
  """
  open_ = view.eligible.astype(jnp.float32)
  masked = view.tokens == view.mask_id
  token = jnp.where(masked, view.candidates, view.tokens)
  chance = view.confidence
  odds = jnp.log(jnp.maximum(chance, 1e-9)) - jnp.log1p(-jnp.minimum(chance, 1 - 1e-7))
  facts = (jnp.ones_like(chance), chance, jnp.clip(odds, -10, 10) / 10, view.summary.second,
           view.summary.entropy)  # fmt: skip
  share = jnp.broadcast_to(open_.mean(-1, keepdims=True), open_.shape)
  slots = jnp.stack([*(open_ * fact for fact in facts), share], axis=-1)

  same = token[:, :, None] == token[:, None, :]
  others = jnp.broadcast_to(token[:, None, :], same.shape)
  log_p = jnp.take_along_axis(view.logits, others, axis=2)
  log_p = jnp.where(masked[:, :, None], log_p - view.summary.log_normalizer[:, :, None],
                    jnp.where(same, 0, _FLOOR))  # fmt: skip
  log_p = jnp.maximum(log_p, _FLOOR) / -_FLOOR
  speaks = jnp.broadcast_to(view.eligible[:, None, :], same.shape)
  order = jnp.where(view.eligible, chance, 2)
  surer = order[:, None, :] > order[:, :, None]
  pairs = (log_p, jnp.swapaxes(log_p, 1, 2), same, speaks, surer)
  return Evidence(slots, jnp.stack([fact.astype(jnp.float32) for fact in pairs], axis=-1))


def pair_filter_logits(params: PairFilter, evidence: Evidence) -> jax.Array:
  """Returns f32[B, W], the logit that each slot's prediction is final."""
  hidden = jax.nn.relu(evidence.slots @ params.slot + params.slot_bias[None, None])
  index = jnp.arange(hidden.shape[1])
  offset = jnp.clip(index[None, :] - index[:, None], -REACH, REACH) + REACH
  itself = (index[None, :] == index[:, None])[None, :, :, None]
  for each in range(params.send.shape[0]):
    spoken = (hidden @ params.send[each])[:, None]
    heard = (hidden @ params.receive[each])[:, :, None]
    known = evidence.pairs @ params.pair[each] + params.distance[each][offset][None]
    message = jnp.where(itself, 0, jax.nn.relu(spoken + heard + known))
    pooled = jnp.concatenate([message.mean(2), message.max(2)], axis=-1)
    hidden = hidden + jax.nn.relu(
      pooled @ params.update[each] + params.update_bias[each][None, None]
    )
  return hidden @ params.outer + params.outer_bias

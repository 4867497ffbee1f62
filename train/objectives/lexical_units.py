"""A target taught to answer paddings: several tokens at once where it is sure of them (LUD).

Paddings are read behind places of a text that are drawn anew each step, as `drafters.lexical_units`
reads them behind the last token. All of them go through one pass with the text itself.

Axes: `B` rows, `T` tokens, `A` places, `D` paddings behind each, `V` vocabulary.
"""

import jax
from jax import lax
import jax.numpy as jnp

from decodax import drafters
from decodax import verifiers
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives import _own
from train.tape import Tape
from train.tape import shift_left
from train.tape import supervised


def make_objective(
  *,
  pad_id: int = 0,
  num_drafts: int = 3,
  num_places: int = 32,
  likelihood: float = 0.5,
  confidence: float = 0.6,
  unit_weight: float = 1.0,
) -> Objective:
  """Returns next-token cross entropy on a text and on paddings, the latter inside lexical units.

  A lexical unit is a run of tokens that the target, as it was, found at least `likelihood` likely
  given the text before each. Padding i behind token t learns token t + 1 + i if t + 2 .. t + 1 + i
  continue a unit.

  Args:
    pad_id: the padding token.
    num_drafts: D, paddings read at once.
    num_places: A, places of a row with paddings.
    likelihood: what makes a unit.
    confidence: from which likelihood on an answer is drafted when decoding.
    unit_weight: of the losses at paddings.

  Raises:
    ValueError: if num_drafts or num_places is below 1.

  Source: Lexical Unit Decoding, arXiv:2405.15208, sections 3.1 and 3.2.
  """
  if min(num_drafts, num_places) < 1:
    raise ValueError(f'need at least 1: {num_drafts=}, {num_places=}')

  def loss(head, target, tape, rng_key, step) -> Loss:
    del step
    places = draw_places(tape, rng_key, num_places)
    tokens, positions, mask = with_paddings(tape, places, pad_id, num_drafts)
    hidden = head(tokens, positions, mask)[0].hidden
    length = tape.tokens.shape[1]
    labels, _ = shift_left(tape.tokens, 1, tape.segments)
    text_weight = supervised(tape, 1)
    text_loss, _ = losses.label_losses(head.unembed, hidden[:, :length], labels)
    likely, _ = losses.label_losses(target.unembed, tape.hidden, labels)
    in_unit = (jnp.exp(-lax.stop_gradient(likely)) >= likelihood) & (text_weight > 0)
    pad_labels, pad_weight = padding_labels(tape, in_unit, places, num_drafts)
    pad_loss, right = losses.label_losses(head.unembed, hidden[:, length:], pad_labels)
    text = losses.masked(text_loss, text_weight)
    units = losses.masked(pad_loss, pad_weight)
    return Loss(
      total=text.total + unit_weight * units.total,
      weight=text.weight,
      metrics={
        'next_token': text,
        'unit': units,
        'unit_accuracy': losses.masked(right, pad_weight),
      },
    )

  def make_drafter(head, target):
    del head, target
    return drafters.lexical_units(pad_id=pad_id, num_drafts=num_drafts, confidence=confidence)

  def init(rngs, target, token_counts):
    del rngs, token_counts
    return _own.copy_of(target)

  return Objective(
    init=init,
    loss=loss,
    make_drafter=make_drafter,
    verifier=verifiers.coupled,
    place=_own.place,
    is_target=True,
  )


def draw_places(tape: Tape, rng_key: jax.Array, num_places: int) -> jax.Array:
  """Returns i32[B, A], places of each row, any of them alike likely and none twice."""
  draws = jax.random.uniform(rng_key, tape.tokens.shape)
  return lax.top_k(draws, min(num_places, tape.tokens.shape[1]))[1]


def with_paddings(
  tape: Tape, places: jax.Array, pad_id: int, num_drafts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (tokens, positions, mask) of the text with D paddings behind each place.

  The paddings stand behind the text in the row, i32[B, T + A D]; each sees the text up to its
  place, and the paddings of its place up to itself. No token of the text sees a padding.
  """
  batch_size, length = tape.tokens.shape
  num_places = places.shape[1]
  pads = num_places * num_drafts
  step = jnp.tile(jnp.arange(num_drafts, dtype=jnp.int32), num_places)[None]
  origin = jnp.repeat(places, num_drafts, axis=1)  # i32[B, A D]
  tokens = jnp.full((batch_size, pads), pad_id, tape.tokens.dtype)
  positions = jnp.take_along_axis(tape.positions, origin, axis=1) + 1 + step
  text = tape.mask()
  to_text = jnp.take_along_axis(text, origin[:, :, None], axis=1)  # what the place itself sees
  group = jnp.repeat(jnp.arange(num_places), num_drafts)
  causal = (group[:, None] == group[None]) & (step[0][:, None] >= step[0][None])
  to_pads = jnp.broadcast_to(causal, (batch_size, pads, pads))
  mask = jnp.concatenate(
    [
      jnp.pad(text, ((0, 0), (0, 0), (0, pads))),
      jnp.concatenate([to_text, to_pads], axis=2),
    ],
    axis=1,
  )
  return (
    jnp.concatenate([tape.tokens, tokens], axis=1),
    jnp.concatenate([tape.positions, positions], axis=1),
    mask.reshape(batch_size, length + pads, length + pads),
  )


def padding_labels(
  tape: Tape, in_unit: jax.Array, places: jax.Array, num_drafts: int
) -> tuple[jax.Array, jax.Array]:
  """Returns (labels i32[B, A D], weights f32[B, A D]) of the paddings behind each place.

  Padding i of place t answers for token t + 2 + i, and learns it while tokens t + 2 .. t + 2 + i
  are of one unit.

  Args:
    tape: the text.
    in_unit: bool[B, T], at t: was token t + 1 likely, and is it supervised and of t's document?
    places: i32[B, A].
    num_drafts: D.
  """
  length = tape.tokens.shape[1]
  step = jnp.arange(num_drafts)[None, None]
  before = places[:, :, None] + 1 + step  # the token before the label

  def at(array, index):
    flat = jnp.minimum(index, length - 1).reshape(index.shape[0], -1)
    return jnp.take_along_axis(array, flat, axis=1).reshape(index.shape)

  same = at(tape.segments, before) == at(tape.segments, places)[..., None]
  inside = (before + 1 < length) & same
  unbroken = jnp.cumprod(at(in_unit, before) & inside, axis=-1) > 0
  labels = at(tape.tokens, before + 1)
  shape = (places.shape[0], -1)
  return labels.reshape(shape), unbroken.reshape(shape).astype(jnp.float32)

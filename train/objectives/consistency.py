"""A target tuned so that Jacobi iteration settles in few calls: CLLM, Jacobi Forcing, CEED-VLA.

The data are documents of `train.trajectories`: a prompt, then for every window of n tokens a state
of its trajectory and its fixed point. States are read beside the text, at the positions of the
fixed points that they belong to, and one pass over the packed row gives both sides of the loss.

Axes: `B` rows, `T` tokens, `V` vocabulary; n tokens of a window.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from decodax import drafters
from decodax import verifiers
from models.transformer import Transformer
from train import losses
from train.objective import Loss
from train.objective import Objective
from train.objectives import _own
from train.tape import Tape


class Layout(NamedTuple):
  """What each token of a packed row is."""

  is_text: jax.Array  # bool[B, T] of the prompt or of a fixed point
  is_state: jax.Array  # bool[B, T]
  window: jax.Array  # i32[B, T] which window of its document, from 0; -1 in the prompt
  place: jax.Array  # i32[B, T] inside the window, or inside the prompt
  position: jax.Array  # i32[B, T] for the rotary embedding
  segments: jax.Array  # i32[B, T]


def make_objective(
  *,
  window: int = 16,
  noise_windows: int = 1,
  ar_weight: float = 1.0,
  consistency_weight: float = 1.0,
  loss: str = 'global',
  temperature: float = 1.0,
  demonstration: bool = False,
  max_error: float = 0,
) -> Objective:
  """Returns the consistency loss with a next-token loss beside it.

  * *Global* consistency: at every place of a state from its first wrong token on, the law is to be
    what it is at the same place of the fixed point. *Local*: what it is in the next state of the
    iteration, which a second pass reads.
  * *Next token*: cross entropy on the fixed points, so that the target keeps saying what it said.

  With `noise_windows` w above 1, a state sees the states of earlier windows of its group of w in
  place of their text (Jacobi Forcing); with 1 it sees text only (CLLM). With `demonstration`
  windows hold a third part, the labels of a demonstration; where the fixed point errs by more than
  `max_error` token ids the demonstration is learnt instead (mixed labels of CEED-VLA, whose tokens
  are ordinal).

  Args:
    window: n, as the data were collected.
    noise_windows: w.
    ar_weight: of the next-token loss; the published code has 10, for a tuning many times as long.
    consistency_weight: of the consistency loss.
    loss: 'global' or 'local'.
    temperature: of the law that is learnt and of the law that learns it.
    demonstration: the data have a demonstration's tokens, too.
    max_error: the largest mean distance of token ids at which a fixed point is learnt.

  Raises:
    ValueError: for another kind of loss, or sizes below 1.

  Source: CLLMs, arXiv:2403.00835, equations 3 to 5; Jacobi Forcing, arXiv:2512.14681, section 3;
  CEED-VLA, arXiv:2506.13725, section 3.2.
  """
  if loss not in ('global', 'local'):
    raise ValueError(f"loss must be 'global' or 'local': {loss!r}")
  if min(window, noise_windows) < 1:
    raise ValueError(f'need at least 1: {window=}, {noise_windows=}')
  parts = 3 if demonstration else 2

  def total_loss(head, target, tape, rng_key, step) -> Loss:
    del target, rng_key, step
    layout = layout_of(tape, window, parts)
    mask = visible(layout, noise_windows)
    hidden = _read(head, tape.tokens, layout, mask)
    goal = _goal(hidden, head, tape.tokens, layout, mask, window, kind=loss)
    unsettled = wrong_from(tape.tokens, layout, window)
    compared = losses.compare(
      lambda h: head.unembed(h) / temperature,
      lambda h: head.unembed(h) / temperature,
      lax.stop_gradient(goal),
      hidden,
    )
    consistency = losses.masked(compared.loss, unsettled)
    labels, learnt = next_labels(tape.tokens, layout, window, parts, max_error)
    loss_ar, right = losses.label_losses(head.unembed, hidden, labels)
    ar = losses.masked(loss_ar, learnt)
    settles = losses.masked(compared.correct, unsettled)
    return Loss(
      total=consistency_weight * consistency.total + ar_weight * ar.total,
      weight=ar.weight,
      metrics={
        'consistency': consistency,
        'next_token': ar,
        'token_accuracy': losses.masked(right, learnt),
        'settles': settles,
      },
    )

  def make_drafter(head, target):
    del head, target
    return drafters.jacobi(num_drafts=window - 1)

  return Objective(
    init=lambda rngs, target, token_counts: _own.copy_of(_required(target)),
    loss=total_loss,
    make_drafter=make_drafter,
    verifier=verifiers.coupled,
    place=_own.place,
    is_target=True,
  )


def _required(target: Transformer | None) -> Transformer:
  assert target is not None
  return target


def layout_of(tape: Tape, window: int, parts: int = 2) -> Layout:
  """Returns what each token is: unsupervised tokens are a prompt, then windows of parts x n."""
  same = (tape.segments[:, :, None] == tape.segments[:, None]) & (tape.segments > 0)[:, None]
  prompt_length = jnp.sum(same & ~tape.loss_mask[:, None], axis=-1, dtype=jnp.int32)
  behind = tape.positions - prompt_length  # of the prompt's end; negative inside it
  number, rest = jnp.divmod(behind, parts * window)
  part, place = jnp.divmod(rest, window)
  in_prompt, real = behind < 0, tape.segments > 0
  return Layout(
    is_text=real & (in_prompt | (part == 1)),
    is_state=real & ~in_prompt & (part == 0),
    window=jnp.where(in_prompt, -1, number),
    place=jnp.where(in_prompt, tape.positions, place),
    position=jnp.where(in_prompt, tape.positions, prompt_length + number * window + place),
    segments=tape.segments,
  )


def visible(layout: Layout, noise_windows: int) -> jax.Array:
  """Returns bool[B, T, T], which tokens each one sees.

  Text sees the text before it. A state sees the text up to its group of windows, the states of the
  windows before it in the group, and itself, all causally. Other tokens see themselves.
  """

  def pair(array):
    return array[:, :, None], array[:, None]

  (own_w, other_w), (own_p, other_p) = pair(layout.window), pair(layout.place)
  own_text, other_text = pair(layout.is_text)
  own_state, other_state = pair(layout.is_state)
  own_segment, other_segment = pair(layout.segments)
  before = (other_w < own_w) | ((other_w == own_w) & (other_p <= own_p))
  group, other_group = (jnp.floor_divide(w, noise_windows) for w in (own_w, other_w))
  other_group = jnp.where(other_w < 0, -1, other_group)
  text = own_text & other_text & before
  state = own_state & (
    (other_text & (other_group < group)) | (other_state & (other_group == group) & before)
  )
  itself = jnp.eye(layout.place.shape[1], dtype=bool)[None]
  return ((own_segment == other_segment) & (text | state)) | itself


def wrong_from(tokens: jax.Array, layout: Layout, window: int) -> jax.Array:
  """Returns f32[B, T]: 1 at places of a state from its first token that is not settled on."""
  wrong = (tokens != jnp.roll(tokens, -window, axis=1)) & layout.is_state
  seen = jnp.zeros(tokens.shape, bool)
  for back in range(window):  # of the window's own places only
    seen |= jnp.roll(wrong, back, axis=1) & (layout.place >= back)
  return (seen & layout.is_state).astype(jnp.float32)


def next_labels(
  tokens: jax.Array, layout: Layout, window: int, parts: int, max_error: float
) -> tuple[jax.Array, jax.Array]:
  """Returns (i32[B, T] the next token of the text, f32[B, T] 1 where a window's token is next).

  From the last token before a window the next is the first of its fixed point, n places beyond its
  state. With three parts the label is the demonstration's where the fixed point is too far from it.
  """
  last = (layout.place == window - 1) & (layout.window >= 0)
  segments = layout.segments
  ends_prompt = layout.is_text & (layout.window < 0) & (jnp.roll(layout.window, -1, axis=1) == 0)
  crosses = last | ends_prompt
  # Behind a prompt stands a state; behind a fixed point the rest of its window, and then one.
  far = jnp.where(layout.window < 0, window + 1, (parts - 1) * window + 1)
  ahead = jnp.where(crosses, far, 1)
  index = jnp.arange(tokens.shape[1])[None] + ahead
  inside = index < tokens.shape[1]
  index = jnp.minimum(index, tokens.shape[1] - 1)

  def at(array):
    return jnp.take_along_axis(array, index, axis=1)

  labels = at(tokens)
  follows = inside & (at(segments) == segments) & at(layout.is_text) & (at(layout.window) >= 0)
  if parts == 3:
    error = window_error(tokens, layout, window)
    shown = jnp.roll(tokens, -window, axis=1)
    labels = jnp.where(at(error) > max_error, at(shown), labels)
  return labels, (layout.is_text & follows).astype(jnp.float32)


def window_error(tokens: jax.Array, layout: Layout, window: int) -> jax.Array:
  """Returns f32[B, T], at fixed points the mean distance of their ids from the demonstration's."""
  fixed = layout.is_text & (layout.window >= 0)
  gap = jnp.abs(tokens - jnp.roll(tokens, -window, axis=1)) * fixed
  total = jnp.zeros(tokens.shape, jnp.float32)
  for shift in range(-window + 1, window):
    there = layout.place + shift
    inside = (there >= 0) & (there < window)
    total += jnp.where(inside, jnp.roll(gap, -shift, axis=1), 0)
  return jnp.where(fixed, total / window, 0)


def _read(head, tokens, layout, mask):
  return head(tokens, layout.position, mask)[0].hidden


def _goal(hidden, head, tokens, layout, mask, window, *, kind):
  """Returns f[B, T, D], at each place of a state the hidden state whose law is to be learnt."""
  if kind == 'global':
    return jnp.roll(hidden, -window, axis=1)  # the same place of the fixed point
  # The next state: the answers to this one, and in the first place, which only text precedes, what
  # the fixed point has there.
  answers = losses.by_chunk(lambda h: jnp.argmax(head.unembed(h), axis=-1), hidden)
  moved = jnp.where(layout.place > 0, jnp.roll(answers, 1, axis=1), jnp.roll(tokens, -window, 1))
  following = jnp.where(layout.is_state, moved, tokens).astype(tokens.dtype)
  return _read(head, lax.stop_gradient(following), layout, mask)

"""Decoding into a regular language: at every step what is left blank can still be completed.

Because the canvas has a known number of slots, the question whether a partly filled canvas can be
completed is answered exactly: by the states an automaton can be in before each slot, going forward
from the start, and those from which it can still accept, going backward from the end. A slot may
take the tokens that lead from one of the former to one of the latter.

Axes: `B` batch, `L` positions, `W` window slots, `Q` states, `C` token classes, `V` vocabulary.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from decodax.diffusion.automata import Automaton
from decodax.diffusion.loop import draw_tokens
from decodax.diffusion.scores import or_best
from decodax.diffusion.scores import probability_of
from decodax.diffusion.scores import summarize
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View


class _Tables(NamedTuple):
  step: jax.Array  # f32[C, Q, Q] 1 where a class leads from one state to another
  any_step: jax.Array  # f32[Q, Q] 1 where some class does
  classes: jax.Array  # i32[V]
  accepting: jax.Array  # f32[Q]


def constrained(policy: Policy, automaton: Automaton) -> Policy:
  """Returns the policy held to a language: every finished canvas is a word of it.

  In each slot tokens that no completion of the canvas contains get the logit -inf before the policy
  looks. Of the slots it then wants to fill, those are filled, from left to right, with which the
  canvas can still be completed; the others wait for the next step.

  **Sound** (each output is a word of the language, and no canvas with a completion gets stuck).
  Lossy in law: what is drawn is not the network's law given the language.

  A row whose canvas no word fits, for its length or its template, ends with
  `Result.UNSATISFIABLE`.

  Args:
    policy: one that does not take tokens back.
    automaton: over the network's vocabulary.

  Raises:
    ValueError: if the policy takes tokens back, or when used, if the vocabularies differ.

  Source: Constrained Decoding of Diffusion LLMs with Context-Free Grammars, arXiv:2508.10111, for
  regular languages and a canvas of known length.
  """
  if policy.revokes:
    raise ValueError(f'policy {policy.name!r} takes tokens back; a constraint needs what stands')
  tables = _compile(automaton)

  def select(params, state, view: View) -> Selection:
    if view.logits.shape[-1] != len(automaton.classes):
      raise ValueError(
        f'the automaton is for a vocabulary of {len(automaton.classes)}: {view.logits.shape=}'
      )
    before, after = _reachable(tables, view)
    possible = jnp.any((before[:, -1] > 0) & (tables.accepting[None] > 0), axis=-1)
    allowed = _allowed(tables, before, after, view)
    # A row without a way out keeps its logits: it is about to end.
    allowed = allowed | ~possible[:, None, None] | ~view.eligible[:, :, None]
    bound = _bind(view, allowed)
    inner = policy.select(params, state, bound)
    tokens = bound.candidates if inner.tokens is None else inner.tokens
    wanted = or_best(inner.commit, bound.confidence, bound.eligible)
    commit = _admit(tables, before, after, view, wanted, tokens)
    return Selection(commit, inner.state, tokens=tokens, hold=inner.hold, failed=~possible)

  return Policy(
    f'constrained-{policy.name}',
    'sound: every output is a word of the language',
    policy.init,
    select,
    # The policy's own steps, and then at least one slot a step.
    max_steps=lambda width: policy.max_steps(width) + width,
    wants_shadow=policy.wants_shadow,
  )


def _compile(automaton: Automaton) -> _Tables:
  num_states, num_classes = automaton.next.shape
  step = np.zeros((num_classes, num_states, num_states), np.float32)
  for state in range(num_states):
    step[np.arange(num_classes), state, automaton.next[state]] = 1
  step[:, :, -1] = 0  # the dead state leads nowhere
  return _Tables(
    jnp.asarray(step),
    jnp.asarray(step.max(0)),
    jnp.asarray(automaton.classes),
    jnp.asarray(automaton.accepting, jnp.float32),
  )


def _reachable(tables, view):
  """Returns (before f32[B, L + 1, Q], after f32[B, L + 1, Q]), 1 where a state is possible.

  `before[:, i]` are the states in front of position i, `after[:, i]` those there from which the
  rest of the canvas can be accepted.
  """
  batch_size, length = view.sequence.shape
  num_states = len(tables.accepting)
  start = jnp.broadcast_to(jax.nn.one_hot(0, num_states)[None], (batch_size, num_states))
  end = jnp.broadcast_to(tables.accepting[None], (batch_size, num_states))

  def forward(states, index):
    new = _move(tables, states, view, index, turn=False)
    return new, new

  def backward(states, index):
    new = _move(tables, states, view, index, turn=True)
    return new, new

  _, before = lax.scan(forward, start, jnp.arange(length))
  _, after = lax.scan(backward, end, jnp.arange(length), reverse=True)
  before = jnp.concatenate([start[None], before]).swapaxes(0, 1)
  after = jnp.concatenate([after, end[None]]).swapaxes(0, 1)
  return before, after


def _move(tables, states, view, index, *, turn):
  """Returns f32[B, Q], the states across position `index`, forward or, with `turn`, backward."""
  token = view.sequence[:, index]
  inside = (index >= view.canvas_start) & (index < view.canvas_end)
  masked = token == view.mask_id
  step = tables.step[tables.classes[token]]  # f32[B, Q, Q]
  step = jnp.where(masked[:, None, None], tables.any_step[None], step)
  moved = jnp.einsum('bqr,br->bq' if turn else 'bqr,bq->br', step, states)
  return jnp.where(inside[:, None], (moved > 0).astype(states.dtype), states)


def _at_window(states, view, offset):
  """Returns f32[B, W, Q], of states f32[B, L + 1, Q], those at the window's positions + offset."""
  index = jnp.minimum(view.positions + offset, states.shape[1] - 1)
  return jnp.take_along_axis(states, index[:, :, None], axis=1)


def _allowed(tables, before, after, view):
  """Returns bool[B, W, V]: does a completion of the canvas have this token in this slot?"""
  source, target = _at_window(before, view, 0), _at_window(after, view, 1)
  by_class = jnp.einsum('bwq,cqr,bwr->bwc', source, tables.step, target) > 0
  allowed = by_class[:, :, tables.classes]
  return allowed & (jnp.arange(allowed.shape[-1]) != view.mask_id)[None, None]


def _bind(view, allowed):
  """Returns the view of a network that gives no chance to what is not allowed."""
  logits = jnp.where(allowed, view.logits, -jnp.inf)
  # Top-k and its like may have left nothing that is allowed: then the whole law is drawn from.
  laws = jnp.where(allowed, view.laws, -jnp.inf)
  some = jnp.any(laws > -jnp.inf, axis=-1, keepdims=True)
  laws = jnp.where(some, laws, logits)
  summary = summarize(logits)
  candidates = draw_tokens(laws, view)
  return view._replace(
    logits=logits,
    laws=laws,
    summary=summary,
    candidates=candidates,
    confidence=probability_of(logits, summary, candidates),
  )


def _admit(tables, before, after, view, wanted, tokens):
  """Returns bool[B, W], the wanted slots that can be filled together.

  From left to right: `states` are those the automaton can be in once all that was admitted so far
  stands; a slot is admitted if from there its token still leads to the end.
  """
  wanted = wanted & view.eligible

  def visit(states, slot):
    want, token, written, target, inside = slot
    step = tables.step[tables.classes[token]]
    moved = (jnp.einsum('bqr,bq->br', step, states) > 0).astype(states.dtype)
    fits = want & jnp.any((moved > 0) & (target > 0), axis=-1)
    held = tables.step[tables.classes[written]]
    held = jnp.where((written == view.mask_id)[:, None, None], tables.any_step[None], held)
    stays = (jnp.einsum('bqr,bq->br', held, states) > 0).astype(states.dtype)
    new = jnp.where(fits[:, None], moved, stays)
    return jnp.where(inside[:, None], new, states), fits

  # The window may start in the prompt, where nothing moves.
  inside = (view.positions >= view.canvas_start[:, None]) & (
    view.positions < view.canvas_end[:, None]
  )
  slots = (wanted, tokens, view.tokens, _at_window(after, view, 1), inside)
  slots = jax.tree.map(lambda a: a.swapaxes(0, 1), slots)
  _, fits = lax.scan(visit, _at_window(before, view, 0)[:, 0], slots)
  return fits.swapaxes(0, 1)

"""Exact enumeration of what a verifier does, over every decision it can take.

A verifier decides through the methods of `RoundKeys`. `Decisions` stands in for it: it plays one
scripted sequence of decisions per row and multiplies up their probabilities. `enumerate_verdicts`
runs the verifier itself, unjitted, until every script of non-zero probability has been played, so
its result is exact.

Axes: `B` rows, `N` nodes, `D` depth, `V` vocabulary.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import numpy as np

from decodax.types import Proposal
from tests.table_model import sequence_law

_BATCH = 256


class Outcome(NamedTuple):
  """All verdicts of a batch of proposals: one entry per (row, script)."""

  row: np.ndarray  # i64[M] which proposal
  weight: np.ndarray  # f64[M] probability of the script, given the proposal; sums to 1 per row
  num_accepted: np.ndarray  # i64[M]
  tokens: np.ndarray  # i64[M, D + 1] emitted tokens, -1 past the end


class Decisions:
  """Plays scripts in place of random numbers. Not for jitted code.

  A decision is named by its kind, depth and index. A verifier must give probability 0 to
  acceptances that no longer matter, or the enumeration forks on them for nothing. A script keeps
  the probability of every choice in it: a row that has ended may be asked on while others go on,
  and then again, beside others, not.
  """

  def __init__(self, scripts: list[dict]):
    self.scripts = scripts
    self.forks: list[tuple[int, dict]] = []  # (row, script) still to be played
    self.position = self.round = np.zeros(len(scripts), np.int32)

  def accepts(self, probability, depth, index=0):
    chance = np.asarray(probability, np.float64)
    assert np.all((chance >= 0) & (chance <= 1 + 1e-12)), chance
    chance = np.minimum(chance, 1)
    return self._decide('accept', np.stack([1 - chance, chance], -1), depth, index) == 1

  def pick(self, law, depth, index=0):
    law = np.asarray(law, np.float64)
    return self._decide('pick', law / law.sum(-1, keepdims=True), depth, index)

  def pick_coupled(self, logits, depth):
    return self.pick(jax.nn.softmax(np.asarray(logits), axis=-1), depth)

  def _decide(self, kind, laws, depth, index):
    count = len(self.scripts)
    depth, index = (np.broadcast_to(np.asarray(a), (count,)) for a in (depth, index))
    choices = np.zeros(count, np.int32)
    for row, script in enumerate(self.scripts):
      options = np.flatnonzero(laws[row] > 0)
      name = (kind, int(depth[row]), int(index[row]))
      if len(options) == 1:  # certain: nothing to script
        choices[row] = options[0]
        continue
      if name not in script:
        first, *others = ((int(option), float(laws[row, option])) for option in options)
        self.forks += [(row, {**script, name: other}) for other in others]
        script[name] = first
      choices[row] = script[name][0]
    return choices

  def weights(self) -> np.ndarray:
    """Returns f64[B], the probability of each script as far as it has been played."""
    return np.asarray([math.prod(chance for _, chance in s.values()) for s in self.scripts])


def enumerate_verdicts(
  verify: Callable, proposal: Proposal, target_logits, *, max_depth: int
) -> Outcome:
  """Returns every verdict of `verify` on B proposals with its exact probability."""
  todo: list[tuple[int, dict]] = [(row, {}) for row in range(proposal.tokens.shape[0])]
  parts = []
  while todo:
    now, todo = todo[:_BATCH], todo[_BATCH:]
    padded = now + [now[0]] * (_BATCH - len(now))  # one shape, so that operations compile once
    rows = np.asarray([row for row, _ in padded])
    decisions = Decisions([dict(script) for _, script in padded])
    batch, logits = jax.tree.map(lambda a, rows=rows: a[rows], (proposal, target_logits))
    with jax.disable_jit():
      verdict = verify(decisions, batch, logits, max_depth=max_depth)
    num_accepted = np.asarray(verdict.num_accepted)
    tokens = _emitted(np.asarray(batch.tokens), verdict, num_accepted, max_depth)
    part = Outcome(rows, decisions.weights(), num_accepted, tokens)
    parts.append(Outcome(*(column[: len(now)] for column in part)))
    todo += [(int(rows[row]), script) for row, script in decisions.forks if row < len(now)]
  return Outcome(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _emitted(tokens, verdict, num_accepted, max_depth):
  out = np.full((len(tokens), max_depth + 1), -1)
  path, next_token = np.asarray(verdict.path), np.asarray(verdict.next_token)
  for row, count in enumerate(num_accepted):
    out[row, :count] = tokens[row, path[row, 1 : count + 1]]
    out[row, count] = next_token[row]
  return out


def output_law(
  outcome: Outcome,
  row_weight: np.ndarray,
  table: np.ndarray,
  context: tuple[int, ...],
  length: int,
) -> np.ndarray:
  """Returns f64[V, ..., V], the law of the next `length` tokens: one round, then the target.

  For a lossless verifier this is `sequence_law(table, context, length)`.

  Args:
    outcome: of proposals that all start after `context`, whose last token is their root.
    row_weight: f64[B], the probability with which each proposal is drafted.
    table: f64[V, V, V], the target.
    context: the tokens before, at least two.
    length: how many tokens to look at; what a round emits beyond them is summed over.
  """
  law = np.zeros((table.shape[-1],) * length)
  for row, weight, tokens in zip(outcome.row, outcome.weight, outcome.tokens, strict=True):
    emitted = tuple(int(token) for token in tokens[tokens >= 0])[:length]
    rest = sequence_law(table, (*context, *emitted), length - len(emitted))
    law[emitted] += row_weight[row] * weight * rest
  return law


def expected_accepted(outcome: Outcome, row_weight: np.ndarray) -> float:
  """Returns the mean number of accepted drafts per round."""
  return float(np.sum(row_weight[outcome.row] * outcome.weight * outcome.num_accepted))

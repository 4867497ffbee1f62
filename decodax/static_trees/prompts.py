"""Trees that carry their own drafter: prompt tokens below every node.

Axes: `N` tree nodes, `D` depth, `R` ranks, `M` prompt tokens of a node.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from decodax import theory
from decodax.static_trees.search import as_cost_curve
from decodax.static_trees.search import best_first
from decodax.static_trees.search import call_times_ms
from decodax.static_trees.search import deep_table
from decodax.static_trees.tree import StaticTree
from decodax.static_trees.tree import as_integer
from decodax.static_trees.tree import frozen
from decodax.static_trees.tree import sorted_tree


class PromptTrees(NamedTuple):
  """One tree per number of prompt tokens that the last round left behind, for one input budget.

  In state m the drafter offers candidates for the next m depths. Where a round ends, the node's
  prompt tokens decide the next state.
  """

  trees: tuple[StaticTree, ...]  # M + 1 of them; tree m has depth at most m
  num_prompts: tuple[np.ndarray, ...]  # each i32[N], prompt tokens behind each node, 0 .. M
  transitions: np.ndarray  # f64[M + 1, M + 1] entry [d, m]: probability of state m after d
  expected_tokens: np.ndarray  # f64[M + 1] per call, in each state
  value: float  # long-run tokens per call, starting in state 0
  num_inputs: int  # the budget: no state has more nodes and prompt tokens together


def ppd(acceptance: np.ndarray, num_inputs: int, *, max_prompts: int = 3) -> PromptTrees:
  """Returns the trees and prompt tokens with the most tokens per call, long-run, for a budget.

  As in the paper, the tree of a state is the best by product of acceptances, a node may be
  followed by prompt tokens that draft for the next round, and both share the budget. Where the
  paper removes prompt tokens one by one by their immediate loss and searches tree sizes on a
  grid, here the sizes and the prompts of all states are solved together as an average-reward
  decision process (policy iteration, with an exact knapsack inside), so the value is the highest
  that such trees can have and never falls with the budget.

  Args:
    acceptance: f[D, R], entry [d, r] the acceptance of the candidate of rank r that the prompt
      token at distance d + 1 gives, D at least `max_prompts`.
    num_inputs: nodes and prompt tokens of a round, the root included.
    max_prompts: M, prompt tokens that a node may carry, at least 1.

  Raises:
    ValueError: the table is none of probabilities or too shallow, or a number is too small.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the dynamic sparse tree.
  """
  max_prompts = as_integer('max_prompts', max_prompts, least=1)
  num_inputs = as_integer('num_inputs', num_inputs, least=1)
  table = deep_table(acceptance)
  if table.shape[0] < max_prompts:
    raise ValueError(
      f'{max_prompts=} needs acceptances for as many depths, got {table.shape=}; lower '
      'max_prompts or measure more depths.'
    )
  states = [_prompt_state(table[:depth], num_inputs) for depth in range(max_prompts + 1)]
  worth = np.arange(max_prompts + 1.0)  # of leaving so many prompt tokens behind
  policy = [_best_action(state, worth, num_inputs) for state in states]
  for _ in range(64):
    transitions, tokens, gain, bias = _evaluate(states, policy)
    # The gain counts before the bias; it differs between states only if they never meet.
    worth = bias + 1e6 * (gain - gain.max())
    improved = [
      _better_action(state, worth, num_inputs, prompts)
      for state, prompts in zip(states, policy, strict=True)
    ]
    if all(map(np.array_equal, improved, policy)):
      break
    policy = improved
  transitions, tokens, gain, _ = _evaluate(states, policy)
  trees, num_prompts = [], []
  for state, prompts in zip(states, policy, strict=True):
    tree, order = sorted_tree(state.paths[: len(prompts)])
    trees.append(tree)
    num_prompts.append(frozen(prompts[order]))
  return PromptTrees(
    trees=tuple(trees),
    num_prompts=tuple(num_prompts),
    transitions=frozen(transitions),
    expected_tokens=frozen(tokens),
    value=float(gain[0]),
    num_inputs=num_inputs,
  )


class PromptChoice(NamedTuple):
  """Prompt trees that were chosen for a machine."""

  trees: PromptTrees
  round_ms: float  # a call at the full input budget, whatever the state
  speedup: float  # over plain decoding on this machine


def best_ppd(
  acceptance: np.ndarray,
  curve: theory.CostCurve,
  *,
  max_prompts: int = 3,
  budgets: Sequence[int] | None = None,
) -> PromptChoice:
  """Returns the prompt trees of the input budget with the most tokens per second.

  Args:
    acceptance: f[D, R], as for `ppd`.
    curve: measured time of a target call against the tokens it reads; it must start at 1.
    max_prompts: M, prompt tokens that a node may carry.
    budgets: input budgets to consider; None is every measured width.

  Raises:
    ValueError: as `ppd`, or the curve is none, or it does not cover the budgets.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, 2405.18628, the hardware-aware choice of the tree size.
  """
  sizes, times = as_cost_curve(curve)
  if budgets is None:
    budgets = [int(size) for size in sizes if size == int(size)]
  if not len(budgets):
    raise ValueError('budgets must name at least one input budget, got none.')
  call_ms = call_times_ms(sizes, times, np.asarray(budgets, float))
  plain_ms = float(call_times_ms(sizes, times, np.ones(1))[0])
  choices = []
  for budget, round_ms in zip(budgets, call_ms, strict=True):
    trees = ppd(acceptance, budget, max_prompts=max_prompts)
    choices.append(PromptChoice(trees, float(round_ms), trees.value * plain_ms / float(round_ms)))
  return max(choices, key=lambda choice: choice.speedup)


class _PromptState(NamedTuple):
  """The trees that a state may choose: the first n of `paths`, for every n."""

  paths: list[tuple[int, ...]]  # best first
  tokens: np.ndarray  # f64[C] expected tokens per call of the tree of n = 1 .. C nodes
  endings: np.ndarray  # f64[C, C] row n - 1: the probability that its round ends at each node


def _prompt_state(table: np.ndarray, num_inputs: int) -> _PromptState:
  capacity = sum(table.shape[1] ** depth for depth in range(table.shape[0] + 1))
  paths = best_first(table, min(num_inputs, capacity))
  index = {path: node for node, path in enumerate(paths)}
  values = np.ones(len(paths))
  endings = np.zeros((len(paths), len(paths)))
  endings[:, 0] = 1.0
  for node, path in enumerate(paths[1:], start=1):
    parent = index[path[:-1]]
    values[node] = values[parent] * table[len(path) - 1, path[-1]]
    # In every tree that holds the node, the rounds that reach it no longer end at its parent.
    endings[node:, node] += values[node]
    endings[node:, parent] -= values[node]
  return _PromptState(paths, np.cumsum(values), np.maximum(endings, 0.0))


def _best_action(state: _PromptState, worth: np.ndarray, num_inputs: int) -> np.ndarray:
  """i32[n], the prompt tokens of each node of the best tree; ending with m is worth `worth[m]`.

  One exact knapsack over the nodes, for all tree sizes at once: entry [n - 1, c] is the most that
  the nodes so far can be worth with c prompt tokens among them.
  """
  num_options = len(state.tokens)
  total = np.zeros((num_options, num_inputs))
  choices = []
  for node in range(num_options):
    ending = state.endings[:, node, None]
    best, choice = total + ending * worth[0], np.zeros(total.shape, np.int32)
    for prompts in range(1, min(len(worth), num_inputs)):
      more = np.full(total.shape, -np.inf)
      more[:, prompts:] = total[:, :-prompts] + ending * worth[prompts]
      choice[more > best] = prompts
      best = np.maximum(best, more)
    total = best
    choices.append(choice)
  left = num_inputs - 1 - np.arange(num_options)  # for prompt tokens, after the nodes
  size = int(np.argmax(state.tokens + total[np.arange(num_options), left])) + 1
  remaining = num_inputs - size
  prompts = np.zeros(size, np.int32)
  for node in reversed(range(num_options)):
    taken = int(choices[node][size - 1, remaining])
    remaining -= taken
    if node < size:
      prompts[node] = taken
  return prompts


def _better_action(
  state: _PromptState, worth: np.ndarray, num_inputs: int, prompts: np.ndarray
) -> np.ndarray:
  """The best action, or the one that was chosen before, where that is as good.

  Without this, states whose best actions are equally good could change them in turns for ever.
  """

  def value(prompts):
    size = len(prompts)
    return state.tokens[size - 1] + state.endings[size - 1, :size] @ worth[prompts]

  best = _best_action(state, worth, num_inputs)
  return best if value(best) > value(prompts) + 1e-9 * max(abs(worth).max(), 1) else prompts


def _evaluate(
  states: list[_PromptState], policy: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Transitions, expected tokens, long-run gain per call and bias of a policy, by state."""
  count = len(states)
  transitions = np.zeros((count, count))
  for state, prompts, row in zip(states, policy, transitions, strict=True):
    size = len(prompts)
    np.add.at(row, prompts, state.endings[size - 1, :size])
  transitions /= transitions.sum(axis=1, keepdims=True)
  tokens = np.array([s.tokens[len(a) - 1] for s, a in zip(states, policy, strict=True)])
  # Where the chain is in the long run, from each state: a power of the chain that rests half of
  # the time, which converges even if the chain itself is periodic.
  limit = (transitions + np.eye(count)) / 2
  for _ in range(64):
    limit = limit @ limit
    limit /= limit.sum(axis=1, keepdims=True)
  gain = limit @ tokens
  bias = np.linalg.solve(np.eye(count) - transitions + limit, tokens - gain)
  return transitions, tokens, gain, bias

"""What writing several tokens at once must cost, whatever the network and the policy.

Tokens written together are drawn apart, from the product of their laws. If the right answers are
some *worlds*, each equally likely, then even a network that knows every law exactly writes an
answer that is none of them with a probability that can be computed.

Source: ParallelBench, arXiv:2510.04767, section 3 (the total correlation as the price of one step).
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

World = Sequence[Any]  # one right answer, slot by slot


def total_correlation(worlds: Sequence[World]) -> float:
  """Returns sum H(slot) - H(all slots) in nats, for worlds that are equally likely.

  It is the least divergence from the right law of anything that writes all slots in one step.
  """
  alone = 0.0
  for column in zip(*worlds, strict=True):
    counts = np.unique(np.array(column, dtype=object).astype(str), return_counts=True)[1]
    share = counts / counts.sum()
    alone -= float(np.sum(share * np.log(share)))
  return max(alone - math.log(len(set(map(tuple, worlds)))), 0.0)


def accuracy_of_groups(worlds: Sequence[World], groups: Sequence[Sequence[int]]) -> float:
  """Returns the probability that an answer is one of the worlds, by a network that knows all laws.

  Args:
    worlds: equally likely, all of one length.
    groups: the slots of each step, all slots once. A step's slots are drawn apart, each from its
      law given what earlier steps wrote.
  """
  if not groups:
    return 1.0
  slots, rest = groups[0], groups[1:]
  laws = []
  for slot in slots:
    law: dict[Any, float] = {}
    for world in worlds:
      law[world[slot]] = law.get(world[slot], 0.0) + 1 / len(worlds)
    laws.append(law)
  kept: dict[tuple, list] = {}
  for world in worlds:
    kept.setdefault(tuple(world[slot] for slot in slots), []).append(world)
  return sum(
    math.prod(law[token] for law, token in zip(laws, tokens, strict=True))
    * accuracy_of_groups(some, rest)
    for tokens, some in kept.items()
  )


def left_to_right(length: int, size: int) -> list[range]:
  """Returns the slots 0..length - 1 in groups of `size`, from left to right."""
  return [range(start, min(start + size, length)) for start in range(0, length, size)]


def shuffle_accuracy(length: int, size: int) -> float:
  """Returns P(a permutation) for `length` distinct items written `size` at a time.

  In a step with r items left, `size` slots are drawn apart from r items each: the chance that they
  differ is r! / ((r - size)! r ** size). In one step that is n! / n ** n.
  """
  chance, left = 1.0, length
  while left:
    now = min(size, left)
    chance *= math.perm(left, now) / left**now
    left -= now
  return chance


def replace_accuracy(length: int, size: int) -> float:
  """Returns P(exactly one slot is replaced) for a random one of `length`, `size` slots at a time.

  As long as none is, each of the r slots left is the one with probability 1 / r, and the slots of a
  step do not know of each other. In one step that is ((n - 1) / n) ** (n - 1).
  """
  right, none, left = 0.0, 1.0, length
  while left:
    now = min(size, left)
    right += none * now * (1 / left) * (1 - 1 / left) ** (now - 1)
    none *= (1 - 1 / left) ** now
    left -= now
  return right

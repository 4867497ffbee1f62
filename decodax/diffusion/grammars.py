"""Context-free languages: can what is left blank still be completed? On the host, to check by.

Two questions, both answered by which nonterminal derives what between two points:

* `fits`: between two slots of a canvas whose blanks each take one token. Exact for a canvas.
* `intersects`: between two states of an automaton, such as that of fixed words with gaps of any
  length in between, which is how additive infilling sees an unfinished text.

Axes: `N` nonterminals, `P` points (slots or states).
"""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import numpy as np

Rules = Mapping[str, Sequence[Sequence[str]]]


class Grammar(NamedTuple):
  """A context-free grammar in which every rule has at most two symbols."""

  names: tuple[str, ...]  # N nonterminals, the start first
  empty: tuple[int, ...]  # A -> (nothing)
  letters: tuple[tuple[int, str], ...]  # A -> a
  units: tuple[tuple[int, int], ...]  # A -> B
  pairs: tuple[tuple[int, int, int], ...]  # A -> B C


def make_grammar(start: str, rules: Rules) -> Grammar:
  """Returns the grammar; symbols without a rule are letters, and long rules are split in pairs.

  Raises:
    ValueError: if the start has no rule.
  """
  if start not in rules:
    raise ValueError(f'no rule for the start symbol {start!r}')
  names: dict[Any, int] = {
    name: index for index, name in enumerate([start, *(n for n in rules if n != start)])
  }
  empty, letters, units, pairs = [], [], [], []
  counter = itertools.count()

  def number(symbol):
    """Returns the nonterminal of a symbol; a letter gets one of its own."""
    if symbol in rules:
      return names[symbol]
    if ('letter', symbol) not in names:
      names['letter', symbol] = len(names)
      letters.append((names['letter', symbol], symbol))
    return names['letter', symbol]

  for name, bodies in rules.items():
    for body in bodies:
      left = names[name]
      body = list(body)
      while len(body) > 2:
        rest = names['rest', next(counter)] = len(names)
        pairs.append((left, number(body[0]), rest))
        left, body = rest, body[1:]
      if not body:
        empty.append(left)
      elif len(body) == 2:
        pairs.append((left, number(body[0]), number(body[1])))
      elif body[0] in rules:
        units.append((left, names[body[0]]))
      else:
        letters.append((left, body[0]))
  return Grammar(tuple(map(str, names)), tuple(empty), tuple(letters), tuple(units), tuple(pairs))


def fits(grammar: Grammar, canvas: Sequence[str | None]) -> bool:
  """Returns whether some choice of a letter for each None makes the canvas a word."""
  size = len(canvas)
  edges = [
    (slot, slot + 1, None if letter is None else {letter}) for slot, letter in enumerate(canvas)
  ]
  return bool(_derives(grammar, edges, size + 1)[0, 0, size])


def intersects(
  grammar: Grammar,
  edges: Sequence[tuple[int, int, set[str] | None]],
  num_states: int,
  start: int,
  accepting: Sequence[int],
) -> bool:
  """Returns whether the grammar and an automaton have a word in common.

  Args:
    grammar: the language.
    edges: (from, to, letters); None is any letter.
    num_states: of the automaton.
    start: its first state.
    accepting: the states it may end in.

  Source: Bar-Hillel's construction, as in arXiv:2508.10111, section 4.
  """
  derives = _derives(grammar, edges, num_states)
  return bool(derives[0, start, list(accepting)].any())


def infilling(pieces: Sequence[Sequence[str]]) -> tuple[list, int, int, list[int]]:
  """Returns the automaton (edges, num_states, start, accepting) of pieces with gaps in between.

  A gap takes any number of letters. Pieces may be empty, for a text that starts or ends in a gap.
  """
  edges, state = [], 0
  for index, piece in enumerate(pieces):
    if index:
      edges.append((state, state, None))
    for letter in piece:
      edges.append((state, state + 1, {letter}))
      state += 1
  return edges, state + 1, 0, [state]


def _derives(grammar, edges, num_points):
  """Returns bool[N, P, P]: does a nonterminal derive a word that leads from point to point?"""
  table = np.zeros((len(grammar.names), num_points, num_points), bool)
  for name, letter in grammar.letters:
    for source, target, allowed in edges:
      if allowed is None or letter in allowed:
        table[name, source, target] = True
  for name in grammar.empty:
    table[name] |= np.eye(num_points, dtype=bool)
  while True:
    before = table.sum()
    for name, inner in grammar.units:
      table[name] |= table[inner]
    for name, left, right in grammar.pairs:
      table[name] |= table[left] @ table[right]
    if table.sum() == before:
      return table


# --- Examples -------------------------------------------------------------------------------------


def _words(letters: str) -> list[list[str]]:
  return [[letter] for letter in letters]


def arithmetic_grammar() -> Grammar:
  """Returns sums and products of whole numbers with parentheses, of any depth."""
  return make_grammar(
    'expression',
    {
      'expression': [['term'], ['term', 'operator', 'expression']],
      'term': [['number'], ['(', 'expression', ')']],
      'number': [['0'], ['first', 'digits']],
      'digits': [[], ['digit', 'digits']],
      'digit': _words('0123456789'),
      'first': _words('123456789'),
      'operator': _words('+*'),
    },
  )


def json_grammar(letters: str = 'abcdefghijklmnopqrstuvwxyz') -> Grammar:
  """Returns JSON without white space, escapes and fractions, of any depth."""
  return make_grammar(
    'value',
    {
      'value': [
        ['string'],
        ['number'],
        ['object'],
        ['array'],
        list('true'),
        list('false'),
        list('null'),
      ],
      'object': [['{', '}'], ['{', 'members', '}']],
      'members': [['member'], ['member', ',', 'members']],
      'member': [['string', ':', 'value']],
      'array': [['[', ']'], ['[', 'items', ']']],
      'items': [['value'], ['value', ',', 'items']],
      'string': [['"', 'characters', '"']],
      'characters': [[], ['character', 'characters']],
      'character': _words(letters),
      'number': [['whole'], ['-', 'whole']],
      'whole': [['0'], ['first', 'digits']],
      'digits': [[], ['digit', 'digits']],
      'digit': _words('0123456789'),
      'first': _words('123456789'),
    },
  )

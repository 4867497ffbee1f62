"""Regular languages over tokens: expressions, and the tables that the denoising loop reads.

An expression is written over characters; `compile_expression` turns it into the smallest
deterministic automaton and lifts that to a vocabulary, whatever strings its tokens stand for. All
of this runs on the host, before anything compiles.

Axes: `Q` states, `C` classes of tokens that act alike, `V` vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# --- Expressions ----------------------------------------------------------------------------------


class Expression(NamedTuple):
  """A regular expression: a letter out of some, or an operation on expressions."""

  kind: str  # 'letter', 'sequence', 'choice', 'star'
  letters: frozenset[str] = frozenset()
  parts: tuple['Expression', ...] = ()


def letter(letters: str) -> Expression:
  """Returns the language of one character out of `letters`."""
  return Expression('letter', frozenset(letters))


def text(characters: str) -> Expression:
  """Returns the language of one word."""
  return sequence(*(letter(c) for c in characters))


def sequence(*parts: Expression) -> Expression:
  """Returns the language of a word of each, one after the other; without any, the empty word."""
  return Expression('sequence', parts=parts)


def choice(*parts: Expression) -> Expression:
  """Returns the language of a word of any of them."""
  return Expression('choice', parts=parts)


def star(part: Expression) -> Expression:
  """Returns the language of any number of words of `part`."""
  return Expression('star', parts=(part,))


def plus(part: Expression) -> Expression:
  """Returns the language of at least one word of `part`."""
  return sequence(part, star(part))


def optional(part: Expression) -> Expression:
  """Returns the language of `part` and the empty word."""
  return choice(part, sequence())


def separated(part: Expression, separator: Expression) -> Expression:
  """Returns the language of at least one word of `part`, with separators in between."""
  return sequence(part, star(sequence(separator, part)))


# --- Examples -------------------------------------------------------------------------------------


def arithmetic(depth: int) -> Expression:
  """Returns sums and products of whole numbers with at most `depth` nested parentheses."""
  number = choice(letter('0'), sequence(letter('123456789'), star(letter('0123456789'))))
  term = number
  for _ in range(depth):
    inner = separated(term, letter('+*'))
    term = choice(number, sequence(letter('('), inner, letter(')')))
  return separated(term, letter('+*'))


def json_subset(depth: int, letters: str = 'abcdefghijklmnopqrstuvwxyz') -> Expression:
  """Returns JSON without white space, escapes and fractions, nested at most `depth` deep."""
  string = sequence(letter('"'), star(letter(letters)), letter('"'))
  digits = choice(letter('0'), sequence(letter('123456789'), star(letter('0123456789'))))
  number = sequence(optional(letter('-')), digits)
  flat = choice(string, number, text('true'), text('false'), text('null'))
  value = flat
  for _ in range(depth):
    members = separated(sequence(string, letter(':'), value), letter(','))
    items = separated(value, letter(','))
    value = choice(
      flat,
      sequence(letter('{'), optional(members), letter('}')),
      sequence(letter('['), optional(items), letter(']')),
    )
  return value


# --- Automata -------------------------------------------------------------------------------------


class Automaton(NamedTuple):
  """A deterministic automaton over tokens. State 0 is the start, the last one is dead."""

  next: np.ndarray  # i32[Q, C]
  classes: np.ndarray  # i32[V] the class of each token
  accepting: np.ndarray  # bool[Q]

  @property
  def num_states(self) -> int:
    """How many states there are, the dead one included."""
    return len(self.accepting)

  def accepts(self, tokens: Iterable[int]) -> bool:
    """Returns whether a sequence of token ids is a word of the language."""
    state = 0
    for token in tokens:
      state = self.next[state, self.classes[token]]
    return bool(self.accepting[state])


def compile_expression(
  expression: Expression, token_texts: Sequence[str], *, eos_id: int | None = None
) -> Automaton:
  """Returns the automaton of an expression over a vocabulary.

  Args:
    expression: over characters.
    token_texts: the characters of each token; the empty string for tokens that may never stand.
    eos_id: a token that may follow a word, any number of times, and nothing else after it. None: a
      word has to fill the canvas.

  Raises:
    ValueError: if no word can be written with these tokens.
  """
  alphabet = sorted({c for t in token_texts for c in t})
  table, accepting = _determinise(*_to_nfa(expression), alphabet)
  table, accepting = _minimise(table, accepting)
  automaton = _lift(table, accepting, alphabet, token_texts, eos_id)
  if not live_states(automaton)[0]:
    raise ValueError('no word of this language can be written with these tokens')
  return automaton


def shortest_word_length(automaton: Automaton) -> int:
  """Returns the number of tokens of the shortest word: no shorter canvas can be filled."""
  reached, length = {0}, 0
  while not any(automaton.accepting[state] for state in reached):
    reached |= {int(s) for state in reached for s in automaton.next[state]}
    length += 1
  return length


def _to_nfa(expression):
  """Returns (edges: state -> [(letters or None, state)], start, end) by Thompson's construction."""
  edges: list[list] = []

  def fresh():
    edges.append([])
    return len(edges) - 1

  def build(part: Expression):
    start, end = fresh(), fresh()
    if part.kind == 'letter':
      edges[start].append((part.letters, end))
    elif part.kind == 'sequence':
      at = start
      for inner in part.parts:
        first, last = build(inner)
        edges[at].append((None, first))
        at = last
      edges[at].append((None, end))
    else:
      for inner in part.parts:
        first, last = build(inner)
        edges[start].append((None, first))
        edges[last].append((None, first if part.kind == 'star' else end))
        if part.kind == 'star':
          edges[last].append((None, end))
      if part.kind == 'star':
        edges[start].append((None, end))
    return start, end

  start, end = build(expression)
  return edges, start, end


def _determinise(edges, start, end, alphabet):
  """Returns (table i64[Q, letters], accepting bool[Q]); the last state is dead."""

  def closure(states):
    found, todo = set(states), list(states)
    while todo:
      for letters, target in edges[todo.pop()]:
        if letters is None and target not in found:
          found.add(target)
          todo.append(target)
    return frozenset(found)

  names = {closure([start]): 0}
  todo, rows = list(names), []
  while todo:
    states = todo.pop(0)
    row = []
    for character in alphabet:
      targets = [t for s in states for letters, t in edges[s] if letters and character in letters]
      target = closure(targets)
      if target not in names:
        names[target] = len(names)
        todo.append(target)
      row.append(names[target])
    rows.append(row)
  accepting = np.array([end in states for states in names])
  table = np.array(rows, np.int64).reshape(len(names), len(alphabet))
  dead = len(names)
  return np.vstack([table, np.full((1, len(alphabet)), dead)]), np.append(accepting, False)


def _minimise(table, accepting):
  """Returns the smallest automaton, start first and dead last, by refining a partition."""
  group = accepting.astype(np.int64)
  while True:
    signature = np.column_stack([group, group[table]])
    _, new = np.unique(signature, axis=0, return_inverse=True)
    new = new.reshape(-1)
    if len(np.unique(new)) == len(np.unique(group)):
      break
    group = new
  dead = group[-1]
  order = [group[0]] + [g for g in range(group.max() + 1) if g not in (group[0], dead)]
  if group[0] != dead:
    order.append(dead)
  rename = {g: i for i, g in enumerate(order)}
  first = [int(np.argmax(group == g)) for g in order]
  rows = [[rename[g] for g in group[table[state]]] for state in first]
  return np.array(rows, np.int64).reshape(len(order), -1), accepting[first]


def _lift(table, accepting, alphabet, token_texts, eos_id):
  """Returns the automaton over tokens: each walks its characters, in one step."""
  index = {character: i for i, character in enumerate(alphabet)}
  dead, states = len(accepting) - 1, np.arange(len(accepting))
  columns = np.full((len(accepting), len(token_texts)), dead, np.int64)
  for token, characters in enumerate(token_texts):
    if characters:
      at = states
      for character in characters:
        at = table[at, index[character]]
      columns[:, token] = at
  if eos_id is not None:
    # A state behind the word takes the place of the dead one, which moves to the end.
    ended, new_dead = dead, dead + 1
    columns = np.where(columns == dead, new_dead, columns)
    columns = np.vstack([columns, np.full((1, columns.shape[1]), new_dead)])
    columns[:, eos_id] = new_dead
    columns[:dead, eos_id] = np.where(accepting[:dead], ended, new_dead)
    columns[ended, eos_id] = ended
    accepting = np.insert(accepting, ended, True)
  distinct, classes = np.unique(columns, axis=1, return_inverse=True)
  return Automaton(distinct.astype(np.int32), classes.reshape(-1).astype(np.int32), accepting)


def live_states(automaton: Automaton) -> np.ndarray:
  """Returns bool[Q]: can an accepting state be reached?"""
  alive = automaton.accepting.copy()
  while True:
    new = alive | alive[automaton.next].any(-1)
    if (new == alive).all():
      return alive
    alive = new

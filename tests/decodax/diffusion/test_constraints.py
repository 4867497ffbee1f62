"""Languages: automata and grammars against enumeration, and decoding that never leaves them."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import diffusion
from decodax.diffusion import automata
from decodax.diffusion import grammars
from decodax.diffusion import policies
from decodax.types import Model
from decodax.types import ModelOutput
from decodax.types import Result
from tests.decodax.diffusion.bag import Compiled

LETTERS = list('{}[]":,-+*()01234')
TEXTS = [*LETTERS, *'true', *'false', *'null', *'ab']
TEXTS = [*dict.fromkeys(TEXTS), '": ', 'ab1', '"a":', '', '']  # some tokens of several letters
MASK, EOS = len(TEXTS) - 2, len(TEXTS) - 1
AB = ['a', 'b', 'c', '', '']

EXPRESSIONS = {
  'a*b': automata.sequence(automata.star(automata.letter('a')), automata.letter('b')),
  '(ab|c)+': automata.plus(automata.choice(automata.text('ab'), automata.letter('c'))),
  'a?(b,c)*': automata.sequence(
    automata.optional(automata.letter('a')), automata.star(automata.letter('bc'))
  ),
  '(aa)*': automata.star(automata.text('aa')),
}
PATTERNS = {'a*b': 'a*b', '(ab|c)+': '(ab|c)+', 'a?(b,c)*': 'a?[bc]*', '(aa)*': '(aa)*'}


@pytest.mark.parametrize('name', EXPRESSIONS)
def test_an_automaton_accepts_the_words_of_its_expression(name):
  automaton = automata.compile_expression(EXPRESSIONS[name], AB)
  for length in range(6):
    for word in itertools.product(range(3), repeat=length):
      spelled = ''.join(AB[t] for t in word)
      assert automaton.accepts(word) == bool(re.fullmatch(PATTERNS[name], spelled)), spelled


def test_tokens_of_several_letters_and_an_end():
  automaton = automata.compile_expression(
    EXPRESSIONS['(ab|c)+'], ['a', 'b', 'c', 'ba', 'abc', '', ''], eos_id=6
  )
  for tokens, wanted in {
    (0, 1): True, (4,): True, (4, 4): True, (0, 3, 1): True, (3,): False, (0,): False,
    (2, 6): True, (2, 6, 6): True, (6,): False, (2, 6, 2): False, (5,): False,
  }.items():  # fmt: skip
    assert automaton.accepts(tokens) == wanted, tokens
  assert automata.shortest_word_length(automaton) == 1


def test_a_language_that_cannot_be_written_is_refused():
  with pytest.raises(ValueError, match='no word'):
    automata.compile_expression(automata.text('ab'), ['a', 'c'])


# --- Grammars -------------------------------------------------------------------------------------

PALINDROMES = grammars.make_grammar('s', {'s': [['a', 's', 'a'], ['b', 's', 'b'], ['c']]})
BALANCED = grammars.make_grammar('s', {'s': [[], ['a', 's', 'b', 's']]})


def is_palindrome(word):
  return word == word[::-1] and word.count('c') == 1


def is_balanced(word):
  depth = 0
  for c in word:
    depth += {'a': 1, 'b': -1}.get(c, -99)
    if depth < 0:
      return False
  return depth == 0


@pytest.mark.parametrize(
  ('grammar', 'member'), [(PALINDROMES, is_palindrome), (BALANCED, is_balanced)]
)
def test_a_canvas_fits_exactly_when_some_filling_is_a_word(grammar, member):
  for size in range(5):
    words = [w for w in map(''.join, itertools.product('abc', repeat=size)) if member(w)]
    for canvas in itertools.product(['a', 'b', 'c', None], repeat=size):
      wanted = any(
        all(c is None or c == w for c, w in zip(canvas, word, strict=True)) for word in words
      )
      assert grammars.fits(grammar, canvas) == wanted, canvas


def test_pieces_with_gaps_are_completable_exactly_when_some_word_has_them():
  words = [
    w for size in range(10) for w in map(''.join, itertools.product('ab', repeat=size))
    if is_balanced(w)
  ]  # fmt: skip
  for pieces in [['', ''], ['b', ''], ['', 'a'], ['', 'bb', ''], ['a', 'b'], ['a', 'ba', ''],
                 ['ab', 'b', 'ab'], ['', 'abba', '']]:  # fmt: skip
    pattern = '.*'.join(map(re.escape, pieces))
    wanted = any(re.fullmatch(pattern, word) for word in words)
    found = grammars.intersects(BALANCED, *grammars.infilling(pieces))
    assert found == wanted, pieces


@pytest.mark.parametrize(
  ('expression', 'grammar'),
  [
    (automata.arithmetic(2), grammars.arithmetic_grammar()),
    (automata.json_subset(2, 'ab'), grammars.json_grammar('ab')),
  ],
)
def test_the_bounded_language_is_part_of_the_grammars(expression, grammar):
  automaton = automata.compile_expression(expression, LETTERS + list('abelnrstuf'))
  texts = LETTERS + list('abelnrstuf')
  rng = np.random.default_rng(0)
  alive = automata.live_states(automaton)
  for _ in range(40):  # random walks that stay alive, to their first end after a few letters
    state, word = 0, []
    while len(word) < 40 and not (automaton.accepting[state] and len(word) >= rng.integers(1, 9)):
      tokens = [t for t in range(len(texts)) if alive[automaton.next[state, automaton.classes[t]]]]
      if not tokens:
        break
      word.append(int(rng.choice(tokens)))
      state = automaton.next[state, automaton.classes[word[-1]]]
    if automaton.accepting[state]:
      assert grammars.fits(grammar, [texts[t] for t in word])


# --- Decoding -------------------------------------------------------------------------------------


def noise_model(vocab_size: int, size: int = 64) -> Model:
  """Returns a network with opinions of its own about every position, whatever stands there."""

  def init_cache(params, batch_size, capacity):
    del params, capacity
    return jnp.zeros((batch_size,), jnp.int32)

  def extend(params, cache, tokens, positions, mask, *, scratch=None, offset=0):
    del cache, mask, scratch, offset
    return ModelOutput(params[positions] + 0.3 * params[tokens + 1]), tokens

  def unembed(params, hidden):
    del params
    return hidden

  return Model(init_cache, extend, lambda cache, *_: cache, unembed, vocab_size)


def parse_arithmetic(spelled):
  return re.fullmatch(r'[0-9+*()]+', spelled) and eval(spelled) is not None


LANGUAGES = {
  'json': (automata.json_subset(2, 'ab'), json.loads),
  'arithmetic': (automata.arithmetic(2), parse_arithmetic),
}


@pytest.mark.parametrize('name', LANGUAGES)
def test_every_output_is_a_word(name):
  expression, parse = LANGUAGES[name]
  automaton = automata.compile_expression(expression, TEXTS, eos_id=EOS)
  net = diffusion.MaskedModel(noise_model(len(TEXTS)), MASK)
  rows, size = 24, 18
  params = jnp.asarray(3 * np.random.default_rng(1).standard_normal((64, len(TEXTS))))
  prompts = np.random.default_rng(0).integers(0, MASK, (rows, 2))
  request = decodax.make_request(
    prompts, max_new_tokens=np.arange(rows) % (size - 5) + 6, vocab_size=len(TEXTS),
    eos_ids=[EOS], temperature=np.arange(rows) % 2 * 1.0, capacity=size + 2,
  )  # fmt: skip

  def run(params, request, tau):
    policy = diffusion.constrained(policies.threshold(tau), automaton)
    return diffusion.denoise(
      params, request, net=net, policy=policy, blocks=diffusion.fixed_blocks(size)
    )

  compiled = Compiled(run)
  for tau in (0.2, 0.5):
    result = compiled(diffusion.Params(params), request, jnp.float32(tau))
    assert np.isin(result.result, [Result.EOS, Result.LENGTH]).all()
    for row in range(rows):
      canvas = result.tokens[row, 2 : result.length[row]]
      parse(''.join(TEXTS[t] for t in canvas))
      assert automaton.accepts(canvas)
    assert (result.stats.num_calls <= request.max_new_tokens).all()
  assert result.stats.num_calls.sum() < np.asarray(request.max_new_tokens).sum()


def test_a_canvas_that_no_word_fits_says_so():
  automaton = automata.compile_expression(EXPRESSIONS['(aa)*'], AB)
  net = diffusion.MaskedModel(noise_model(5), 3)
  params = jnp.asarray(np.random.default_rng(1).standard_normal((64, 5)), jnp.float32)
  request = decodax.make_request([[1]] * 3, max_new_tokens=(4, 5, 4), vocab_size=5, capacity=8)
  template = np.full((3, 5), 3)
  template[2, 1] = 1
  result = jax.device_get(diffusion.denoise(
    diffusion.Params(params), request, net=net, blocks=diffusion.fixed_blocks(4),
    policy=diffusion.constrained(policies.llada(2), automaton), template=template,
  ))  # fmt: skip
  np.testing.assert_array_equal(
    result.result, [Result.LENGTH, Result.UNSATISFIABLE, Result.UNSATISFIABLE]
  )
  np.testing.assert_array_equal(result.tokens[0], [1, 0, 0, 0, 0, 0, 0, 0])


def test_a_constraint_refuses_what_it_cannot_hold():
  automaton = automata.compile_expression(EXPRESSIONS['a*b'], AB)
  with pytest.raises(ValueError, match='takes tokens back'):
    diffusion.constrained(policies.editing(), automaton)
  net = diffusion.MaskedModel(noise_model(7), 3)
  with pytest.raises(ValueError, match='vocabulary'):
    diffusion.denoise(
      diffusion.Params(jnp.zeros((64, 7))),
      decodax.make_request([[0]], max_new_tokens=4, vocab_size=7, capacity=8),
      net=net,
      policy=diffusion.constrained(policies.threshold(), automaton),
      blocks=diffusion.fixed_blocks(4),
    )

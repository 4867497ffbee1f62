"""The law of what greedy, coupled and speculative verification emit, summed over all outcomes.

One round, then the target: the law of the next tokens must be the target's to 1e-12, in float64.
Axes: `R` rows, `N` nodes, `D` depth, `V` vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import theory
from decodax import verifiers
from decodax.trees import chain_proposal
from decodax.types import Proposal
from tests.enumeration import Outcome
from tests.enumeration import enumerate_verdicts
from tests.enumeration import expected_accepted
from tests.enumeration import output_law
from tests.table_model import random_table
from tests.table_model import sequence_law

V = 3
CONTEXT = (2, 1)


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def _without(table, *tokens):
  """Returns the table with these tokens impossible."""
  table = np.where(np.isin(np.arange(V), tokens), 0, table)
  return table / table.sum(-1, keepdims=True)


def _one_hot(table):
  return np.eye(V)[table.argmax(-1)]


_P, _Q, _SHARP = random_table(0, V), random_table(1, V), random_table(2, V, sharpness=4)
_HALF = np.where(np.arange(V) < 2, 0.5, 0.0) * np.ones((V, V, 1))

# name: (target, drafter), each a table of laws.
TABLES = {
  'random': (_P, _Q),
  'sharp': (_SHARP, _Q),
  'sharp draft': (_P, _SHARP),
  'equal': (_P, _P),
  'equal but for rounding': (_P, _P * (1 + 1e-15 * np.sign(_Q - 0.3))),
  'target without a token': (_without(_P, 0), _Q),
  'draft without a token': (_P, _without(_Q, 1)),
  'disjoint': (_without(_P, 0), _one_hot(_without(_Q, 1, 2))),
  'certain draft': (_P, _one_hot(_Q)),
  'certain target': (_one_hot(_P), _Q),
  'both certain': (_one_hot(_P), _one_hot(_Q)),
  'ties': (np.full((V, V, V), 1 / V), _HALF),
}


def _log(laws):
  with np.errstate(divide='ignore'):
    return jnp.asarray(np.log(laws))


# --- Speculative sampling of chains --------------------------------------------------------------


def _every_chain(p, q, num_drafts, num_valid):
  """Returns (all V^D chains, their target logits, the probability of each)."""
  drafts = np.asarray(list(itertools.product(range(V), repeat=num_drafts)))
  tokens = np.concatenate([np.tile(CONTEXT, (len(drafts), 1)), drafts], axis=1)
  before, last = tokens[:, :-1], tokens[:, 1:]
  laws = q[before, last][:, :-1]
  weight = np.take_along_axis(laws, drafts[..., None], axis=2)[..., 0].prod(-1)
  count = np.asarray([num_valid(row) for row in drafts.tolist()])
  proposal = chain_proposal(
    jnp.full(len(drafts), CONTEXT[-1], jnp.int32),
    jnp.asarray(drafts, jnp.int32),
    jnp.asarray(count, jnp.int32),
    _log(laws),
  )
  return proposal, _log(p[before, last]), weight


def _expected_overlap(p, q, num_drafts, num_valid, drafts=()):
  """Returns the expected number of accepted drafts: 1 - TV per position, along accepted paths."""
  padded = [*drafts, *[0] * (num_drafts - len(drafts))]
  if len(drafts) >= num_valid(padded):
    return 0.0
  before, last = (*CONTEXT, *drafts)[-2:]
  laws = p[before, last][None], q[before, last][None]
  both = np.minimum(*laws)[0]
  np.testing.assert_allclose(both.sum(), 1 - theory.total_variation(*laws)[0], atol=1e-14)
  further = (_expected_overlap(p, q, num_drafts, num_valid, (*drafts, token)) for token in range(V))
  return both.sum() + sum(chance * more for chance, more in zip(both, further, strict=True))


# How many drafts of a chain are submitted; it may depend on all but the last of them.
NUM_VALID = {
  'all': (2, lambda drafts: 2),
  'short': (2, lambda drafts: 1),
  'none': (2, lambda drafts: 0),
  'stops after a token': (3, lambda drafts: 1 if drafts[0] == 0 else 3),
}


@pytest.mark.parametrize(
  'case, length',
  [(case, 'all') for case in TABLES]
  + list(itertools.product(('random', 'disjoint', 'equal'), list(NUM_VALID)[1:])),
)
def test_speculative_emits_the_targets_law(case, length):
  (p, q), (num_drafts, num_valid) = TABLES[case], NUM_VALID[length]
  proposal, logits, weight = _every_chain(p, q, num_drafts, num_valid)
  outcome = enumerate_verdicts(verifiers.speculative.verify, proposal, logits, max_depth=num_drafts)
  law = output_law(outcome, weight, p, CONTEXT, num_drafts + 1)
  np.testing.assert_allclose(law, sequence_law(p, CONTEXT, num_drafts + 1), atol=1e-12)
  expected = _expected_overlap(p, q, num_drafts, num_valid)
  np.testing.assert_allclose(expected_accepted(outcome, weight), expected, atol=1e-12)


def test_choosing_the_length_by_the_last_draft_would_be_biased():
  """The enumeration sees what it should: a draft may not be dropped because of what it is."""
  p, q = TABLES['random']
  proposal, logits, weight = _every_chain(p, q, 2, lambda drafts: 1 if drafts[1] == 0 else 2)
  outcome = enumerate_verdicts(verifiers.speculative.verify, proposal, logits, max_depth=2)
  law = output_law(outcome, weight, p, CONTEXT, 3)
  assert np.abs(law - sequence_law(p, CONTEXT, 3)).sum() / 2 > 1e-3


# --- Trees ---------------------------------------------------------------------------------------

# name: (parents, tokens), depth at least 3, unequal branching. Node 0 is the root.
TREES = {
  'chain': ([-1, 0, 1, 2], [1, 0, 2, 1]),
  'unequal': ([-1, 0, 0, 1, 1, 2, 3, 3, 6], [1, 0, 2, 1, 2, 0, 0, 2, 1]),
  'full': (
    [-1, 0, 0, 0, 1, 1, 2, 4, 4, 4, 5, 6],
    [1, 0, 1, 2, 0, 2, 1, 0, 1, 2, 1, 0],
  ),
  'twins': ([-1, 0, 0, 1, 2, 3, 4, 4], [1, 0, 0, 1, 2, 2, 1, 1]),
  'tokens that do not exist': ([-1, 0, 0, 1, 2, 4], [1, V, 2, 0, -1, 1]),
}


def _tree(name, num_valid=None):
  parents, tokens = (np.asarray(a, np.int32) for a in TREES[name])
  valid = np.arange(len(parents)) < (num_valid or len(parents))
  rows = [jnp.asarray(a)[None] for a in (tokens, parents, valid)]
  return parents, Proposal(rows[0], rows[1], rows[2])


def _path(parents, node):
  return [] if node == 0 else [*_path(parents, parents[node]), node]


def _tree_logits(parents, tokens, table):
  """Returns f64[1, N, V], logits after each path; a token that does not exist counts as 0."""
  laws = []
  for node in range(len(parents)):
    path = [int(tokens[i]) for i in _path(parents, node)]
    before, last = [*CONTEXT, *(token if 0 <= token < V else 0 for token in path)][-2:]
    laws.append(table[before, last])
  return _log(np.asarray(laws))[None]


class _Dictated:
  """Keys with which plain sampling draws given texts i32[R, D + 1]; records how likely they are."""

  def __init__(self, texts):
    self.texts, self.chance = texts, np.ones(texts.shape)

  def pick_coupled(self, logits, depth):
    depth = int(depth)
    token = self.texts[:, depth - 1]
    law = np.asarray(jax.nn.softmax(np.asarray(logits), axis=-1))
    self.chance[:, depth - 1] = law[np.arange(len(token)), token]
    return token


def _enumerate_tree(verify, proposal, logits, max_depth):
  """Returns the `Outcome` of all texts that plain sampling can draw, one entry per emitted text."""
  texts = np.asarray(list(itertools.product(range(V), repeat=max_depth + 1)), np.int32)
  keys = _Dictated(texts)
  rows = jax.tree.map(lambda a: jnp.repeat(a, len(texts), axis=0), (proposal, logits))
  with jax.disable_jit():
    verdict = jax.device_get(verify(keys, *rows, max_depth=max_depth))
  emitted = np.arange(max_depth + 1)[None] <= verdict.num_accepted[:, None]
  drawn = np.where(emitted, texts, -1)
  # What is emitted: the accepted nodes, then the verifier's own token.
  on_path = np.take_along_axis(np.asarray(rows[0].tokens), verdict.path[:, 1:], axis=1)
  tokens = np.concatenate([on_path, np.zeros((len(texts), 1), int)], axis=1)
  tokens[np.arange(len(texts)), verdict.num_accepted] = verdict.next_token
  np.testing.assert_array_equal(np.where(emitted, tokens, -1), drawn)
  weight = np.where(emitted, keys.chance, 1).prod(-1)
  _, first = np.unique(drawn, axis=0, return_index=True)  # texts that differ later are one outcome
  return Outcome(np.zeros(len(first), int), *(a[first] for a in (weight, verdict[1], drawn)))


def _tree_acceptance(parents, tokens, valid, table):
  """Returns f64[N], the probability that each node is taken once its parent is reached."""
  acceptance = np.ones(len(parents))
  for node in range(1, len(parents)):
    law = np.exp(_tree_logits(parents, tokens, table))[0, parents[node]]
    twins = [n for n in range(1, node) if (parents[n], tokens[n]) == (parents[node], tokens[node])]
    exists = 0 <= tokens[node] < V and valid[node] and not twins
    acceptance[node] = law[tokens[node]] if exists else 0
  return acceptance


@pytest.mark.parametrize('num_valid', [None, 4])
@pytest.mark.parametrize('case', ['random', 'sharp', 'target without a token', 'certain target'])
@pytest.mark.parametrize('name', TREES)
def test_coupled_emits_the_targets_law_on_trees(name, case, num_valid):
  table = TABLES[case][0]
  parents, proposal = _tree(name, num_valid)
  tokens, valid = np.asarray(proposal.tokens)[0], np.asarray(proposal.valid)[0]
  max_depth = max(len(_path(parents, node)) for node in range(len(parents)))
  assert max_depth >= 3
  logits = _tree_logits(parents, tokens, table)
  outcome = _enumerate_tree(verifiers.coupled.verify, proposal, logits, max_depth)
  weight = np.ones(1)
  law = output_law(outcome, weight, table, CONTEXT, max_depth + 1)
  np.testing.assert_allclose(law, sequence_law(table, CONTEXT, max_depth + 1), atol=1e-12)
  acceptance = _tree_acceptance(parents, tokens, valid, table)
  expected = theory.expected_tokens_tree(parents, acceptance) - 1
  np.testing.assert_allclose(expected_accepted(outcome, weight), expected, atol=1e-12)


@pytest.mark.parametrize('case', ['random', 'sharp', 'target without a token', 'ties'])
@pytest.mark.parametrize('name', TREES)
def test_greedy_emits_the_argmax_on_trees(name, case):
  table = TABLES[case][0]
  certain = _one_hot(table)  # of equal tokens the first
  text = np.argwhere(sequence_law(certain, CONTEXT, 4))[0]
  parents, proposal = _tree(name)
  # The tree as it is, and with one path after the other holding what is right.
  most = 0
  for right in range(len(parents)):
    tokens = np.array(proposal.tokens)
    path = _path(parents, right)
    tokens[0, path] = text[: len(path)]
    tree = proposal._replace(tokens=jnp.asarray(tokens))
    logits = _tree_logits(parents, tokens[0], table)
    outcome = enumerate_verdicts(verifiers.greedy.verify, tree, logits, max_depth=4)
    law = output_law(outcome, np.ones(1), certain, CONTEXT, 4)
    np.testing.assert_array_equal(law, sequence_law(certain, CONTEXT, 4))
    acceptance = _tree_acceptance(parents, tokens[0], np.ones(len(parents), bool), certain)
    expected = theory.expected_tokens_tree(parents, acceptance) - 1
    assert expected_accepted(outcome, np.ones(1)) == expected
    most = max(most, expected)
  assert most >= 3


@pytest.mark.parametrize('case', TABLES)
def test_coupled_and_greedy_on_chains(case):
  """Chains drawn from a drafter: a mixture over all of them, accepted with chance sum p q."""
  p, q = TABLES[case]
  proposal, logits, weight = _every_chain(p, q, 2, lambda drafts: 2)
  total, accepted = np.zeros((V, V, V)), 0.0
  for row in np.flatnonzero(weight):
    both = (proposal._replace(laws=None), logits)
    one, after = jax.tree.map(lambda a, row=row: a[row : row + 1], both)
    outcome = _enumerate_tree(verifiers.coupled.verify, one, after, 2)
    total += weight[row] * output_law(outcome, np.ones(1), p, CONTEXT, 3)
    accepted += weight[row] * expected_accepted(outcome, np.ones(1))
  np.testing.assert_allclose(total, sequence_law(p, CONTEXT, 3), atol=1e-12)
  same = (p * q)[CONTEXT]
  expected = sum(same[token] * (1 + (p * q)[CONTEXT[1], token].sum()) for token in range(V))
  np.testing.assert_allclose(accepted, expected, atol=1e-12)
  certain = _one_hot(p)
  outcome = enumerate_verdicts(verifiers.greedy.verify, proposal, logits, max_depth=2)
  law = output_law(outcome, weight, certain, CONTEXT, 3)
  np.testing.assert_allclose(law, sequence_law(certain, CONTEXT, 3), atol=1e-12)

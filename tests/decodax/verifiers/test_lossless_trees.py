"""The rules that are lossless on trees: their output has the target's law, summed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import check_compatible
from decodax import drafters
from decodax import verifiers
from decodax.noise import RoundKeys
from decodax.noise import row_keys
from decodax.types import Candidates
from decodax.types import Proposal
from tests.decodax.verifiers.chains import CASES
from tests.decodax.verifiers.chains import Tables
from tests.decodax.verifiers.chains import V
from tests.decodax.verifiers.draft_trees import UNEQUAL
from tests.decodax.verifiers.draft_trees import WIDE
from tests.decodax.verifiers.draft_trees import every_tree
from tests.decodax.verifiers.draft_trees import law_error
from tests.decodax.verifiers.draft_trees import mean_accepted
from tests.decodax.verifiers.draft_trees import table_tree
from tests.table_model import random_table

WOR, IID, COMPETING = Candidates.WITHOUT_REPLACEMENT, Candidates.IID, Candidates.COMPETING
SEVERAL, TOP, SAMPLED = Candidates.SEVERAL_DRAFTERS, Candidates.TOP_AND_ONE, Candidates.SAMPLED

OPTIMAL = verifiers.optimal(num_bins=16)  # few, to be quick; exact all the same
RULES = [
  verifiers.specinfer,
  verifiers.specinfer_drafters,
  verifiers.without_replacement,
  verifiers.kseq,
  verifiers.greedy_draft,
  verifiers.traversal,
  OPTIMAL,
]
PAIRS = [  # each rule with the drafts it is made for, then with others it takes
  (verifiers.specinfer, IID),
  (verifiers.specinfer_drafters, SEVERAL),
  (verifiers.without_replacement, WOR),
  (verifiers.kseq, IID),
  (verifiers.greedy_draft, TOP),
  (verifiers.traversal, WOR),
  (OPTIMAL, IID),
  (verifiers.without_replacement, IID),
  (verifiers.traversal, IID),
]
CHAIN = (-1, 0, 1, 2)
AWKWARD = [
  'random', 'equal', 'each misses one', 'disjoint', 'certain draft', 'certain target',
]  # fmt: skip


def _name(value):
  return value if isinstance(value, str) else getattr(value, 'name', None)


def _tables(case, kind):
  """The tables of a case; several drafters are its own and a third, in turn."""
  p, q = CASES[case]
  return Tables(p, np.stack([q, random_table(9, V)]) if kind is SEVERAL else q)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('case', AWKWARD)
@pytest.mark.parametrize(('rule', 'kind'), PAIRS[:7], ids=_name)
def test_the_output_has_the_target_s_law(rule, kind, case):
  p, q = _tables(case, kind)
  assert law_error(rule, every_tree(p, q, UNEQUAL, kind), p) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('case', ['random', 'each misses one'])
@pytest.mark.parametrize(('rule', 'kind'), PAIRS[7:], ids=_name)
def test_repeated_drafts_are_passed_over(rule, kind, case):
  p, q = _tables(case, kind)
  assert law_error(rule, every_tree(p, q, UNEQUAL, kind), p) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('case', ['random', 'draft misses a token', 'both certain'])
@pytest.mark.parametrize(('rule', 'kind'), PAIRS, ids=_name)
def test_there_may_be_more_children_than_tokens(rule, kind, case):
  p, q = _tables(case, kind)
  assert law_error(rule, every_tree(p, q, WIDE, kind), p, num_tokens=3) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('rule', RULES, ids=_name)
def test_a_chain_of_single_children_is_a_tree(rule):
  p, q = CASES['each misses one']
  kind = SEVERAL if SEVERAL in rule.supports else SAMPLED
  tree = every_tree(p, q[None] if kind is SEVERAL else q, CHAIN, kind)
  assert law_error(rule, tree, p) < 1e-12
  if rule is not verifiers.traversal:  # token by token, they are all speculative sampling
    chain = every_tree(p, q, CHAIN, SAMPLED)
    expected = mean_accepted(verifiers.speculative, chain)
    assert abs(mean_accepted(rule, tree) - expected) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('rule', [verifiers.without_replacement, verifiers.traversal], ids=_name)
def test_the_shape_may_depend_on_what_was_looked_at_before(rule):
  # Node 2 is missing if its sibling, node 1, is token 0, and so is what is below node 1.
  def exists(node, tokens):
    return node not in (2, 3) or tokens[1] != 0

  p, q = CASES['random']
  assert law_error(rule, every_tree(p, q, UNEQUAL, WOR, exists_fn=exists), p) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('rule', [verifiers.without_replacement, verifiers.traversal], ids=_name)
def test_branches_may_compete_for_nodes(rule):
  # Nodes 3 and 5 are below node 1, node 4 below its sibling. Node 4 exists only if node 3 is token
  # 0, and node 5 only if node 4 then is not: as if the two branches had one budget.
  parents = (-1, 0, 0, 1, 2, 1)

  def exists(node, tokens):
    return {4: tokens[3:4] == (0,), 5: tokens[4:5] != (0,)}.get(node, True)

  p, q = CASES['random']
  assert law_error(rule, every_tree(p, q, parents, COMPETING, exists_fn=exists), p) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('rule', [verifiers.without_replacement, verifiers.traversal], ids=_name)
def test_a_draft_dropped_for_what_it_is_would_show(rule):
  p, q = CASES['random']
  trees = every_tree(p, q, UNEQUAL, WOR)
  unlikely = (trees.proposal.tokens == 0) & (jnp.arange(len(UNEQUAL)) == 6)[None]
  proposal = trees.proposal._replace(valid=trees.proposal.valid & ~unlikely)
  assert law_error(rule, trees._replace(proposal=proposal), p) > 1e-4


# --- What a rule refuses -------------------------------------------------------------------------


@pytest.mark.parametrize('rule', RULES, ids=_name)
@pytest.mark.parametrize('kind', Candidates, ids=_name)
def test_biased_use_is_refused(rule, kind):
  drafter = table_tree(UNEQUAL, V)
  drafter = drafter._replace(shape=drafter.shape._replace(candidates=kind))
  if kind in rule.supports:
    check_compatible(drafter, rule)
    return
  with pytest.raises(ValueError, match=f'{rule.name}.*not exact for.*{kind.value}'):
    check_compatible(drafter, rule)


@pytest.mark.usefixtures('float64')
def test_what_is_refused_is_biased():
  p, q = CASES['random']
  wrong = [
    (verifiers.specinfer, WOR),
    (verifiers.kseq, WOR),
    (verifiers.kseq, TOP),
    (OPTIMAL, WOR),
  ]
  for rule, kind in wrong:
    assert kind not in rule.supports
    assert law_error(rule, every_tree(p, q, UNEQUAL, kind), p, num_tokens=3) > 1e-4, rule.name


def test_rules_for_chains_refuse_trees():
  with pytest.raises(ValueError, match='block'):
    check_compatible(table_tree(UNEQUAL, V), verifiers.block)
  with pytest.raises(ValueError, match='coupled'):
    check_compatible(drafters.ngram(), verifiers.traversal)


# --- Cost and numerics ---------------------------------------------------------------------------


def _large(rng, *, batch_size=3, vocab_size=4096, spread=1.0):
  """Returns a random float32 proposal of the tree `UNEQUAL`, and target logits."""
  size = len(UNEQUAL)
  shape = (batch_size, size, vocab_size)
  logits = rng.standard_normal(shape) * 3
  laws = logits + spread * rng.standard_normal(shape)
  tokens = np.zeros((batch_size, size), np.int32)
  for node in range(size):
    children = [child for child in range(1, size) if UNEQUAL[child] == node]
    noise = rng.gumbel(size=(batch_size, vocab_size))
    tokens[:, children] = np.argsort(-(laws[:, node] + noise), axis=-1)[:, : len(children)]
  parents = np.broadcast_to(np.asarray(UNEQUAL, np.int32), (batch_size, size))
  valid = np.ones((batch_size, size), bool)
  rows = [jnp.asarray(a) for a in (tokens, parents, valid, laws.astype(np.float32))]
  proposal = Proposal(rows[0], rows[1], rows[2], rows[3])
  return proposal, jnp.asarray(logits, jnp.float32)


def _keys(batch_size):
  zeros = jnp.zeros((batch_size,), jnp.int32)
  return RoundKeys(row_keys(0, jnp.arange(batch_size)), zeros, zeros)


def _verify(rule):
  # Compiled without optimisation: these run for milliseconds and compile for seconds.
  return jax.jit(
    lambda keys, proposal, logits: rule.verify(keys, proposal, logits, max_depth=3),
    compiler_options={'xla_backend_optimization_level': 0},
  )


@pytest.mark.parametrize('rule', [*RULES, verifiers.coupled, verifiers.threshold()], ids=_name)
def test_laws_are_kept_for_the_visited_nodes_only(rule):
  # As many nodes as a row has laws to spare: any array over nodes and vocabulary would show.
  proposal, logits = _large(np.random.default_rng(0))
  more = jax.tree.map(lambda a: jnp.concatenate([a] * 8, axis=1), (proposal, logits))
  args = (_keys(3), *more)
  compiled = _verify(rule).lower(*args).compile()
  memory, program = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and memory.temp_size_in_bytes < logits.nbytes * 8 / 2
  assert program is not None and 'sort(' not in program


@pytest.mark.parametrize('rule', RULES, ids=_name)
def test_a_row_is_decided_alone(rule):
  proposal, logits = _large(np.random.default_rng(1), batch_size=4, vocab_size=64)
  others = _large(np.random.default_rng(4), batch_size=4, vocab_size=64, spread=0)
  verify, keys = _verify(rule), _keys(4)
  together = verify(keys, proposal, logits)
  order = jnp.asarray([2, 0, 3, 1])
  permuted = verify(*jax.tree.map(lambda a: a[order], (keys, proposal, logits)))
  # Row 3 among rows whose drafts are all accepted.
  mixed = jax.tree.map(lambda a, b: a.at[:3].set(b[:3]), (proposal, logits), others)
  elsewhere = verify(keys, *mixed)
  for a, b, c in zip(together, permuted, elsewhere, strict=True):
    np.testing.assert_array_equal(a[order], b)
    np.testing.assert_array_equal(a[3], c[3])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize('rule', RULES, ids=_name)
def test_equal_laws_accept_everything(rule, dtype):
  rng = np.random.default_rng(2)
  proposal, logits = _large(rng, batch_size=512, vocab_size=32, spread=0)
  logits = logits.astype(dtype)
  laws = logits
  if SEVERAL in rule.supports:  # the law of a node itself is that of its parent's children
    laws = logits[:, np.maximum(UNEQUAL, 0)]
  if TOP in rule.supports:
    proposal = proposal._replace(valid=proposal.valid & (jnp.arange(len(UNEQUAL)) < 2)[None])
  verdict = _verify(rule)(_keys(512), proposal._replace(laws=laws), logits)
  depth = 1 if TOP in rule.supports else 2
  assert float(jnp.mean(verdict.num_accepted >= depth)) >= 1 - 1e-3


@pytest.mark.parametrize('rule', RULES, ids=_name)
def test_a_drafter_s_broken_laws_do_no_harm(rule):
  proposal, logits = _large(np.random.default_rng(3), vocab_size=16)
  proposal = proposal._replace(laws=jnp.full_like(logits, -jnp.inf))
  logits = jnp.where(jnp.arange(16)[None, None] == 5, 0, -jnp.inf) + 0 * logits
  verdict = _verify(rule)(_keys(3), proposal, logits)
  assert np.all(np.asarray(verdict.num_accepted) >= 0)
  emitted = np.where(verdict.num_accepted == 0, verdict.next_token, 5)
  np.testing.assert_array_equal(emitted, 5)

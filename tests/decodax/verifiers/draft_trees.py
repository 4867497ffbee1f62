"""Every tree that tables can draft, in each way of drawing children, and what a rule makes of it.

Axes: `R` drafted trees, `N` nodes, `K` drafters or children, `V` vocabulary.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from decodax import decode
from decodax import make_request
from decodax.decode import root_tokens
from decodax.decode import round_keys
from decodax.drafters.plain import stateless_init
from decodax.drafters.plain import stateless_observe
from decodax.drafters.plain import stateless_prefill
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Params
from decodax.types import Proposal
from decodax.types import Verifier
from tests.decodax.verifiers.chains import CONTEXT
from tests.decodax.verifiers.chains import log
from tests.enumeration import Outcome
from tests.enumeration import enumerate_verdicts
from tests.enumeration import output_law
from tests.table_model import sequence_law
from tests.table_model import table_model

# Depth 3, unequal branching, an inner node between leaves, a leaf before an inner node.
UNEQUAL = (-1, 0, 0, 1, 1, 2, 3)
# Three children, so that a law of fewer tokens leaves nodes invalid.
WIDE = (-1, 0, 0, 0, 2, 2)
_MISSING = -1


class Trees(NamedTuple):
  """All trees of one shape after `CONTEXT`, with the probability of each."""

  proposal: Proposal
  logits: jax.Array  # f64[R, N, V] of the target
  weight: np.ndarray  # f64[R]


def star(num_children: int) -> tuple[int, ...]:
  """Returns the parents of a tree of depth 1."""
  return (-1, *(0,) * num_children)


def every_tree(
  p: np.ndarray,
  q: np.ndarray,
  parents: tuple[int, ...],
  kind: Candidates,
  *,
  exists_fn: Callable[[int, tuple[int, ...]], bool] | None = None,
) -> Trees:
  """Returns all trees that tables can draft, nodes drawn in node order.

  Args:
    p: f64[V, V, V], the target.
    q: f64[V, V, V], the draft; f64[K, V, V, V] for `SEVERAL_DRAFTERS`, by rank among siblings.
    parents: of the nodes.
    kind: how children are chosen.
    exists_fn: (node, tokens of all nodes before it) -> whether it is drawn. Not for `TOP_AND_ONE`.
  """
  drafts = [((CONTEXT[-1],), 1.0)]
  for node in range(1, len(parents)):
    drafts = [
      ((*tokens, token), weight * chance)
      for tokens, weight in drafts
      for token, chance in _draws(q, parents, kind, exists_fn, node, tokens)
    ]
  packed = [_pack(p, q, parents, kind, tokens) for tokens, _ in drafts]
  columns = [np.stack(column) for column in zip(*packed, strict=True)]
  proposal = Proposal(*(jnp.asarray(column) for column in columns[:3]), laws=log(columns[3]))
  return Trees(proposal, log(columns[4]), np.asarray([weight for _, weight in drafts]))


def _context(parents, tokens, node):
  path = []
  while node >= 0:
    path.append(tokens[node])
    node = parents[node]
  return (*CONTEXT[:-1], *path[::-1])[-2:]


def _siblings(parents, node):
  return [other for other in range(1, len(parents)) if parents[other] == parents[node]]


def _law_of(q, parents, kind, tokens, node):
  """Returns f64[V], what `node` is drawn from, not normalised; zeros if nothing is left."""
  siblings = _siblings(parents, node)
  context = _context(parents, tokens, parents[node])
  if kind is Candidates.SEVERAL_DRAFTERS:
    return q[siblings.index(node) % len(q)][context]
  law = np.array(q[context])
  if kind is Candidates.TOP_AND_ONE:
    law[np.argsort(-law, kind='stable')[: len(siblings) - 1]] = 0
  if kind in (Candidates.WITHOUT_REPLACEMENT, Candidates.COMPETING):
    for other in siblings[: siblings.index(node)]:
      if tokens[other] != _MISSING:
        law[tokens[other]] = 0
  return law


def _draws(q, parents, kind, exists_fn, node, tokens):
  """Yields (token, probability) of a node; the token is missing if it cannot be drawn."""
  if tokens[parents[node]] == _MISSING or (exists_fn and not exists_fn(node, tokens)):
    return [(_MISSING, 1.0)]
  rank = _siblings(parents, node).index(node)
  if kind is Candidates.TOP_AND_ONE and rank < len(_siblings(parents, node)) - 1:
    law = q[_context(parents, tokens, parents[node])]
    return [(int(np.argsort(-law, kind='stable')[rank]), 1.0)]
  law = _law_of(q, parents, kind, tokens, node)
  if law.sum() == 0:
    return [(_MISSING, 1.0)]
  return [(token, chance) for token, chance in enumerate(law / law.sum()) if chance > 0]


def _pack(p, q, parents, kind, tokens):
  """Returns (tokens [N], parents [N], valid [N], q [N, V], p [N, V]), nodes that exist first."""
  size, vocab_size = len(parents), p.shape[-1]
  kept = [node for node in range(size) if tokens[node] != _MISSING]
  place = {node: index for index, node in enumerate(kept)}
  out_tokens, out_parents = np.zeros(size, np.int32), np.zeros(size, np.int32)
  out_parents[0] = -1
  # What is dead holds rubbish: neither a law nor a number.
  out_p = np.full((size, vocab_size), np.nan)
  out_q = np.zeros((size, vocab_size))
  for node in kept:
    out_tokens[place[node]] = tokens[node]
    context = _context(parents, tokens, node)
    out_p[place[node]] = p[context]
    if node:
      out_parents[place[node]] = place[parents[node]]
    if kind is Candidates.SEVERAL_DRAFTERS:
      if node:
        out_q[place[node]] = _law_of(q, parents, kind, tokens, node)
    elif kind is Candidates.TOP_AND_ONE:
      children = [child for child in kept if parents[child] == node]
      if children:
        out_q[place[node]] = _law_of(q, parents, kind, tokens, children[-1])
    else:
      out_q[place[node]] = q[context]
  return out_tokens, out_parents, np.arange(size) < len(kept), out_q, out_p


def outcome_of(rule: Verifier, trees: Trees) -> Outcome:
  """Returns all verdicts of the rule on all trees."""
  max_depth = trees.proposal.tokens.shape[1] - 1
  return enumerate_verdicts(rule.verify, trees.proposal, trees.logits, max_depth=max_depth)


def law_error(rule: Verifier, trees: Trees, p: np.ndarray, *, num_tokens: int = 4) -> float:
  """Returns how far the law of the next tokens is from the target's, at most."""
  outcome = outcome_of(rule, trees)
  np.testing.assert_allclose(np.bincount(outcome.row, outcome.weight), 1, atol=1e-12)
  law = output_law(outcome, trees.weight, p, CONTEXT, num_tokens)
  return float(np.abs(law - sequence_law(p, CONTEXT, num_tokens)).max())


def mean_accepted(rule: Verifier, trees: Trees) -> float:
  """Returns the mean number of accepted drafts a round."""
  outcome = outcome_of(rule, trees)
  return float(np.sum(trees.weight[outcome.row] * outcome.weight * outcome.num_accepted))


def laws_after_context(table: np.ndarray) -> np.ndarray:
  """Returns f64[..., V], the law after `CONTEXT`."""
  return table[..., CONTEXT[0], CONTEXT[1], :]


# --- The jitted loop, with its real random numbers, over several rounds --------------------------


def table_tree(parents: tuple[int, ...], vocab_size: int) -> Drafter:
  """Returns a drafter that draws a tree without replacement from the table `params.drafter`."""
  size = len(parents)
  depths = [0] * size
  for node in range(1, size):
    depths[node] = depths[parents[node]] + 1

  def propose(params, state, *, noise_fn, with_laws):
    del with_laws
    root = root_tokens(state)
    rows, last = jnp.arange(root.shape[0]), jnp.maximum(state.length - 2, 0)
    tokens, laws = [root] + [root] * (size - 1), []
    for node in range(size):
      before = tokens[parents[node]] if node else state.tokens[rows, last]
      laws.append(jnp.log(params.drafter[before, tokens[node]]))
      children = [child for child in range(1, size) if parents[child] == node]
      if children:
        noise = noise_fn(round_keys(state), vocab_size, depths[node] + 1, node)
        drawn = jax.lax.top_k(laws[node] + noise, len(children))[1]
        for rank, child in enumerate(children):
          tokens[child] = drawn[:, rank].astype(jnp.int32)
    shape = (root.shape[0], size)
    proposal = Proposal(
      tokens=jnp.stack(tokens, axis=1),
      parents=jnp.broadcast_to(jnp.asarray(parents, jnp.int32), shape),
      valid=jnp.ones(shape, bool),
      laws=jnp.stack(laws, axis=1),
    )
    return proposal, state.drafter

  return Drafter(
    shape=DraftShape(
      num_nodes=size,
      max_depth=max(depths),
      candidates=Candidates.WITHOUT_REPLACEMENT,
      parents=np.asarray(parents, np.int32),
    ),
    init=stateless_init,
    prefill=stateless_prefill,
    propose=propose,
    observe=stateless_observe,
  )


class ChiSquare(NamedTuple):
  """The statistic of what the loop emits against the target's exact law."""

  statistic: float
  freedom: int

  @property
  def p_value(self) -> float:
    return float(scipy.stats.chi2.sf(self.statistic, self.freedom))


def chi_square(
  rule: Verifier, p: np.ndarray, q: np.ndarray, *, num_runs: int, num_tokens: int
) -> ChiSquare:
  """Returns the test of `num_runs` rows of `num_tokens` tokens that the jitted loop decodes.

  Trees have the shape `UNEQUAL`; there are at least two rounds a row on average.
  """
  vocab_size = p.shape[-1]
  prompt = (1, 0)
  request = make_request(
    np.tile(prompt, (num_runs, 1)), max_new_tokens=num_tokens, vocab_size=vocab_size,
    temperature=1.0, seed=7, capacity=len(prompt) + num_tokens + 1,
  )  # fmt: skip
  run = jax.jit(
    functools.partial(
      decode, model=table_model(vocab_size), drafter=table_tree(UNEQUAL, vocab_size), verifier=rule
    )
  )
  tables = Params(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
  result = run(tables, request)
  assert float(np.mean(result.stats.num_target_calls)) > 2
  emitted = np.asarray(result.tokens)[:, len(prompt) : len(prompt) + num_tokens]
  cells = vocab_size**num_tokens
  counts = np.bincount(emitted @ vocab_size ** np.arange(num_tokens)[::-1], minlength=cells)
  expected = num_runs * sequence_law(p, prompt, num_tokens).ravel()
  return ChiSquare(float(np.sum((counts - expected) ** 2 / expected)), cells - 1)

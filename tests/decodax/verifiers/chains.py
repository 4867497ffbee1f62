"""Every chain that a table can draft, and what a verifier makes of them, exactly.

Axes: `R` drafted chains, `G` drafts, `N = G + 1` nodes, `V` vocabulary.
"""

from collections.abc import Callable
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from decodax.trees import chain_proposal
from decodax.types import Evidence
from decodax.types import ModelOutput
from decodax.types import Params
from decodax.types import Proposal
from decodax.types import Sampling
from decodax.types import Verifier
from tests.enumeration import Outcome
from tests.enumeration import enumerate_verdicts
from tests.table_model import random_table

V = 3
CONTEXT = (2, 1)  # what every chain follows


class Tables(NamedTuple):
  """Laws of a target and a drafter, each f64[V, V, V]."""

  p: np.ndarray
  q: np.ndarray


class Chains(NamedTuple):
  """All chains of G drafts after `CONTEXT`, with the probability of each."""

  proposal: Proposal
  logits: jnp.ndarray  # f64[R, N, V] of the target
  weight: np.ndarray  # f64[R]


def _masked(table, kept):
  """Returns the table with only the kept tokens bool[V] possible."""
  table = table * kept
  return table / table.sum(-1, keepdims=True)


def _one_hot(table):
  return np.eye(V)[table.argmax(-1)]


_P, _Q, _S = random_table(0, V), random_table(1, V), random_table(2, V, sharpness=3)
_NO_FIRST, _NO_LAST = np.arange(V) > 0, np.arange(V) < V - 1

CASES: dict[str, Tables] = {
  'random': Tables(_P, _Q),
  'close': Tables(_P, 0.9 * _P + 0.1 * _Q),
  'sharp target': Tables(_S, _Q),
  'sharp draft': Tables(_P, _S),
  'equal': Tables(_P, _P),
  'target misses a token': Tables(_masked(_P, _NO_FIRST), _Q),
  'draft misses a token': Tables(_P, _masked(_Q, _NO_LAST)),
  'each misses one': Tables(_masked(_P, _NO_FIRST), _masked(_Q, _NO_LAST)),
  'disjoint': Tables(_masked(_P, _NO_FIRST), _masked(_Q, ~_NO_FIRST)),
  'certain draft': Tables(_P, _one_hot(_Q)),
  'certain target': Tables(_one_hot(_P), _Q),
  'both certain': Tables(_one_hot(_P), _one_hot(_Q)),
}


def every_chain(
  tables: Tables, num_drafts: int, *, length_fn: Callable[[tuple], int] | None = None
) -> Chains:
  """Returns all V^G chains. `length_fn` maps the drafts to how many of them are submitted."""
  drafts = np.asarray(list(itertools.product(range(V), repeat=num_drafts)))
  lengths = np.full(len(drafts), num_drafts)
  if length_fn is not None:
    lengths = np.asarray([length_fn(tuple(row)) for row in drafts.tolist()])
  past = np.broadcast_to(np.asarray(CONTEXT), (len(drafts), 2))
  tokens = np.concatenate([past, drafts], axis=1)
  before, last = tokens[:, :-1], tokens[:, 1:]
  p, q = tables.p[before, last], tables.q[before, last]  # [R, N, V], after each node
  chosen = np.take_along_axis(q[:, :-1], drafts[:, :, None], axis=2)[..., 0]
  root = np.full(len(drafts), CONTEXT[-1], np.int32)
  proposal = chain_proposal(
    jnp.asarray(root), jnp.asarray(drafts, jnp.int32), jnp.asarray(lengths, jnp.int32),
    log(q[:, :-1]),
  )  # fmt: skip
  return Chains(proposal, log(p), chosen.prod(-1))


def log(laws: np.ndarray) -> jnp.ndarray:
  """Returns f64, the logits of laws."""
  with np.errstate(divide='ignore'):
    return jnp.asarray(np.log(laws))


def evidence_of(logits, *, temperature: float = 1.0) -> Evidence:
  """Returns the evidence of a forward pass with nothing in it but logits [R, N, V]."""
  hidden = jnp.zeros((*logits.shape[:2], 1))
  sampling = Sampling(jnp.full(logits.shape[:1], temperature))
  return Evidence(Params(()), sampling, ModelOutput(hidden), logits)


def outcome_of(
  rule: Verifier, proposal: Proposal, logits, *, max_depth: int | None = None, evidence=None
) -> Outcome:
  """Returns all verdicts of the rule; at temperature 1 unless the evidence says otherwise."""
  max_depth = proposal.tokens.shape[1] - 1 if max_depth is None else max_depth
  evidence = evidence_of(logits) if evidence is None else evidence

  def verify(decisions, proposal, seen, *, max_depth):
    logits, evidence = seen
    options = {'evidence': evidence} if rule.needs_evidence else {}
    return rule.verify(decisions, proposal, logits, max_depth=max_depth, **options)

  return enumerate_verdicts(verify, proposal, (logits, evidence), max_depth=max_depth)


def position_laws(outcome: Outcome, weight: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
  """Returns, for every prefix of accepted drafts, the law f64[V] of the token emitted after it."""
  laws: dict[tuple[int, ...], np.ndarray] = {}
  for row, chance, count, tokens in zip(*outcome, strict=True):
    for depth in range(count + 1):
      law = laws.setdefault(tuple(tokens[:depth].tolist()), np.zeros(V))
      law[tokens[depth]] += weight[row] * chance
  return {prefix: law / law.sum() for prefix, law in laws.items() if law.sum() > 1e-13}


def laws_after(tables: Tables, prefix: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Returns (p, q), each f64[V], after `CONTEXT` and the prefix."""
  before, last = (*CONTEXT, *prefix)[-2:]
  return tables.p[before, last], tables.q[before, last]

"""How often each rule keeps one of several drafts of a token, for pairs of laws.

Axes: `M` pairs of laws, `K` numbers of drafts, `B` any leading axes, `V` vocabulary.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from decodax import theory
from decodax.verifiers.optimal import optimal_acceptance

_CHUNK_NUMBERS = 2**20  # of one law array: what is in memory at a time

IID, DISTINCT, CHOSEN = 'with replacement', 'without replacement', 'chosen'

Array = np.ndarray


class Rule(NamedTuple):
  """A row of the tables."""

  name: str
  drafts: str  # how they are made
  color: str
  is_optimum: bool = False  # of all lossless rules on drafts made in this way
  one_draft_only: bool = False
  sampled: bool = False  # an estimate with an error, not an exact number


# Okabe and Ito's colours, which colour-blind people can tell apart.
RULES = (
  Rule('vanilla', IID, '#7F7F7F', one_draft_only=True),
  Rule('coupled', IID, '#CC79A7', one_draft_only=True),
  Rule('sample-and-match', IID, '#56B4E9'),
  Rule('SpecInfer', IID, '#0072B2'),
  Rule('k-SEQ', IID, '#009E73'),
  Rule('optimal choice', IID, '#E69F00'),
  Rule('optimum', IID, '#222222', is_optimum=True),
  Rule('sample-and-match, distinct', DISTINCT, '#56B4E9', sampled=True),
  Rule('recursive rejection', DISTINCT, '#D55E00', sampled=True),
  Rule('optimum, distinct', DISTINCT, '#222222', is_optimum=True),
  Rule('top k', CHOSEN, '#CC79A7'),
  Rule('greedy draft', CHOSEN, '#56B4E9'),
)


class Curves(NamedTuple):
  """Acceptance of every rule on every law of a family."""

  acceptance: Mapping[str, Array]  # f64[M, K] by the rule's name
  error: Mapping[str, Array]  # f64[M, K] standard error, for sampled rules


def acceptance_curves(
  p: Array, q: Array, max_drafts: int, *, num_samples: int = 16, seed: int = 0
) -> Curves:
  """Returns the acceptance of every rule of `RULES` for 1 to `max_drafts` drafts.

  Closed forms are exact to about 1e-5; sampled rules are unbiased, and exact for one draft. Laws
  are worked on in chunks of one shape, in float64.

  Args:
    p: f64[M, V], the target's laws.
    q: f64[M, V], the draft's laws.
    max_drafts: from 1 to V.
    num_samples: draws per law for the sampled rules, at least 2.
    seed: of these draws.

  Source: decodax.theory; the pass that finds all optima without replacement at once is its
  quadrature, carried along the vocabulary with the least bound instead of every bound.
  """
  num_laws, vocab_size = p.shape
  size = max(1, min(num_laws, _CHUNK_NUMBERS // vocab_size))
  chunks = []
  with jax.enable_x64(True):
    for index, first in enumerate(range(0, num_laws, size)):
      rows = np.minimum(np.arange(first, first + size), num_laws - 1)
      key = jax.random.fold_in(jax.random.key(seed), index)
      found = _curves(key, p[rows], q[rows], max_drafts=max_drafts, num_samples=num_samples)
      chunks.append(jax.tree.map(lambda a, n=num_laws - first: np.asarray(a)[:n], found))
  acceptance, error = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
  return Curves(acceptance, error)


@functools.partial(jax.jit, static_argnames=('max_drafts', 'num_samples'))
def _curves(key, p, q, *, max_drafts, num_samples):
  def by_number(rule: Callable) -> jax.Array:
    return jnp.stack([rule(p, q, k) for k in range(1, max_drafts + 1)], axis=-1)

  match_key, reject_key = jax.random.split(key)
  matched, match_error = _sampled(_match_distinct, match_key, p, q, max_drafts, num_samples)
  kept, kept_error = _sampled(_recursive_rejection, reject_key, p, q, max_drafts, num_samples)
  acceptance = {
    'vanilla': theory.overlap(p, q)[:, None],
    'coupled': theory.coupled_acceptance(p, q)[:, None],
    'sample-and-match': by_number(_match),
    'SpecInfer': by_number(theory.specinfer_acceptance),
    'k-SEQ': by_number(theory.kseq_acceptance),
    'optimal choice': by_number(optimal_acceptance),
    'optimum': by_number(theory.optimal_acceptance_with_replacement),
    'sample-and-match, distinct': matched,
    'recursive rejection': kept,
    'optimum, distinct': _optima_distinct(p, q, max_drafts),
    'top k': by_number(_top),
    'greedy draft': by_number(theory.greedy_draft_acceptance),
  }
  return acceptance, {'sample-and-match, distinct': match_error, 'recursive rejection': kept_error}


def _match(p, q, num_drafts):
  """f[B], how often a token of the target's own is among i.i.d. drafts."""
  return jnp.sum(p * -jnp.expm1(num_drafts * jnp.log1p(-jnp.minimum(q, 1))), axis=-1)


def _top(p, q, num_drafts):
  _, tokens = lax.top_k(q, num_drafts)
  return jnp.sum(jnp.take_along_axis(p, tokens, axis=-1), axis=-1)


def _sampled(draw, key, p, q, max_drafts, num_samples):
  """f[B, K] and f[B, K]: the mean of draws, each a whole curve, and its standard error."""
  keys = jax.random.split(key, num_samples)
  samples = lax.map(lambda each: draw(jax.random.split(each, max_drafts), p, q), keys)
  error = jnp.std(samples, axis=0, ddof=1) / num_samples**0.5
  return jnp.mean(samples, axis=0), error


def _match_distinct(keys, p, q):
  """f[B, K], what the drafts before cover and the next one is expected to; one key per draft."""

  def draft(carry, key):
    rest, covered = carry
    chosen = _is_drawn(key, rest)
    found = covered + jnp.sum(p * rest, axis=-1)
    covered = covered + jnp.sum(jnp.where(chosen, p, 0), axis=-1)
    return (_normalize(jnp.where(chosen, 0, rest)), covered), found

  return lax.scan(draft, (q, jnp.zeros_like(p[:, 0])), keys)[1].T


def _recursive_rejection(keys, p, q):
  """f[B, K], the acceptance along one sequence of rejected drafts; one key per draft."""

  def reject(carry, key):
    target, rest, rejected = carry
    rejected = rejected * (1 - theory.overlap(target, rest))
    chosen = _is_drawn(key, jnp.maximum(rest - target, 0))  # in proportion to a rejected draft
    target = _normalize(jnp.maximum(target - rest, 0))
    return (target, _normalize(jnp.where(chosen, 0, rest)), rejected), 1 - rejected

  return lax.scan(reject, (p, q, jnp.ones_like(p[:, 0])), keys)[1].T


def _is_drawn(key, weights):
  """bool[B, V], true at one token drawn in proportion to the weights; nowhere if all are 0."""
  below = jnp.cumsum(weights, axis=-1)
  level = jax.random.uniform(key, (len(weights), 1), weights.dtype) * below[:, -1:]
  token = jnp.sum(below <= level, axis=-1, keepdims=True)
  return jnp.arange(weights.shape[-1])[None] == token


def _normalize(weights):
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)


def _optima_distinct(p, q, max_drafts):
  """f[B, K], `theory.optimal_acceptance_without_replacement` of every number in one pass.

  The counts of one to K arrivals give all numbers of drafts at once, and 80 quadrature nodes an
  error of about 1e-6.
  """
  first, last, num_nodes = -3.7, 32.0, 80
  s = jnp.linspace(first, last, num_nodes)
  times = jnp.exp(s - jnp.exp(-s))[None]
  weights = times * (1 + jnp.exp(-s))[None] * ((last - first) / (num_nodes - 1))
  order = jnp.argsort(jnp.where(q > 0, p / jnp.where(q > 0, q, 1), jnp.inf), axis=-1)
  p, q = jnp.take_along_axis(p, order, axis=-1), jnp.take_along_axis(q, order, axis=-1)
  from_here = jnp.cumsum(q[:, ::-1], axis=-1)[:, ::-1]
  outside = jnp.concatenate([from_here[:, 1:], jnp.zeros_like(q[:, :1])], axis=-1)

  def add_token(carry, token):
    counts, least = carry  # f[B, K, T] the law of the number of arrivals; f[B, K]
    inside, rate, outside = (x[:, None] for x in token)
    arrived = -jnp.expm1(-rate * times)[:, None]
    one_more = jnp.concatenate([jnp.zeros_like(counts[:, :1]), counts[:, :-1]], axis=1)
    counts = counts + arrived * (one_more - counts)
    survival = jnp.exp(-outside * times)
    some = jnp.sum(counts * (outside * survival * weights)[:, None], axis=-1)
    some += jnp.where(outside > 0, survival[:, -1:], 0) * counts[:, :, -1]
    return (counts, jnp.minimum(least, inside + jnp.cumsum(some, axis=-1))), None

  counts = jnp.zeros((len(p), max_drafts, num_nodes), p.dtype).at[:, 0].set(1)
  tokens = jnp.cumsum(p, axis=-1).T, q.T, outside.T
  return lax.scan(add_token, (counts, jnp.ones_like(counts[..., 0])), tokens)[0][1]

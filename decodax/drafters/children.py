"""How the children of tree nodes are chosen from the drafter's logits, for many nodes at once.

Rows at temperature 0 take the most probable tokens in every case: the target's choice is certain
there, so any candidates are exact, and these are the best.

Axes: `B` batch, `W` nodes, `K` children of a node, `N` proposal nodes, `M` slots, `V` vocabulary.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from decodax import sampling as sampling_lib
from decodax.decode import round_keys
from decodax.drafters import draws
from decodax.noise import RoundKeys
from decodax.types import DecodeState
from decodax.types import Result


class Children(NamedTuple):
  """K candidates for each of W nodes, best or first drawn first."""

  tokens: jax.Array  # i32[B, W, K]
  scores: jax.Array  # f32[B, W, K] log-probability in the node's law, with the noise that chose it;
  # -inf where there is no such child
  log_q: jax.Array  # f32[B, W, K] log-probability in the node's law
  law: jax.Array | None  # f32[B, W, V] logits of the law they were drawn from, if wanted


def most_probable(logits: jax.Array, num_children: int) -> Children:
  """Returns the K most probable tokens after each node, ties to the lower id.

  They are a function of the context, `Candidates.DETERMINISTIC`, at any temperature.

  Args:
    logits: f32[B, W, V], penalised, not warped.
    num_children: K.
  """
  values, tokens = sampling_lib.top_k(logits, num_children)
  log_q = _normalize(values, logits)
  return Children(tokens.astype(jnp.int32), log_q, log_q, None)


def without_replacement(
  state: DecodeState,
  logits: jax.Array,
  depth,
  nodes: jax.Array,
  num_children: int,
  *,
  noise_fn: Callable,
  with_laws: bool,
) -> Children:
  """Returns K draws without replacement from the law of each node, in the order of the draws.

  The K largest sums of log-probability and Gumbel noise are exactly that, in that order; if the
  rule lets drafts be drawn with fresh numbers and the vocabulary is large, they are drawn with
  fewer of them (`draws`). Draws beyond the law's support have the score -inf.

  Args:
    state: for keys and sampling values.
    logits: f32[B, W, V], penalised, not warped.
    depth: i32[] or int, of the children.
    nodes: i32[W], what tells the nodes of this depth apart.
    num_children: K.
    noise_fn: the verifier's `draft_noise`.
    with_laws: return the laws too.

  Source: Stochastic Beams and Where to Find Them, arXiv:1903.06059, section 2.3; for drafting,
  Recursive Speculative Decoding, arXiv:2402.14160.
  """

  def choose(law, noise):
    scores, tokens = sampling_lib.top_k(law if noise is None else law + noise, num_children)
    values = jnp.take_along_axis(law, tokens, axis=-1)
    return tokens.astype(jnp.int32), *_normalize((scores, values), law)

  draw = None
  if sampling_lib.in_few_blocks(num_children, logits.shape[-1]):
    draw = functools.partial(draws.without_replacement, num_draws=num_children)
  return _draw(state, logits, depth, nodes, choose, noise_fn, with_laws, draw)


def independent(
  state: DecodeState,
  logits: jax.Array,
  depth,
  nodes: jax.Array,
  num_children: int,
  *,
  noise_fn: Callable,
  with_laws: bool,
) -> Children:
  """Returns K independent draws from the law of each node. Arguments as `without_replacement`.

  Coupled noise is one vector per position, with which all draws are the same token.

  Source: SpecInfer, arXiv:2305.09781, section 4.3; SpecTr, arXiv:2310.15141.
  """
  keys = round_keys(state)

  def choose(law, noise):
    if noise is None:
      first = sampling_lib.argmax(law)[..., None]
      tokens = jnp.broadcast_to(first, (*first.shape[:-1], num_children))
    else:

      def one(child):  # the first draw has the noise of an only child
        more = _noise(keys, law.shape[-1], depth, nodes + child * _NEXT_DRAW, noise_fn)
        return sampling_lib.argmax(law + jnp.where(_greedy(state), 0, more))

      tokens = jnp.moveaxis(lax.map(one, jnp.arange(num_children)), 0, -1)
    log_q = _normalize(jnp.take_along_axis(law, tokens, axis=-1), law)
    return tokens.astype(jnp.int32), log_q, log_q

  return _draw(state, logits, depth, nodes, choose, noise_fn, with_laws)


def top_and_one(
  state: DecodeState,
  logits: jax.Array,
  depth,
  nodes: jax.Array,
  num_children: np.ndarray,
  *,
  noise_fn: Callable,
  with_laws: bool,
) -> Children:
  """Returns, for each node, the most probable tokens and then one drawn from what they leave.

  The law is that of the draw: the tokens before it have the logit -inf. If the law of a node has
  no more tokens than children are wanted, the last of them is the draw, and it is certain.

  Args:
    state: for keys and sampling values.
    logits: f32[B, W, V], penalised, not warped.
    depth: i32[] or int, of the children.
    nodes: i32[W], what tells the nodes of this depth apart.
    num_children: i32[W], at least 1: children of each node, the draw included; K is the largest.
    noise_fn: the verifier's `draft_noise`.
    with_laws: return the laws too.

  Source: Towards Optimal Multi-draft Speculative Decoding, arXiv:2502.18779, greedy draft sampling.
  """
  num_most = int(num_children.max())
  batch_size, num_nodes, _ = logits.shape
  rows, columns = jnp.arange(batch_size)[:, None, None], jnp.arange(num_nodes)[None, :, None]

  def restrict(law):
    """Returns (top tokens i32[B, W, K], bool[B, W, K] which are taken as such, the rest's law)."""
    values, top = sampling_lib.top_k(law, num_most)
    following = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
    index = jnp.arange(num_most)[None, None]
    taken = (index < num_children[None, :, None] - 1) & (following > -jnp.inf)
    masked = law.at[rows, columns, jnp.where(taken, top, law.shape[-1])].set(-jnp.inf, mode='drop')
    return top, taken, masked

  def choose(law, noise):
    top, taken, rest = restrict(law)
    draw = sampling_lib.argmax(rest if noise is None else rest + noise)[..., None]
    place = taken.sum(-1, keepdims=True)  # of the draw, among the children
    index = jnp.arange(num_most)[None, None]
    tokens = jnp.where(index == place, draw, top)
    log_q = _normalize(jnp.take_along_axis(law, tokens, axis=-1), law)
    return tokens.astype(jnp.int32), jnp.where(index <= place, log_q, -jnp.inf), log_q

  children = _draw(state, logits, depth, nodes, choose, noise_fn, with_laws)
  if children.law is None:
    return children
  return children._replace(law=restrict(children.law)[2])


def penalize_paths(
  logits: jax.Array, state: DecodeState, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
  """Returns logits f32[B, W, V] penalised for the tokens before: the row's and each node's path's.

  Args:
    logits: f32[B, W, V].
    state: for the row's tokens; without a repetition penalty the logits stay as they are.
    tokens: i32[B, M], of the slots.
    mask: bool[B, W, M], the slots on each node's path.
  """
  if state.seen is None:
    return logits
  batch_size, num_nodes, vocab_size = logits.shape
  rows, columns = jnp.arange(batch_size)[:, None, None], jnp.arange(num_nodes)[None, :, None]
  seen = jnp.broadcast_to(state.seen[:, None], logits.shape)
  on_path = jnp.where(mask, tokens[:, None], vocab_size)
  seen = seen.at[rows, columns, on_path].set(True, mode='drop')
  return sampling_lib.penalize(logits, seen, state.sampling.repetition_penalty)


# --- Shared pieces -------------------------------------------------------------------------------

_NEXT_DRAW = 1 << 16  # between the node numbers of one node's independent draws


def _draw(state, logits, depth, nodes, choose, noise_fn, with_laws, draw=None):
  """Returns what `choose(law, noise)` picks; the noise is None if no live row is sampled.

  Args:
    draw: (law, (size) -> noise) -> draws as those of `choose` from few numbers, for rules that do
      not say which noise to draw with.
  """
  keys, live = round_keys(state), state.result == Result.RUNNING
  greedy = _greedy(state)
  noise = functools.partial(_noise, keys, depth=depth, nodes=nodes, noise_fn=noise_fn)

  def sample():
    law = jnp.where(greedy, logits, sampling_lib.warp(logits, state.sampling))
    if draw is None or noise_fn is not RoundKeys.draft_gumbel:
      picked = choose(law, jnp.where(greedy, 0, noise(logits.shape[-1])))
    else:
      drawn = tuple(draw(law, noise))
      any_greedy = jnp.any(greedy[:, 0, 0] & live)
      best = lax.cond(any_greedy, lambda: choose(logits, None), lambda: drawn)
      picked = jax.tree.map(functools.partial(jnp.where, greedy), best, drawn)
    return *picked, law if with_laws else None

  def take_best():
    return *choose(logits, None), logits if with_laws else None

  return Children(*lax.cond(sampling_lib.any_sampled(state.sampling, live), sample, take_best))


def _greedy(state):
  return (state.sampling.temperature == 0)[:, None, None]


def _noise(keys, size, depth, nodes, noise_fn):
  """Returns f32[B, W, size]."""
  return jax.vmap(lambda node: noise_fn(keys, size, depth, node), out_axes=1)(nodes)


def _normalize(values, law):
  """Returns values f32[B, W, K], or a tuple of such, less the log-normaliser of f32[B, W, V]."""
  total = jax.nn.logsumexp(law, axis=-1, keepdims=True)
  return jax.tree.map(lambda a: a - total, values)

"""Lookahead decoding: a Jacobi window that collects n-grams, and verifies them in the same pass.

Axes: `B` batch, `W` columns of the window, `n` its levels and the drafts of an n-gram, `G` n-grams
tried a round, `M = n W - 1` extra nodes, `N = 1 + G n` nodes, `H` keys, `E` stop ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decodax import sampling
from decodax.decode import root_tokens
from decodax.decode import round_keys
from decodax.drafters import ngram_pool
from decodax.drafters.guesses import random_tokens_of_prompt
from decodax.drafters.plain import stateless_prefill
from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import ExtraNodes


class LookaheadState(NamedTuple):
  """The window and what it has collected."""

  window: jax.Array  # i32[B, n, W] level l, column j: a guess for l + j places after the root.
  # [:, 0, 0] is not read: the root stands there
  pool: ngram_pool.NgramPool


def lookahead(
  *,
  window: int = 5,
  ngram: int = 4,
  num_ngrams: int = 5,
  num_keys: int = 4096,
  from_text: bool = True,
) -> Drafter:
  """Returns the drafter of lookahead decoding.

  The window holds the last n = ngram - 1 states of a Jacobi iteration on W places. Each round the
  target reads it beside the drafts and answers its newest level; the columns, with their answers,
  are n-grams that the model itself produced, and go to a pool. Drafts are the n-grams that start
  with the last emitted token: a tree, verified like any other.

  Within a call, column j of level l sees level 0 up to column j and its own column above it, as if
  its n-gram had been written after the window's beginning. No draft sees the window.

  Lossless with `greedy` and `coupled` (token-identical) and with `sample_and_match`
  (law-identical). A round costs N + M tokens.

  Args:
    window: W, columns.
    ngram: tokens of an n-gram with its key; the window has one level less.
    num_ngrams: G, n-grams kept for each key and tried in a round.
    num_keys: H, keys that the pool has room for.
    from_text: put the n-grams of the prompt and of the output into the pool, too.

  Raises:
    ValueError: if window, num_ngrams or num_keys is below 1, or ngram below 3.

  Source: Break the Sequential Dependency of LLM Inference Using Lookahead Decoding,
  arXiv:2402.02057, algorithm 2. Here the window starts full, of tokens of the prompt, and n-grams
  with a common beginning share its nodes.
  """
  if min(window, num_ngrams, num_keys) < 1 or ngram < 3:
    raise ValueError(
      f'need ngram >= 3 and the others >= 1: {window=}, {ngram=}, {num_ngrams=}, {num_keys=}'
    )
  levels = ngram - 1
  num_nodes = 1 + num_ngrams * levels
  depths, sees, top = window_layout(levels, window)

  def init(params, request, capacity):
    del params, capacity
    batch_size = request.tokens.shape[0]
    keys = RoundKeys(request.rng_keys, jnp.zeros((batch_size,), jnp.int32), request.prompt_length)
    tokens = _from_prompt(request, keys, levels * window)
    pool = ngram_pool.empty_pool(batch_size, num_keys, num_ngrams, levels)
    if from_text:
      start = jnp.zeros((batch_size,), jnp.int32)
      longest = jnp.max(request.prompt_length)
      pool = ngram_pool.insert_text(pool, request.tokens, start, request.prompt_length, longest)
    return LookaheadState(tokens.reshape(batch_size, levels, window), pool)

  def propose(params, state, *, noise_fn, with_laws):
    del params, noise_fn, with_laws
    own: LookaheadState = state.drafter
    root = root_tokens(state)
    proposal = ngram_pool.as_tree(root, *ngram_pool.lookup(own.pool, root))
    batch_size = root.shape[0]
    to_root = jnp.zeros((batch_size, len(depths), num_nodes), bool).at[:, :, 0].set(sees[:, 0])
    own_nodes = jnp.broadcast_to(sees[:, 1:], (batch_size, len(depths), len(depths)))
    extra = ExtraNodes(
      tokens=own.window.reshape(batch_size, -1)[:, 1:],
      depths=jnp.broadcast_to(depths, (batch_size, len(depths))),
      mask=jnp.concatenate([to_root, own_nodes], axis=2),
      opinions=jnp.broadcast_to(top, (batch_size, window)),
    )
    return proposal._replace(extra=extra), own

  def observe(params, drafter_state, observation, state):
    del params
    read = drafter_state.window.at[:, 0, 0].set(observation.proposal.tokens[:, 0])
    answers = sampling.argmax(observation.extra_logits)
    grown = jnp.concatenate([read, answers[:, None]], axis=1)  # [B, n + 1, W]
    live, pool = observation.num_emitted > 0, drafter_state.pool
    for column in range(window):
      pool = ngram_pool.insert(pool, grown[:, 0, column], grown[:, 1:, column], live)
    if from_text:
      start = state.length - observation.num_emitted
      pool = ngram_pool.insert_text(pool, state.tokens, start, state.length, levels + 1)
    return LookaheadState(_without_stops(state, grown[:, 1:]), pool)

  widths = sorted({1, 1 + levels, 1 + 2 * levels, num_nodes})
  return Drafter(
    shape=DraftShape(
      num_nodes=num_nodes,
      max_depth=levels,
      candidates=Candidates.DETERMINISTIC,
      widths=tuple(width for width in widths if width <= num_nodes),
    ),
    init=init,
    prefill=stateless_prefill,
    propose=propose,
    observe=observe,
  )


def window_layout(levels, window):
  """Returns the window without its root, level by level.

  They are (depths i32[M], which of root and window each node sees bool[M, 1 + M], the nodes of the
  newest level i32[W]).
  """
  level, column = (axis.reshape(-1) for axis in np.indices((levels, window)))
  in_column = (column[:, None] == column[None]) & (level[None] <= level[:, None])
  in_front = (level[None] == 0) & (column[None] <= column[:, None])
  top = (levels - 1) * window + np.arange(window) - 1
  return (level + column)[1:].astype(np.int32), (in_column | in_front)[1:], top.astype(np.int32)


def _from_prompt(rows, keys, size):
  """Returns i32[B, size], random tokens of each row's prompt; rows: a request or a state."""
  return random_tokens_of_prompt(rows.tokens, rows.prompt_length, keys.draft_uniform(size))


def _without_stops(state, window):
  """Returns the window with stop ids replaced: behind one there is nothing to learn."""
  flat = window.reshape(window.shape[0], -1)
  stops = jnp.any(flat[:, :, None] == state.eos_ids[:, None], axis=-1)
  other = _from_prompt(state, round_keys(state), flat.shape[1])
  return jnp.where(stops, other, flat).reshape(window.shape)

"""Parallel prompt decoding: trained prompt tokens behind the drafts draft the round after this one.

Axes: `B` batch, `D` prompt tokens of a node at most and depth of the trees, `C` copies of a prompt
token, `S = D + 1` states, `N` nodes, `R` ranks, `V` vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decodax import sampling
from decodax.decode import root_tokens
from decodax.drafters.plain import stateless_prefill
from decodax.static_trees import PromptTrees
from decodax.static_trees import StaticTree
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Params
from decodax.types import Proposal


class PromptState(NamedTuple):
  """What the prompt tokens behind the last accepted node said."""

  guesses: jax.Array  # i32[B, D, R] for each depth below the root the likeliest tokens, best first
  available: jax.Array  # i32[B] depths that have guesses: which tree is next


class Blocks(NamedTuple):
  """For each state the nodes that are read: the tree, the prompt tokens behind it, and padding."""

  parents: np.ndarray  # i32[S, N]
  valid: np.ndarray  # bool[S, N] the tree
  sources: np.ndarray  # i32[S, N] where a node's token is in [root, guesses D R, prompts D C]
  prompts: np.ndarray  # i32[S, N, D C] the nodes that are each node's prompt tokens; 0 where none
  available: np.ndarray  # i32[S, N] how many prompt tokens each node has, copies not counted


def prompt_tokens(
  trees: PromptTrees,
  *,
  vocab_size: int,
  embeddings_fn: Callable[[Params], jax.Array],
  num_copies: int = 1,
) -> Drafter:
  """Returns the drafter of parallel prompt decoding.

  Behind a node of the tree stand up to D prompt tokens, embeddings that were trained to be read
  where the next tokens are not known yet. They are part of the block that the target verifies:
  prompt token k stands k places after its node, sees the text, the node's path and the prompt
  tokens before it, and its law is of the token after its own place. Those behind the node where the
  round ends are the guesses of the next round: of m prompt tokens, candidates for m depths, and the
  next tree is that of state m. Rows are in states of their own; state 0, in which every row begins,
  has nothing to verify but its root. Keys and values of prompt tokens are never committed.

  The target must take `embeddings`, see `decodax.Model.extend`. Lossless with `greedy` and
  `coupled` (token-identical) and with `sample_and_match` (law-identical).

  Args:
    trees: the trees of all states and the prompt tokens behind their nodes.
    vocab_size: V, of the target.
    embeddings_fn: params -> f[D C, width], the copies of prompt token 1, then of 2, and so on, as
      the target's own embedding stores them. With more rows the first are used.
    num_copies: C, the ensemble prompt tokens of the paper. Copies of a prompt token share its
      place, each sees those of its own number only, and their logits are averaged. Each costs a
      node: the block is wider than `trees.num_inputs` if there are several.

  Raises:
    ValueError: if no tree is deeper than its root, a tree needs more ranks than V or more guesses
      than its state has, or num_copies < 1.

  Source: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
  Inference, arXiv:2405.18628, sections 3 and 4.
  """
  num_prompts = _check(trees, vocab_size, num_copies)
  max_depth = max(tree.max_depth for tree in trees.trees)
  num_ranks = 1 + max(int(tree.ranks.max()) for tree in trees.trees)
  blocks = lay_out(trees, num_ranks=num_ranks, num_copies=num_copies)
  num_rows = num_prompts * num_copies

  def init(params, request, capacity):
    del params, capacity
    batch_size = request.tokens.shape[0]
    guesses = jnp.zeros((batch_size, num_prompts, num_ranks), jnp.int32)
    return PromptState(guesses, jnp.zeros((batch_size,), jnp.int32))

  def propose(params, state, *, noise_fn, with_laws):
    del noise_fn, with_laws
    own: PromptState = state.drafter
    root = root_tokens(state)
    batch_size = root.shape[0]
    prompts = jnp.broadcast_to(vocab_size + jnp.arange(num_rows), (batch_size, num_rows))
    known = jnp.concatenate([root[:, None], own.guesses.reshape(batch_size, -1), prompts], axis=1)
    proposal = Proposal(
      tokens=jnp.take_along_axis(known, jnp.asarray(blocks.sources)[own.available], axis=1),
      parents=jnp.asarray(blocks.parents)[own.available],
      valid=jnp.asarray(blocks.valid)[own.available],
      embeddings=embeddings_fn(params)[:num_rows],
    )
    return proposal, own

  def observe(params, drafter_state, observation, state):
    del params, state
    verdict, here = observation.verdict, drafter_state.available
    end = jnp.take_along_axis(verdict.path, verdict.num_accepted[:, None], axis=1)[:, 0]
    nodes = jnp.asarray(blocks.prompts)[here, end]
    logits = jnp.take_along_axis(observation.logits, nodes[:, :, None], axis=1)
    logits = logits.reshape(-1, num_prompts, num_copies, vocab_size).mean(axis=2)
    guesses = sampling.top_k(logits, num_ranks)[1].astype(jnp.int32)
    return PromptState(guesses, jnp.asarray(blocks.available)[here, end])

  return Drafter(
    shape=DraftShape(
      num_nodes=blocks.parents.shape[1],
      max_depth=max_depth,
      candidates=Candidates.DETERMINISTIC,
      needs_logits=True,
      vocab_size=vocab_size,
    ),
    init=init,
    prefill=stateless_prefill,
    propose=propose,
    observe=observe,
  )


def lay_out(trees: PromptTrees, *, num_ranks: int, num_copies: int = 1) -> Blocks:
  """Returns the blocks of all states, each as wide as the widest.

  A prompt token is the child of the one before it, the first of its node; so what a node sees, and
  how deep it is, is the same rule for tree and prompt tokens. Padding hangs below the root.

  Args:
    trees: the trees.
    num_ranks: R, guesses of a depth.
    num_copies: C.
  """
  num_prompts = len(trees.trees) - 1
  states = list(zip(trees.trees, trees.num_prompts, strict=True))
  widest = max(tree.num_nodes + num_copies * int(each.sum()) for tree, each in states)
  # A block of one node more than its depth would be taken for a chain.
  widest = max(widest, 2 + max(tree.max_depth for tree in trees.trees))
  options = dict(num_nodes=widest, num_prompts=num_prompts, num_ranks=num_ranks)
  found = [_lay_out_one(*state, num_copies=num_copies, **options) for state in states]
  return Blocks(*(np.stack(arrays) for arrays in zip(*found, strict=True)))


def _lay_out_one(
  tree: StaticTree, counts, *, num_nodes, num_prompts, num_ranks, num_copies
) -> Blocks:
  """Returns the block of one state, without the axis of states."""
  parents, sources = np.zeros((2, num_nodes), np.int32)
  parents[: tree.num_nodes] = tree.parents
  sources[: tree.num_nodes] = tree.candidate_slots(num_ranks)
  prompts = np.zeros((num_nodes, num_prompts, num_copies), np.int32)
  first_source, place = 1 + num_prompts * num_ranks, tree.num_nodes
  for node, count in enumerate(counts):
    above = np.full(num_copies, node)
    for number in range(count):
      here = place + np.arange(num_copies)
      parents[here] = above
      sources[here] = first_source + number * num_copies + np.arange(num_copies)
      prompts[node, number] = above = here
      place += num_copies
  return Blocks(
    parents=parents,
    valid=np.arange(num_nodes) < tree.num_nodes,
    sources=sources,
    prompts=prompts.reshape(num_nodes, -1),
    available=np.pad(np.asarray(counts, np.int32), (0, num_nodes - tree.num_nodes)),
  )


def _check(trees, vocab_size, num_copies):
  """Returns D, once the arguments are known to go together."""
  if num_copies < 1:
    raise ValueError(f'num_copies must be at least 1: {num_copies=}')
  depths = [tree.max_depth for tree in trees.trees]
  if max(depths) == 0:
    raise ValueError(
      f'no tree is deeper than its root: there is nothing to draft with {trees.num_inputs} inputs '
      f'and these acceptances; give more, or use plain()'
    )
  if any(depth > state for state, depth in enumerate(depths)):
    raise ValueError(f'state m has guesses for m depths, but the trees have depths {depths}')
  num_ranks = 1 + max(int(tree.ranks.max()) for tree in trees.trees)
  if num_ranks > vocab_size:
    raise ValueError(f'the trees have {num_ranks} ranks, the vocabulary {vocab_size} tokens')
  return len(depths) - 1

"""Records and protocols: what a model, a drafter and a verifier are, and what a loop carries.

Axes: `B` batch rows, `T` tokens of a block, `N` proposal nodes, `D` maximal draft depth, `V`
vocabulary, `S` token slots of a row, `E` stop ids, `K` tokens of a path.

p is always the target's law, q the draft's. A *law* is stored as logits: the law is their softmax,
and an impossible token has the logit -inf.
"""

from collections.abc import Callable
import enum
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any

# --- The model ---------------------------------------------------------------------------------


class ModelOutput(NamedTuple):
  """What a forward pass over a block of T tokens returns."""

  hidden: jax.Array  # f[B, T, hidden] what the head multiplies
  features: PyTree = ()  # named taps of the residual stream, each f[B, T, ...]; () if none asked


class Model(NamedTuple):
  """A language model as four pure functions. Parameters are always an argument.

  A committed *cache* and the *block* of new tokens are pytrees of the model's own; decodax never
  looks inside either. Rows are independent: nothing a function returns for one row may depend on
  another.
  """

  init_cache: Callable[..., PyTree]
  """(params, batch_size, capacity) -> an empty cache for `capacity` tokens a row."""
  extend: Callable[..., tuple[ModelOutput, PyTree]]
  """(params, cache, tokens i32[B, T], positions i32[B, T], mask bool[B, T, T]) -> output, block.

  Reads the cache and never writes it. Row b sees all its committed tokens and, inside the block,
  what `mask[b]` allows. With `scratch=block, offset=i32[]` the T tokens are written into an
  earlier block of N nodes at `offset`, `mask` is bool[B, T, N] over that block, and the returned
  block is the updated one. A model that drafts by prompt tokens also takes `embeddings=f[E, D]`:
  the token V + e then stands for row e, an embedding of no token's."""
  commit: Callable[..., PyTree]
  """(cache, block, path i32[B, K], count i32[B]) -> the cache with, for each row, the first
  `count` nodes of `path` appended. Rollback is not committing."""
  unembed: Callable[..., jax.Array]
  """(params, hidden f[..., hidden]) -> logits f32[..., V] of each token's successor."""
  vocab_size: int
  init_scratch: Callable[..., PyTree] | None = None
  """(params, batch_size, num_nodes) -> an empty block, for drafters that grow a block in steps.
  None if the model cannot."""


class Params(NamedTuple):
  """Parameters of the target, and of whatever drafter, verifier and controller bring along."""

  target: PyTree
  drafter: PyTree = ()
  verifier: PyTree = ()
  controller: PyTree = ()  # of the drafter's length control


# --- Sampling and requests ---------------------------------------------------------------------


class Sampling(NamedTuple):
  """Sampling values, one per row; None switches a rule off for the whole batch at compile time."""

  temperature: jax.Array  # f32[B] 0 is greedy
  top_k: jax.Array | None = None  # i32[B] 0 is off
  top_p: jax.Array | None = None  # f32[B] 1 is off
  min_p: jax.Array | None = None  # f32[B] 0 is off
  repetition_penalty: jax.Array | None = None  # f32[B] 1 is off


class Request(NamedTuple):
  """Prompts with everything that may differ from row to row. All of it is traced."""

  tokens: jax.Array  # i32[B, S] prompts, right-padded; S is also the limit of prompt + output
  prompt_length: jax.Array  # i32[B]
  rng_keys: jax.Array  # key[B]
  sampling: Sampling
  max_new_tokens: jax.Array  # i32[B]
  eos_ids: jax.Array  # i32[B, E] padded with -1


# --- One round ---------------------------------------------------------------------------------


class ExtraNodes(NamedTuple):
  """M nodes that the target reads beside a proposal. They are never committed.

  A verifier has them read for a second opinion on every node of the proposal; a drafter, to draft
  the next round. Either way they are part of the same forward pass. None of the proposal's nodes
  sees them.
  """

  tokens: jax.Array  # i32[B, M]
  depths: jax.Array  # i32[B, M] how far each one's position is from the root's
  mask: jax.Array  # bool[B, M, N + M] which of the proposal's nodes, then of these, each one sees
  opinions: jax.Array  # i32[B, Q] the extra nodes whose logits are wanted. For a verifier Q is N:
  # for each node of the proposal, the extra node that judges it


class Proposal(NamedTuple):
  """A draft tree. Node 0 is the last emitted token, which is not in the cache yet."""

  tokens: jax.Array  # i32[B, N]
  parents: jax.Array  # i32[B, N] parents[:, i] < i; -1 at the root
  valid: jax.Array  # bool[B, N] valid nodes come first, and parents of valid nodes are valid; the
  # others are read like them, and are no candidates
  laws: jax.Array | None = None  # f32[B, N, V] logits of the law of each node's children, or None
  trusted: jax.Array | None = None  # bool[B, N] nodes to be emitted even if the target disagrees;
  # lossless verifiers do not read it
  extra: ExtraNodes | None = None  # what the drafter has the target read for it
  embeddings: jax.Array | None = None  # f[E, D] what the tokens V + e of invalid nodes stand for


class Verdict(NamedTuple):
  """What a verifier decided about a proposal."""

  path: jax.Array  # i32[B, D + 1] accepted nodes, root first; entries past num_accepted are dead
  num_accepted: jax.Array  # i32[B] accepted draft tokens, the root not counted
  next_token: jax.Array  # i32[B] the token after the path


class Evidence(NamedTuple):
  """What a verifier may look at besides the warped laws, if it says `needs_evidence`."""

  params: Params
  sampling: Sampling
  output: ModelOutput  # of every node of the proposal: [B, N, ...]
  logits: jax.Array  # f32[B, N, V] penalised, not warped
  opinions: jax.Array | None = None  # f32[B, N, V] the same at `ExtraNodes.opinions`


class Candidates(enum.Enum):
  """How the children of a node are chosen: what a verifier must know to be exact."""

  NONE = 'none'  # root only
  DETERMINISTIC = 'deterministic'  # a function of the context (n-grams, top-k, argmax)
  SAMPLED = 'sampled'  # one child a node, drawn from the node's law
  IID = 'iid'  # drawn from the node's law, independently; how many is settled before the first
  SEVERAL_DRAFTERS = 'several_drafters'  # as IID, but each from a law of its own: `laws[b, i]` is
  # the law that node i itself was drawn from, and row 0 is not read
  WITHOUT_REPLACEMENT = 'without_replacement'  # drawn from the node's law one after another, never
  # the same token twice; node order is the order of the draws
  COMPETING = 'competing'  # as WITHOUT_REPLACEMENT, but branches compete for nodes: whether a node
  # exists depends on tokens in other branches (stochastic beams, node budgets)
  CARRIED = 'carried'  # as SAMPLED, but drafts of a rejected round may stay: for rules whose
  # decision on a draft does not depend on drafts below it
  TOP_AND_ONE = 'top_and_one'  # the most probable tokens, then one child drawn from the node's law,
  # in which those tokens have the logit -inf


class DraftShape(NamedTuple):
  """Static facts about a drafter's proposals."""

  num_nodes: int  # N, the root included
  max_depth: int  # D
  candidates: Candidates
  parents: np.ndarray | None = None  # i32[N] if the tree's topology never changes
  widths: tuple[int, ...] = ()  # block widths worth compiling; () means (num_nodes,)
  needs_logits: bool = False  # does `observe` read the target's logits?
  vocab_size: int | None = None  # of the model that drafts, if one does; must be the target's

  @property
  def is_chain(self) -> bool:
    """Is every node the child of the node before it?"""
    return self.num_nodes == self.max_depth + 1


class Observation(NamedTuple):
  """What a round shows the drafter. `verdict` is what was emitted, cut at stops and budgets."""

  proposal: Proposal
  verdict: Verdict
  num_emitted: jax.Array  # i32[B] 0 for rows that are done; else num_accepted + 1
  output: ModelOutput  # of every node: [B, N, ...]
  logits: jax.Array | None  # f32[B, N, V] if `DraftShape.needs_logits`
  extra_logits: jax.Array | None = None  # f32[B, Q, V] at `Proposal.extra.opinions`, not penalised


class Drafter(NamedTuple):
  """Proposes tokens. Pure functions around an explicit state, as in Optax."""

  shape: DraftShape
  init: Callable[..., PyTree]
  """(params, request, capacity) -> the drafter's state before the prompt is read."""
  prefill: Callable[..., PyTree]
  """(params, drafter_state, tokens i32[B, C], positions i32[B, C], count i32[B], output) -> state.
  Called for each chunk of the prompt as the target reads it; `output` is the target's."""
  propose: Callable[..., tuple[Proposal, PyTree]]
  """(params, state: DecodeState, *, noise_fn, with_laws) -> the proposal, the drafter's state."""
  observe: Callable[..., PyTree]
  """(params, drafter_state, observation, state: DecodeState) -> the drafter's state. `state` is
  the decode state after the round."""


class Verifier(NamedTuple):
  """A rule that accepts a path of a proposal and picks the next token."""

  name: str
  exactness: str  # 'token-identical', 'law-identical' or 'lossy: ...'
  verify: Callable[..., Verdict]
  """(keys: RoundKeys, proposal, target_logits f32[B, N, V], *, max_depth) -> Verdict. The logits
  are warped; at temperature 0 all but the argmax are -inf. With `needs_evidence` it also gets
  `evidence=`, and the draft laws of rows at temperature 0 are those of temperature 1: a rule that
  compares laws learns nothing from two point masses."""
  draft_noise: Callable[..., jax.Array]
  """(keys: RoundKeys, vocab_size, depth, node=0) -> f32[B, V], the Gumbel noise with which a
  sampling drafter must draw the children, at `depth` below the root, of `node`."""
  supports: frozenset[Candidates]
  needs_laws: bool = False  # does it read Proposal.laws?
  chains_only: bool = False
  needs_evidence: bool = False  # is `verify` called with an `Evidence`?
  extra_nodes: Callable[..., ExtraNodes] | None = None
  """(proposal) -> nodes to run through the same forward pass, for `Evidence.opinions`."""

  @property
  def lossless(self) -> bool:
    """Is the output's law the target's? Then temperature 0 is plain greedy decoding."""
    return not self.exactness.startswith('lossy')


# --- The loop ----------------------------------------------------------------------------------


class Result(enum.IntEnum):
  """Why a row stopped."""

  RUNNING = 0
  EOS = 1  # emitted one of its stop ids
  LENGTH = 2  # emitted max_new_tokens
  CAPACITY = 3  # its row of the token buffer is full
  NON_FINITE = 4  # the target's logits were NaN or infinite; the round was dropped
  UNSATISFIABLE = 5  # a constraint on the output that nothing can meet any more


class Stats(NamedTuple):
  """Counters per row, over the rounds in which the row was live."""

  num_target_calls: jax.Array  # i32[B] verifying forward passes; prefill is not counted
  num_emitted: jax.Array  # i32[B] bonus tokens included
  num_accepted: jax.Array  # i32[B] emitted tokens that a drafter proposed
  num_drafted: jax.Array  # i32[B] valid draft nodes
  num_proposed_at: jax.Array  # i32[B, D] rounds with a draft at depth i + 1
  num_tested_at: jax.Array  # i32[B, D] rounds whose path reached depth i and had a draft below it
  num_accepted_at: jax.Array  # i32[B, D] rounds whose path reached depth i + 1


class DecodeState(NamedTuple):
  """Everything a decoding loop carries."""

  # The sequence. Invariant: the cache holds exactly tokens[:, :length - 1].
  tokens: jax.Array  # i32[B, S]
  length: jax.Array  # i32[B] prompt and emitted tokens; tokens[b, length - 1] is the root
  prompt_length: jax.Array  # i32[B]
  seen: jax.Array | None  # bool[B, V] tokens of the row so far, with a repetition penalty only
  # The models.
  cache: PyTree
  drafter: PyTree
  # Randomness.
  rng_keys: jax.Array  # key[B]
  round: jax.Array  # i32[B] rounds in which the row was live
  # What the user asked for.
  sampling: Sampling
  max_new_tokens: jax.Array  # i32[B]
  eos_ids: jax.Array  # i32[B, E]
  # Outcome.
  result: jax.Array  # i32[B] a `Result`
  stats: Stats


class RoundInfo(NamedTuple):
  """What one round did."""

  proposal: Proposal
  verdict: Verdict
  tokens: jax.Array  # i32[B, D + 1] emitted tokens, the first num_emitted of each row
  num_emitted: jax.Array  # i32[B] 0 for rows that are done


class DecodeResult(NamedTuple):
  """What a finished generation returns."""

  tokens: jax.Array  # i32[B, S] prompt and output, 0 beyond length
  length: jax.Array  # i32[B]
  prompt_length: jax.Array  # i32[B]
  result: jax.Array  # i32[B] a `Result`
  stats: Stats

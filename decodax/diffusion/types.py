"""Records of masked diffusion: the network, what a policy sees and says, what the loop carries.

Axes: `B` batch rows, `L` positions of prompt and canvas, `W` slots of the window a policy sees, `V`
vocabulary, `E` stop ids.

A row is its prompt and then its *canvas*, which starts as MASK. Decoding goes block by block; the
*window* is the W positions from the start of the row's block on, of which the block's are eligible.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from decodax.diffusion.keys import StepKeys
from decodax.types import Model
from decodax.types import PyTree
from decodax.types import Sampling

# --- The network -------------------------------------------------------------------------------


class MaskedModel(NamedTuple):
  """A model that predicts masked tokens, and what one must know to ask it. All static."""

  model: Model
  mask_id: int
  shifted: bool = False  # is the token at position i predicted by the hidden state at i - 1?
  block_size: int | None = None  # of a block-causal network; None: every token sees every other
  forced: bool = False  # does a block-causal one know masks in earlier blocks (D2F)? Then several
  # blocks may be in flight.


class Params(NamedTuple):
  """Parameters of the network, and of a policy that brings some along."""

  target: PyTree
  policy: PyTree = ()


# --- What a policy sees and says -----------------------------------------------------------------


class Summary(NamedTuple):
  """What policies want to know of a law, gathered in one pass over the logits."""

  best: jax.Array  # i32[...] the most probable token
  top: jax.Array  # f32[...] its probability
  second: jax.Array  # f32[...] the probability of the next one
  entropy: jax.Array  # f32[...] in nats
  log_normalizer: jax.Array  # f32[...] log sum exp of the logits


class View(NamedTuple):
  """What a policy sees of one step: each row's window."""

  tokens: jax.Array  # i32[B, W] what stands there now, MASK where nothing does
  eligible: jax.Array  # bool[B, W] MASK, in the row's block, and the row is live
  editable: jax.Array  # bool[B, W] written by an earlier step of this block: may be taken back
  positions: jax.Array  # i32[B, W]
  candidates: jax.Array  # i32[B, W] the token drawn for each slot; at temperature 0 the best one
  confidence: jax.Array  # f32[B, W] its probability at temperature 1, nothing excluded
  summary: Summary  # [B, W] of the laws at temperature 1, nothing excluded
  logits: jax.Array  # f32[B, W, V] of those laws; that of MASK is -inf
  laws: jax.Array  # f32[B, W, V] logits of the laws that candidates are drawn from
  step: jax.Array  # i32[B] forwards spent on this block before this one
  num_masks: jax.Array  # i32[B] masks of the block when it was entered
  greedy: jax.Array  # bool[B] rows at temperature 0
  sequence: jax.Array  # i32[B, L] the whole row
  canvas_start: jax.Array  # i32[B] where the row's prompt ends
  canvas_end: jax.Array  # i32[B]
  mask_id: int
  keys: StepKeys  # fresh random numbers of this step
  shadow: jax.Array | None = None  # f32[B, W, V] leave-one-out logits, if the policy wants them


class Selection(NamedTuple):
  """What a policy does in one step. Slots that it may not touch are ignored."""

  commit: jax.Array  # bool[B, W] eligible slots that take a token; with `Policy.revokes` editable
  # ones too, which take another
  state: PyTree  # the policy's own, every array with a leading B
  tokens: jax.Array | None = None  # i32[B, W] which tokens; None: the candidates
  revoke: jax.Array | None = None  # bool[B, W] editable slots that become MASK again
  hold: jax.Array | None = None  # bool[B] stay in the block even if no mask is left
  failed: jax.Array | None = None  # bool[B] rows that end here, `Result.UNSATISFIABLE`


def _one_by_one(width: int) -> int:
  return width


class Policy(NamedTuple):
  """Which slots to fill in a step. Pure functions around an explicit state, as in Optax.

  The loop starts every block with the state that `init` returns.
  """

  name: str
  exactness: str  # what it reproduces or gives up
  init: Callable[..., PyTree]
  """(batch_size, width, vocab_size) -> the state at the start of a block; arrays lead with B."""
  select: Callable[..., Selection]
  """(params, state, view) -> the selection."""
  max_steps: Callable[[int], int] = _one_by_one
  """width -> after how many forwards on one block the loop fills what is left and moves on."""
  guarded: bool = True  # does the loop fill the most confident slot where a row fills none?
  revokes: bool = False  # may it change what it has written?
  wants_shadow: bool = False  # does it read `View.shadow`?


class BlockRule(NamedTuple):
  """Where a row's block ends."""

  width: int  # W; no block is longer
  size: int  # the length of a block about which nothing is known
  end: Callable[..., jax.Array] | None = None
  """(view, room i32[B]) -> i32[B], the block's length in 1..room; called on a block's first
  forward. None: every block has `size` slots."""


# --- The loop ----------------------------------------------------------------------------------


class Board(NamedTuple):
  """What a cache rule sees of the rows."""

  tokens: jax.Array  # i32[B, L]
  decoded: jax.Array  # bool[B, L] holds a token: not MASK, and before `length`
  length: jax.Array  # i32[B] prompt and canvas
  start: jax.Array  # i32[B] of the block, and of the window
  block_step: jax.Array  # i32[B] forwards since the block was entered
  step: jax.Array  # i32[B] forwards of the row
  live: jax.Array  # bool[B]


class Reading(NamedTuple):
  """What one forward pass gave."""

  hidden: jax.Array  # f[B, W, hidden]; unembed gives the law of the window's slots, no shift left
  num_queries: jax.Array  # i32[B] positions that were recomputed
  shadow: jax.Array | None = None  # f[B, W, hidden]


class CacheRule(NamedTuple):
  """Which positions a step recomputes, and whose keys and values it takes from before."""

  name: str
  exactness: str
  init: Callable[..., PyTree]
  """(params, board, *, net, width) -> the rule's state; reads the prompt if it must."""
  read: Callable[..., tuple[Reading, PyTree]]
  """(params, state, board, *, net, width, shadow: bool) -> what the window predicts, the state."""
  branch: Callable[..., tuple[Reading, PyTree]] | None = None
  """(params, state, board, candidates i32[B, C, W], *, net, width) -> as `read`, with the window
  holding each of C candidates in turn: hidden is f[B, C, W, hidden]. None: the rule cannot."""
  report: Callable[..., PyTree] | None = None
  """(state) -> what the rule has to say about itself."""
  allows_revoking: bool = True


class DenoiseStats(NamedTuple):
  """Counters per row, over the steps in which the row was live."""

  num_calls: jax.Array  # i32[B] forward passes; reading the prompt is not counted
  num_queries: jax.Array  # i32[B] positions recomputed by them
  num_committed: jax.Array  # i32[B] slots that went from MASK to a token, each time they did
  num_revoked: jax.Array  # i32[B] slots that went back to MASK
  num_edited: jax.Array  # i32[B] tokens replaced by another
  num_blocks: jax.Array  # i32[B] blocks finished


class DenoiseState(NamedTuple):
  """Everything the denoising loop carries."""

  # The sequence.
  tokens: jax.Array  # i32[B, L] prompt and canvas; 0 beyond the canvas
  given: jax.Array  # bool[B, L] prompt and template: never changed
  prompt_length: jax.Array  # i32[B]
  length: jax.Array  # i32[B] prompt and canvas
  committed_at: jax.Array  # i32[B, L] the row's forward, from 0, that wrote the slot; else -1
  # The block at work.
  start: jax.Array  # i32[B]
  end: jax.Array  # i32[B]
  block_step: jax.Array  # i32[B] forwards since it was entered
  num_masks: jax.Array  # i32[B] its masks then
  policy: PyTree
  # The network.
  cache: PyTree
  # Randomness.
  rng_keys: jax.Array  # key[B]
  step: jax.Array  # i32[B] forwards of the row
  # What the user asked for.
  sampling: Sampling
  eos_ids: jax.Array  # i32[B, E]
  # Outcome.
  result: jax.Array  # i32[B] a `decodax.Result`
  stats: DenoiseStats


class DenoiseResult(NamedTuple):
  """What a finished denoising returns."""

  tokens: jax.Array  # i32[B, L] prompt and output, up to the first stop id; 0 beyond length
  length: jax.Array  # i32[B]
  prompt_length: jax.Array  # i32[B]
  committed_at: jax.Array  # i32[B, L] the forward, from 0, that wrote each slot; else -1
  result: jax.Array  # i32[B] EOS or LENGTH; after NON_FINITE and UNSATISFIABLE MASKs are left
  stats: DenoiseStats
  cache: PyTree = ()  # what the cache rule reports

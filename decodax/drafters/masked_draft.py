"""Non-autoregressive drafting: a masked language model fills all drafts in one pass.

Axes: `B` batch, `D` drafts, `N = D + 1` nodes, `V` vocabulary.
"""

from jax import lax
import jax.numpy as jnp

from decodax import sampling as sampling_lib
from decodax.decode import root_tokens
from decodax.decode import round_keys
from decodax.drafters.expander import Expander
from decodax.drafters.expander import Nodes
from decodax.drafters.expander import growing_drafter
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Result


def masked_draft(expander: Expander, *, mask_id: int, num_drafts: int = 7) -> Drafter:
  """Returns the drafter that reads D masks behind the text and takes what the model puts there.

  The masks see the text and each other, and the logits at a mask are those of its own place. Drafts
  are drawn independently of one another, so the laws are what they were drawn from, and every rule
  for chains is exact.

  Args:
    expander: the masked language model, see `expander`. What it commits are emitted tokens only.
    mask_id: the mask token.
    num_drafts: D.

  Raises:
    ValueError: if num_drafts < 1.

  Source: Generalised aggressive decoding: Speculative Decoding: Lossless Speedup of Autoregressive
  Translation, arXiv:2203.16487, section 3; arXiv:2205.10350, section 3.2.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')

  def grow(params, state, *, noise_fn, with_laws):
    own, block = state.drafter.own, state.drafter.block
    wanted = state.result == Result.RUNNING
    _, own, block = expander.begin(params, state, own, block, num_slots=num_drafts, wanted=wanted)
    grown, block = expander.expand(params, state, own, block, _masks(state, mask_id, num_drafts), 0)
    logits = grown.logits
    if state.seen is not None:
      seen = jnp.broadcast_to(state.seen[:, None], logits.shape)
      logits = sampling_lib.penalize(logits, seen, state.sampling.repetition_penalty)
    tokens, laws = _draw(state, logits, noise_fn)
    count = jnp.full_like(state.length, num_drafts)
    proposal = chain_proposal(root_tokens(state), tokens, count, laws if with_laws else None)
    return proposal, state.drafter._replace(own=own, block=block)

  shape = DraftShape(num_drafts + 1, num_drafts, Candidates.SAMPLED)
  return growing_drafter(expander, shape, num_slots=num_drafts, grow_fn=grow)


def _masks(state, mask_id, num_drafts):
  """Returns the masks as `Nodes` that see one another."""
  batch_size = state.length.shape[0]
  place = jnp.arange(num_drafts, dtype=jnp.int32)[None]
  return Nodes(
    tokens=jnp.full((batch_size, num_drafts), mask_id, jnp.int32),
    positions=state.length[:, None] + place,
    parents=jnp.full((batch_size, num_drafts), -1, jnp.int32),
    mask=jnp.ones((batch_size, num_drafts, num_drafts), bool),
  )


def _draw(state, logits, noise_fn):
  """Returns (drafts i32[B, D], logits f32[B, D, V] of the laws they are drawn from)."""
  keys, vocab_size = round_keys(state), logits.shape[-1]

  def draw(laws):
    def at(index):
      law = lax.dynamic_index_in_dim(laws, index, 1, keepdims=False)
      return sampling_lib.argmax(law + noise_fn(keys, vocab_size, index + 1))

    return lax.map(at, jnp.arange(laws.shape[1])).T

  def sample():
    laws = sampling_lib.warp(logits, state.sampling)
    return draw(laws), laws

  live = state.result == Result.RUNNING
  sampled = sampling_lib.any_sampled(state.sampling, live)
  return lax.cond(sampled, sample, lambda: (sampling_lib.argmax(logits), logits))

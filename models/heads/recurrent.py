"""Heads that go on from their own output: one layer, run once for each token of a chain.

A row of such a head stands for a token that the target has read, and is made of the target's
feature there and of the *next* token. Drafting goes on with rows made of the head's own last state.

Axes: `B` batch, `T` tokens, `W` nodes, `M` slots, `D` width of the head, `V` vocabulary, `J` steps
of an unrolled chain.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple, Protocol

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from decodax.drafters.expander import Expander
from decodax.drafters.expander import Grown
from decodax.kv_cache import KVBlock
from decodax.kv_cache import init_kv_block
from decodax.kv_cache import write_kv_block
from decodax.types import ModelOutput
from models.config import TransformerConfig
from models.config import layer_windows
from models.heads import rows as rows_lib
from models.transformer import AttentionSite
from models.transformer import Transformer
from models.transformer import attention_site


class RecurrentHead(Protocol):
  """What `recurrent_expander` needs of a head."""

  @property
  def layer_config(self) -> TransformerConfig:
    """Of its layer."""
    ...

  def start(self, output: ModelOutput) -> jax.Array:
    """Returns the states f[B, T, D] that come from what the target read."""
    ...

  def embed(self, target: Transformer, tokens: jax.Array) -> jax.Array:
    """Returns f[B, T, D] for tokens i32[B, T]."""
    ...

  def step(
    self, state: jax.Array, embedded: jax.Array, site: AttentionSite
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (the next states f[B, T, D], the layer's keys and values)."""
    ...

  def logits(self, target: Transformer, state: jax.Array) -> jax.Array:
    """Returns f32[..., V] for states f[..., D]: the law after the embedded token."""
    ...


def unroll(
  head: RecurrentHead,
  states: jax.Array,
  embedded: Sequence[jax.Array],
  positions: jax.Array,
  mask: jax.Array,
) -> list[jax.Array]:
  """Returns, for each of J steps, the states f[B, T, D] of chains that start at every token.

  What drafting computes, for all T starts at once. At step j row t has read the j + 1 tokens after
  the target's own t: it sees the rows of what the target read, made at step 0, and of its own
  chain. Gradients flow through all steps; each is computed anew in the backward pass.

  Args:
    head: a recurrent head.
    states: f[B, T, D], what `head.start` gives.
    embedded: J arrays f[B, T, D], the token that row t reads at step j: token t + 1 + j.
    positions: i32[B, T].
    mask: bool[B, T, T], which rows of step 0 each row sees.

  Source: EAGLE-3, arXiv:2503.01840, section 3.2, training-time test.
  """
  found, earlier = [], []
  for step, tokens in enumerate(embedded):

    @jax.checkpoint
    def run(states, tokens, earlier, step=step):
      site = attention_site(head.layer_config, positions + step, mask)
      site = site._replace(
        attend=functools.partial(_attend_to_chain, head.layer_config, earlier, mask, positions)
      )
      return head.step(states, tokens, site)

    states, own = run(states, tokens, tuple(earlier))
    earlier.append(own)
    found.append(states)
  return found


def _attend_to_chain(config, earlier, mask, positions, queries, keys, values):
  """Returns f[B, T, H, Dh]: attention to the rows of step 0, and to one's own of each step after.

  Args:
    config: of the layer.
    earlier: (keys, values) f[B, Hkv, T, Dh] of the steps before this one.
    mask: bool[B, T, T], over the rows of step 0.
    positions: i32[B, T], of step 0.
    queries: f[B, T, H, Dh].
    keys: f[B, Hkv, T, Dh], of this step.
    values: f[B, Hkv, T, Dh].
  """
  batch, length, heads, dim = queries.shape
  kv = config.num_kv_heads
  scale = config.attention_scale or config.head_dim**-0.5
  grouped = queries.reshape(batch, length, kv, heads // kv, dim) * scale
  step, cap, window = len(earlier), config.attention_soft_cap, layer_windows(config)
  steps = [*earlier, (keys, values)]
  first_keys, first_values = steps[0]
  if window is not None:
    mask = mask & (positions[:, None, :] > positions[:, :, None] + step - int(window[0]))
    steps = [steps[0], *steps[max(1, step - int(window[0]) + 1) :]]
  scores = [
    jnp.einsum('btkgd,bksd->bkgts', grouped, first_keys, preferred_element_type=jnp.float32)
  ]
  scores += [
    jnp.einsum('btkgd,bktd->bkgt', grouped, own, preferred_element_type=jnp.float32)[..., None]
    for own, _ in steps[1:]
  ]
  if cap is not None:
    scores = [cap * jnp.tanh(score / cap) for score in scores]
  scores[0] = jnp.where(mask[:, None, None], scores[0], -1e30)
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(values.dtype)
  mixed = jnp.einsum('bkgts,bksd->btkgd', weights[..., :length], first_values)
  for index, (_, own) in enumerate(steps[1:]):
    share = weights[..., length + index].transpose(0, 3, 1, 2)[..., None]
    mixed = mixed + share * own.transpose(0, 2, 1, 3)[:, :, :, None]
  return mixed.reshape(queries.shape)


class _Own(NamedTuple):
  """What the drafter carries."""

  rows: rows_lib.Rows
  prompt: jax.Array  # i32[B, S] the prompts, from which a row takes the token after its own


class _Scratch(NamedTuple):
  """The drafts of a round."""

  block: KVBlock
  states: jax.Array  # f[B, M, D] the head's output at each slot


def recurrent_expander(
  head: nnx.Module,
  target: Transformer,
  *,
  vocab_size: int,
  draft_vocab_size: int | None = None,
) -> Expander:
  """Returns how a recurrent head drafts; parameters: `Params.drafter` is `nnx.state(head)`.

  The row that reads a token stands at the position before it, that of the feature it goes with.
  A row whose prompt is a single token has nothing to go on before the first round, and drafts from
  zeros there.

  Args:
    head: a `RecurrentHead`.
    target: whose embedding, and perhaps head, are used, from `Params.target`.
    vocab_size: V.
    draft_vocab_size: how many tokens it ever drafts, if not all.

  Source: EAGLE, arXiv:2401.15077, section 4.1; EAGLE-3, arXiv:2503.01840.
  """
  merge = _merger(head, target)
  config, dtype = head.layer_config, target.dtype  # pyright: ignore[reportAttributeAccessIssue]

  def init(params, request, capacity, num_slots):
    del params
    batch_size = request.tokens.shape[0]
    scratch = _Scratch(
      block=init_kv_block(1, batch_size, config.num_kv_heads, num_slots, config.head_dim, dtype),
      states=jnp.zeros((batch_size, num_slots, config.hidden_size), dtype),
    )
    return _Own(rows_lib.init_rows(config, batch_size, capacity, dtype), request.tokens), scratch

  def read(params, own, read: rows_lib.Read):
    head, frozen = merge(params)

    def layer(site):
      return head.step(head.start(read.output), head.embed(frozen, read.tokens), site)

    rows = rows_lib.read_rows(config, own.rows, layer, read.positions, read.count)
    return own._replace(rows=rows)

  def prefill(params, own, tokens, positions, count, output):
    del tokens
    following = jnp.take_along_axis(own.prompt, positions + 1, axis=1, mode='clip')
    return read(params, own, rows_lib.Read(output, following, positions, count))

  def begin(params, state, own, block, *, num_slots, wanted):
    del state, num_slots
    head, frozen = merge(params)
    last = own.rows.last

    def unembed():
      return head.logits(frozen, last)

    if wanted is None:
      return Grown(last, unembed()), own, block
    like = jax.eval_shape(unembed)
    logits = lax.cond(wanted.any(), unembed, lambda: jnp.zeros(like.shape, like.dtype))
    return Grown(last, logits), own, block

  def expand(params, state, own, block, nodes, offset):
    del state
    head, frozen = merge(params)
    before = jnp.concatenate([own.rows.last, block.states], axis=1)
    above = jnp.take_along_axis(before, nodes.parents[:, :, None] + 1, axis=1)
    positions = nodes.positions - 1
    site = attention_site(
      config, positions, nodes.mask, cache=own.rows.cache, scratch=block.block, offset=offset
    )
    states, (keys, values) = head.step(above, head.embed(frozen, nodes.tokens), site)
    new = KVBlock(keys[None], values[None], positions)
    block = _Scratch(
      block=write_kv_block(block.block, new, offset),
      states=lax.dynamic_update_slice_in_dim(block.states, states, offset, 1),
    )
    return Grown(states, head.logits(frozen, states)), block

  def observe(params, own, observation, state):
    return read(params, own, rows_lib.accepted(observation, state))

  return Expander(
    init=init, prefill=prefill, begin=begin, expand=expand, observe=observe,
    commit=lambda own, block, slots, count: own,
    vocab_size=vocab_size, draft_vocab_size=draft_vocab_size,
  )  # fmt: skip


def _merger(head, target) -> Callable:
  """Returns the function that makes (head, target) of `Params`."""
  graph, target_graph = nnx.graphdef(head), nnx.graphdef(target)

  def merge(params):
    return nnx.merge(graph, params.drafter), nnx.merge(target_graph, params.target)

  return merge

"""Prompt tokens: a few trained embeddings that the target reads, and answers with tokens to come.

Axes: `B` batch, `T` tokens, `A` anchors, `K` prompt tokens, `C` copies of each, `D` width, `V`
vocabulary.
"""

import dataclasses

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from decodax import drafters
from decodax.kv_cache import KVBlock
from decodax.static_trees import PromptTrees
from decodax.types import Drafter
from models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class PromptTokensConfig:
  """Shape of prompt tokens."""

  hidden_size: int
  num_prompts: int = 3
  num_copies: int = 1  # the ensemble prompt tokens of each


class PromptTokens(nnx.Module):
  """K prompt tokens of C copies each; nothing else is trained, and nothing of the target is.

  They start as the embeddings of tokens drawn from the training text, as the paper starts from the
  embeddings of words.

  Args:
    config: shape.
    target: whose embeddings they start from.
    rngs: draws the tokens.
    token_counts: i64[V], how often each token is in the text; None draws from all alike.

  Raises:
    ValueError: if there are no prompt tokens or no copies.

  Source: Hardware-Aware Parallel Prompt Decoding, arXiv:2405.18628, section 3.
  """

  def __init__(
    self,
    config: PromptTokensConfig,
    target: Transformer,
    *,
    rngs: nnx.Rngs,
    token_counts: np.ndarray | None = None,
  ):
    if min(config.num_prompts, config.num_copies) < 1:
      raise ValueError(f'num_prompts and num_copies must be at least 1: {config}')
    counts = np.ones(target.config.vocab_size) if token_counts is None else token_counts
    log_counts = jnp.log(jnp.asarray(counts, jnp.float32) + 1e-6)
    shape = (config.num_prompts, config.num_copies)
    self.config = config
    tokens = jax.random.categorical(rngs.params(), log_counts, shape=shape)
    self.embeddings = nnx.Param(target.embedding[...][tokens])  # f[K, C, D]

  def rows(self) -> jax.Array:
    """Returns f[K C, D], in the order of their tokens V, V + 1, ..."""
    return self.embeddings[...].reshape(-1, self.config.hidden_size)

  def logits(self, target: Transformer, hidden: jax.Array) -> jax.Array:
    """Returns f32[..., V], the mean over the copies of the logits of hidden f[..., C, D]."""
    return target.unembed(hidden).mean(axis=-2)


def prompt_mask(num_anchors: int, num_prompts: int, num_copies: int) -> np.ndarray:
  """Returns bool[A K C, A K C], which prompt tokens each one sees.

  Those of its own anchor and of its own copy, up to itself.

  Args:
    num_anchors: A.
    num_prompts: K.
    num_copies: C.
  """
  shape = (num_anchors, num_prompts, num_copies)
  anchor, prompt, copy = (axis.reshape(-1) for axis in np.indices(shape))
  same = (anchor[:, None] == anchor[None]) & (copy[:, None] == copy[None])
  return same & (prompt[None] <= prompt[:, None])


def read_prompts(
  prompts: PromptTokens,
  target: Transformer,
  tokens: jax.Array,
  positions: jax.Array,
  mask: jax.Array,
  anchors: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns what the target's head multiplies, in the text and at prompt tokens behind anchors.

  They are f[B, T, D] and f[B, A, K, C, D]. A prompt token sees what its anchor sees, and those of
  `prompt_mask`. The text is read first and once, for all anchors; gradients reach the prompt tokens
  only.

  Args:
    prompts: the prompt tokens.
    target: frozen.
    tokens: i32[B, T], text.
    positions: i32[B, T].
    mask: bool[B, T, T], what each token of the text sees of it.
    anchors: i32[B, A], places in the text: prompt token k stands k places after its anchor.
  """
  config = prompts.config
  (batch_size, num_anchors), each = anchors.shape, config.num_prompts * config.num_copies
  num_rows, length = num_anchors * each, tokens.shape[1]
  text, block = lax.stop_gradient(target(tokens, positions, mask))
  room = ((0, 0),) * 3 + ((0, num_rows), (0, 0))
  scratch = KVBlock(
    jnp.pad(block.keys, room),
    jnp.pad(block.values, room),
    jnp.pad(block.positions, ((0, 0), (0, num_rows))),
  )
  ahead = jnp.repeat(jnp.arange(1, config.num_prompts + 1), config.num_copies)
  at = jnp.take_along_axis(positions, anchors, axis=1)[:, :, None] + ahead[None, None]
  before = jnp.repeat(jnp.take_along_axis(mask, anchors[:, :, None], axis=1), each, axis=1)
  own = jnp.asarray(prompt_mask(num_anchors, config.num_prompts, config.num_copies))
  own = jnp.broadcast_to(own, (batch_size, num_rows, num_rows))
  rows = target.config.vocab_size + jnp.tile(jnp.arange(each), num_anchors)
  output, _ = target(
    jnp.broadcast_to(rows, (batch_size, num_rows)),
    at.reshape(batch_size, num_rows),
    jnp.concatenate([before, own], axis=2),
    scratch=scratch,
    offset=length,
    embeddings=prompts.rows(),
  )
  shape = (batch_size, num_anchors, config.num_prompts, config.num_copies, config.hidden_size)
  return text.hidden, output.hidden.reshape(shape)


def ppd_drafter(prompts: PromptTokens, target: Transformer, trees: PromptTrees) -> Drafter:
  """Returns how prompt tokens draft; parameters: `Params.drafter` is `nnx.state(prompts)`.

  Args:
    prompts: the prompt tokens; only their structure is kept.
    target: the model that reads them.
    trees: which trees are verified, and how many prompt tokens stand behind each node.

  Raises:
    ValueError: if the trees want more prompt tokens than there are, or as
      `drafters.prompt_tokens`.

  Source: Hardware-Aware Parallel Prompt Decoding, arXiv:2405.18628.
  """
  wanted, config = len(trees.trees) - 1, prompts.config
  if wanted > config.num_prompts:
    raise ValueError(
      f'the trees want {wanted} prompt tokens of a node, {config.num_prompts} were trained; build '
      f'them with max_prompts={config.num_prompts}'
    )
  graph = nnx.graphdef(prompts)
  return drafters.prompt_tokens(
    trees,
    vocab_size=target.config.vocab_size,
    embeddings_fn=lambda params: nnx.merge(graph, params.drafter).rows(),
    num_copies=config.num_copies,
  )


def ppd_expander(prompts: PromptTokens, target: Transformer):
  """Raises ValueError: the target itself reads prompt tokens, and they draft no other way."""
  del prompts, target
  raise ValueError(
    'prompt tokens draft in the call that verifies, not as the head of a chain or of another tree: '
    'use models.heads.ppd.ppd_drafter; on a command line, --methods ppd-tree'
  )

"""An independent draft model: a small decoder, perhaps with fewer tokens than the target.

Axes: `B` batch, `T` tokens, `D` width, `V` vocabulary of the target, `Vd` draft vocabulary.
"""

import dataclasses

from flax import nnx
import jax

from decodax.drafters.expander import Expander
from decodax.drafters.expander import model_expander
from decodax.types import Model
from decodax.types import ModelOutput
from models.adapter import as_model
from models.config import TransformerConfig
from models.heads.vocabulary import DraftVocabulary
from models.transformer import Transformer


class DraftLM(nnx.Module):
  """A decoder over a draft vocabulary, to be used with the target's tokens.

  The decoder has one token more than are drafted: it stands for all the others, is read in their
  place and never drafted.

  Args:
    config: of the decoder, with the target's `vocab_size`.
    rngs: where initial parameters come from.
    vocabulary: draft vocabulary, or None.
    param_dtype: storage dtype of the parameters.
    dtype: dtype of activations and of the cache.

  Source: FastDraft, arXiv:2411.11055, for the recipe; the vocabulary is pruned as in EAGLE-3.
  """

  def __init__(
    self,
    config: TransformerConfig,
    *,
    rngs: nnx.Rngs,
    vocabulary: DraftVocabulary | None = None,
    **dtypes,
  ):
    self.vocabulary = vocabulary
    self.vocab_size = config.vocab_size
    if vocabulary is not None:
      config = dataclasses.replace(config, vocab_size=vocabulary.size + 1)
    self.decoder = Transformer(config, rngs=rngs, **dtypes)

  def encode(self, tokens: jax.Array) -> jax.Array:
    """Returns i32[B, T], the decoder's ids of the target's tokens."""
    return tokens if self.vocabulary is None else self.vocabulary.encode(tokens)

  def __call__(self, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> ModelOutput:
    """Returns what the decoder says about the target's tokens i32[B, T]."""
    return self.decoder(self.encode(tokens), positions, mask)[0]

  def draft_logits(self, hidden: jax.Array) -> jax.Array:
    """Returns f32[..., Vd] for hidden f[..., D] after the final norm."""
    logits = self.decoder.unembed(hidden)
    return logits if self.vocabulary is None else logits[..., : self.vocabulary.size]

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Returns f32[..., V], -inf outside the draft vocabulary."""
    logits = self.draft_logits(hidden)
    return logits if self.vocabulary is None else self.vocabulary.widen(logits)


def draft_lm_model(draft: DraftLM) -> Model:
  """Returns the pure functions of a draft model; their parameters are `nnx.state(draft)`.

  Its tokens and logits are the target's.
  """
  graph = nnx.graphdef(draft)
  inner = as_model(draft.decoder)
  assert inner.init_scratch is not None
  init_scratch = inner.init_scratch

  def own(params):
    return nnx.state(nnx.merge(graph, params).decoder)

  def extend(params, cache, tokens, positions, mask, **options):
    tokens = nnx.merge(graph, params).encode(tokens)
    return inner.extend(own(params), cache, tokens, positions, mask, **options)

  return inner._replace(
    init_cache=lambda params, *sizes: inner.init_cache(own(params), *sizes),
    init_scratch=lambda params, *sizes: init_scratch(own(params), *sizes),
    extend=extend,
    unembed=lambda params, hidden: nnx.merge(graph, params).unembed(hidden),
    vocab_size=draft.vocab_size,
  )


def draft_lm_expander(draft: DraftLM) -> Expander:
  """Returns how a draft model drafts; parameters: `Params.drafter` is `nnx.state(draft)`."""
  size = None if draft.vocabulary is None else draft.vocabulary.size
  return model_expander(draft_lm_model(draft), draft_vocab_size=size)

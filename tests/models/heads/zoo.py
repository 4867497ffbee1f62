"""What the tests of heads share: a small target, random heads of every kind, and laws by the book.

Axes: `B` batch, `S` slots, `D` depth, `V` vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from decodax.types import ModelOutput
from decodax.types import Params
from models import heads as heads_lib
from models.adapter import as_model
from models.config import TransformerConfig
from models.draft_lm import DraftLM
from models.heads.eagle import Eagle
from models.heads.eagle import EagleConfig
from models.heads.eagle3 import Eagle3
from models.heads.eagle3 import Eagle3Config
from models.heads.hydra import Hydra
from models.heads.hydra import HydraConfig
from models.heads.kangaroo import Kangaroo
from models.heads.kangaroo import KangarooConfig
from models.heads.medusa import Medusa
from models.heads.medusa import MedusaConfig
from models.heads.ppd import PromptTokens
from models.heads.ppd import PromptTokensConfig
from models.heads.vocabulary import make_vocabulary
from models.transformer import Transformer
from models.transformer import attention_site

VOCAB_SIZE, WIDTH, DEPTH = 24, 32, 4
CONFIG = TransformerConfig(
  vocab_size=VOCAB_SIZE, hidden_size=WIDTH, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
  intermediate_size=48,
)  # fmt: skip
LAYER = dataclasses.replace(CONFIG, num_layers=1)
COUNTS = np.arange(VOCAB_SIZE)[::-1].copy()


def make_target(seed: int = 0) -> Transformer:
  """Returns a random target with laws that are neither flat nor certain."""
  target = Transformer(CONFIG, rngs=nnx.Rngs(seed))
  return _scale(target, lambda name: 30 if 'head' in name else 8)


def _scale(module, factor):
  state = jax.tree_util.tree_map_with_path(
    lambda path, a: (
      a
      if 'norm' in (name := jax.tree_util.keystr(path)) or a.dtype == jnp.int32
      else a * factor(name)
    ),
    nnx.state(module),
  )
  nnx.update(module, state)
  return module


def shake(module: nnx.Module, seed: int = 0, size: float = 0.3) -> Any:
  """Returns the module with noise on every parameter, so that none is at its tidy start."""
  state = nnx.state(module, nnx.Param)
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noisy = [a + size * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
  nnx.update(module, jax.tree.unflatten(tree, noisy))
  return module


def make_heads(target: Transformer) -> dict[str, Any]:
  """Returns a random head of every kind, and of the options that change how one drafts."""
  rngs = nnx.Rngs(7)
  few = make_vocabulary(COUNTS, 16)
  size: dict[str, Any] = dict(hidden_size=WIDTH, vocab_size=VOCAB_SIZE, num_heads=DEPTH)
  eagle3 = Eagle3Config(LAYER, (1, 2, 3), WIDTH)
  options = dict(norm_before_fuse=True, norm_taps=True, norm_before_residual=True)
  narrow = dataclasses.replace(LAYER, hidden_size=16, num_heads=2, window=3)
  heads = {
    'medusa': Medusa(MedusaConfig(**size, num_layers=2), target),
    'medusa-shared': Medusa(
      MedusaConfig(**size, share_head=True, draft_vocab_size=16), target, vocabulary=few
    ),
    'hydra': Hydra(HydraConfig(**size, num_layers=2), target, rngs=rngs),
    'hydra++': Hydra(
      HydraConfig(**size, prefix=LAYER, draft_vocab_size=16), target, rngs=rngs, vocabulary=few
    ),
    'eagle': Eagle(EagleConfig(LAYER), target, rngs=rngs),
    'eagle3': Eagle3(
      dataclasses.replace(eagle3, draft_vocab_size=16), target, rngs=rngs, vocabulary=few
    ),
    'eagle3-options': Eagle3(
      dataclasses.replace(eagle3, layer=narrow, own_embedding=True, feed_normed=True, **options),
      target, rngs=rngs,
    ),
    'kangaroo': Kangaroo(KangarooConfig(LAYER, 2), target, rngs=rngs),
    'draft_lm': DraftLM(LAYER, rngs=rngs, vocabulary=few),
    'ppd': PromptTokens(PromptTokensConfig(WIDTH, DEPTH, num_copies=2), target, rngs=rngs),
  }  # fmt: skip
  # An EAGLE head's state is not normed: with large weights rounding would grow from step to step.
  size = {'eagle': 0.15}
  return {
    name: shake(head, seed, size.get(name, 0.3)) for seed, (name, head) in enumerate(heads.items())
  }


class Setup(NamedTuple):
  """A head ready to draft."""

  target: Transformer
  head: Any
  model: Any  # decodax.Model of the target, with the head's taps
  params: Any  # of target and head


@functools.cache
def target() -> Transformer:
  return make_target()


@functools.cache
def heads() -> dict[str, Any]:
  return make_heads(target())


def setup(name: str) -> Setup:
  head = heads()[name]
  return make_setup(target(), head)


def make_setup(target: Transformer, head: Any) -> Setup:
  model = as_model(target, taps=heads_lib.head_taps(head))
  return Setup(target, head, model, Params(nnx.state(target), nnx.state(head)))


# --- Laws by the book: every token read anew, without caches -------------------------------------


def chain_laws(head: Any, target: Transformer, tokens, length, depth: int):
  """Returns f32[B, D, V], what the head says along a chain of drafts.

  Args:
    head: any head.
    target: its target.
    tokens: i32[B, S], each row's text and then D drafts.
    length: i32[B], of the text, at least 2.
    depth: D.
  """
  return _LAWS[type(head)](head, target, tokens, length, depth)


def read(target, head, tokens) -> tuple[ModelOutput, jax.Array, jax.Array]:
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
  mask = jnp.broadcast_to(causal, (tokens.shape[0], *causal.shape))
  taps = heads_lib.head_taps(head)
  return target(tokens, positions, mask, taps=taps)[0], positions, mask


def _at(x, index):
  return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _medusa_laws(head, target, tokens, length, depth):
  output, _, _ = read(target, head, tokens)
  vectors = head.vectors(output.hidden)
  batch = jnp.arange(tokens.shape[0])
  return head.logits(target, vectors[batch, length - 2])[:, :depth]


def _hydra_laws(head, target, tokens, length, depth):
  output, positions, mask = read(target, head, tokens)
  feature = output.hidden
  if head.prefix is not None:
    feature, _ = head.prefix(feature, attention_site(head.config.prefix, positions, mask))
  feature, laws = _at(feature, length - 2), []
  for k in range(1, depth + 1):
    index = length[:, None] - 1 + jnp.arange(k)[None]
    known = target.embed(jnp.take_along_axis(tokens, index, axis=1))
    logits = head.project(target, head.vector(feature, known, k), k)
    laws.append(logits if head.vocabulary is None else head.vocabulary.widen(logits))
  return jnp.stack(laws, axis=1)


def _recurrent_laws(head, target, tokens, length, depth):
  output, positions, mask = read(target, head, tokens)
  states = head.start(output)
  following = jnp.roll(tokens, -1, axis=1)
  laws = []
  for step in range(depth):
    site = attention_site(head.layer_config, positions, mask)
    out, _ = head.step(states, head.embed(target, following), site)
    last = _at(out, length - 2 + step)
    laws.append(head.logits(target, last))
    here = jnp.arange(tokens.shape[1])[None] == length[:, None] - 1 + step
    states = jnp.where(here[..., None], last[:, None], states)
  return jnp.stack(laws, axis=1)


def _kangaroo_laws(head, target, tokens, length, depth):
  output, positions, mask = read(target, head, tokens)
  site = attention_site(head.config.layer, positions, mask)
  y, _ = head(output.features[f'layer_{head.config.exit_layer}'], site)
  laws = [target.unembed(_at(y, length - 1 + step)) for step in range(depth)]
  return jnp.stack(laws, axis=1)


def _draft_lm_laws(head, target, tokens, length, depth):
  _, positions, mask = read(target, head, tokens)
  hidden = head(tokens, positions, mask).hidden
  laws = [head.unembed(_at(hidden, length - 1 + step)) for step in range(depth)]
  return jnp.stack(laws, axis=1)


def _prompt_laws(head, target, tokens, length, depth):
  place = jnp.arange(tokens.shape[1])[None] - (length[:, None] - 1)
  prompted = (place >= 0) & (place < depth)
  causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
  mask = jnp.broadcast_to(causal, (tokens.shape[0], *causal.shape))
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  index = length[:, None] - 1 + jnp.arange(depth)[None]
  laws = []
  for copy in range(head.config.num_copies):  # where a draft would be stands a prompt token
    own = target.config.vocab_size + place * head.config.num_copies + copy
    text = jnp.where(prompted, own, tokens)
    output, _ = target(text, positions, mask, embeddings=head.rows())
    hidden = jnp.take_along_axis(output.hidden, index[:, :, None], axis=1)
    laws.append(target.unembed(hidden))
  return jnp.mean(jnp.stack(laws), axis=0)


_LAWS = {
  Medusa: _medusa_laws,
  Hydra: _hydra_laws,
  Eagle: _recurrent_laws,
  Eagle3: _recurrent_laws,
  Kangaroo: _kangaroo_laws,
  DraftLM: _draft_lm_laws,
  PromptTokens: _prompt_laws,
}

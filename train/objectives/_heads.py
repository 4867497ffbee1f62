"""What the objectives of draft heads share: shapes like the target's, drafters, sums over depths.

Axes: `B` rows, `T` tokens, `D` width, `K` depths, `V` vocabulary, `Vd` draft vocabulary.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decodax import drafters
from decodax import verifiers
from decodax.drafters.expander import Expander
from decodax.types import Drafter
from decodax.types import Verifier
from models.config import TransformerConfig
from models.heads.vocabulary import DraftVocabulary
from models.transformer import Transformer
from train import losses
from train.losses import Comparison
from train.losses import Divergence
from train.objective import Loss
from train.tape import Tape
from train.tape import shift_left
from train.tape import supervised


def layer_like(config: TransformerConfig, **changes: Any) -> TransformerConfig:
  """Returns the configuration of one dense layer shaped like the target's, with changes."""
  return dataclasses.replace(
    config, num_layers=1, window=None, windowed_layers=None, num_experts=0, **changes
  )


def make_drafter(expander: Expander, *, num_drafts: int, tree_nodes: int, beam: int) -> Drafter:
  """Returns how a head drafts: a chain, or with `tree_nodes` a tree of the likeliest nodes.

  Args:
    expander: of the head.
    num_drafts: depth.
    tree_nodes: nodes that the target verifies, the root included; 0 is a chain.
    beam: nodes of a tree that are read at a time.
  """
  if not tree_nodes:
    return drafters.chain_drafter(expander, num_drafts=num_drafts)
  return drafters.eagle2_tree(expander, num_nodes=tree_nodes, max_depth=num_drafts, beam_width=beam)


def verifier_for(tree_nodes: int) -> Verifier:
  """Returns the lossless rule: by ratio for drawn chains, coupled for trees of likeliest tokens."""
  return verifiers.coupled if tree_nodes else verifiers.speculative


def divergence_of(name: str) -> Divergence | None:
  """Returns a loss between laws by name; None for 'labels', the text itself."""
  return None if name == 'labels' else losses.get_divergence(name)


class Teacher(NamedTuple):
  """The target as drafts are compared with it, at every depth."""

  p_fn: Callable[[jax.Array], jax.Array]  # hidden f[..., D] -> logits, of the drafted tokens only
  keep: jax.Array | None  # i32[Vd] the drafted tokens; None is all
  summary: losses.Summary | None  # of the whole laws, if not all tokens are drafted


def teach(tape: Tape, target: Transformer, vocabulary: DraftVocabulary | None = None) -> Teacher:
  """Returns the teacher of a batch. The whole vocabulary is gone through once for all depths."""
  if vocabulary is None:
    return Teacher(target.unembed, None, None)
  assert tape.hidden is not None
  keep = vocabulary.ids[...]
  summary = losses.summarize(target.unembed, tape.hidden)
  return Teacher(lambda hidden: target.unembed(hidden, keep), keep, summary)


class Depth(NamedTuple):
  """What a head said at one depth about the whole batch, indexed by where the draft starts."""

  comparison: Comparison
  weights: jax.Array  # f32[B, T] 1 where the drafted token is supervised
  pruned: bool  # is there a draft vocabulary?


def compare_at(
  tape: Tape,
  teacher: Teacher,
  q_fn: Callable[[jax.Array], jax.Array],
  vectors: jax.Array,
  ahead: int,
  divergence: Divergence | None,
  *,
  anchors: jax.Array | None = None,
) -> Depth:
  """Returns how the head's law of token t + ahead agrees with the target's.

  Args:
    tape: what the target read.
    teacher: of the tape.
    q_fn: vectors f[..., D] -> logits of the drafted tokens, f32[..., V] or f32[..., Vd].
    vectors: f[B, T, D].
    ahead: which token row t drafts.
    divergence: between the laws; None learns the tokens of the text.
    anchors: i32[B, A], the rows that draft, to which vectors f[B, A, ...] belong; None is all.
  """
  assert tape.hidden is not None

  def at_anchors(a):
    if anchors is None:
      return a
    return jnp.take_along_axis(a, anchors.reshape(*anchors.shape, *[1] * (a.ndim - 2)), axis=1)

  def ahead_of(x, num):
    return jax.tree.map(lambda a: at_anchors(shift_left(a, num, tape.segments)[0]), x)

  labels = ahead_of(tape.tokens, ahead)
  comparison = losses.compare(
    teacher.p_fn,
    q_fn,
    ahead_of(tape.hidden, ahead - 1),
    vectors,
    divergence=divergence or losses.forward_kl,
    labels=labels if divergence is None else None,
    keep=teacher.keep,
    summary=ahead_of(teacher.summary, ahead - 1),
  )
  return Depth(comparison, at_anchors(supervised(tape, ahead)), teacher.keep is not None)


def total_loss(depths: Sequence[Depth], position_weights: Sequence[float] | np.ndarray) -> Loss:
  """Returns the weighted sum over depths, to be divided by the supervised tokens at depth 1.

  With a draft vocabulary the tokens count whose likeliest successor is in it.
  """
  total = jnp.float32(0)
  for depth, weight in zip(depths, position_weights, strict=True):
    counted = depth.weights * depth.comparison.covered
    total = total + weight * losses.masked(depth.comparison.loss, counted).total
  first = depths[0]
  return Loss(total, jnp.sum(first.weights * first.comparison.covered), depth_metrics(depths))


def depth_metrics(depths: Sequence[Depth]) -> dict[str, losses.Mean]:
  """Returns the metrics that all heads show, over every supervised token.

  With a draft vocabulary `covered` is how often it has the target's likeliest token: the most that
  `accuracy/1` can reach.
  """
  found = losses.depth_metrics(
    [depth.comparison.correct for depth in depths],
    [depth.weights for depth in depths],
    [depth.comparison.acceptance for depth in depths],
  )
  if depths[0].pruned:
    found['covered'] = losses.masked(depths[0].comparison.covered, depths[0].weights)
  return found


def embed_ahead(target, tape: Tape, ahead: int) -> jax.Array:
  """Returns f[B, T, D], the target's embeddings of token t + ahead; zero beyond the document."""
  tokens, ok = shift_left(tape.tokens, ahead, tape.segments)
  embedded = jax.lax.stop_gradient(target.embed(tokens))
  return jnp.where(ok[..., None], embedded, jnp.zeros((), embedded.dtype))

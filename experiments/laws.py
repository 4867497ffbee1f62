"""Next-token laws of a model and of what drafts for it, read at places of given texts.

Axes: `M` places, `V` vocabulary, `R` ranks.
"""

from collections.abc import Sequence
import os

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from decodax.static_trees import StaticTree
from models.heads.ppd import PromptTokens
from models.heads.ppd import read_prompts
from models.weights import LoadedModel

_PAD = 128  # texts are padded to multiples of it, so that few shapes are compiled

Array = np.ndarray
Site = tuple[int, int]  # text, position


def choose_sites(texts, num_laws, rng):
  """Returns sorted (text, position) pairs, all different, behind what all texts begin with."""
  common = len(os.path.commonprefix(texts)) if len(texts) > 1 else 0
  sites = [(i, t) for i, text in enumerate(texts) for t in range(max(common - 1, 0), len(text))]
  chosen = rng.choice(len(sites), min(num_laws, len(sites)), replace=False)
  return sorted(sites[i] for i in chosen)


def read_logits(loaded, texts, sites, exit_layer) -> tuple[Array, Array]:
  """Returns the logits f32[M, V] at the sites, of the whole model and of its first layers."""
  graph, params = nnx.split(loaded.transformer)

  @jax.jit
  def read(params, tokens, keep):
    module, length = nnx.merge(graph, params), tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    output, _ = module(tokens, jnp.arange(length)[None], mask, taps=(exit_layer,))
    early = module.final_norm(output.features[f'layer_{exit_layer}'])
    return module.unembed(output.hidden[0, keep]), module.unembed(early[0, keep])

  found = []
  for _, kept, tokens, padded in _by_text(texts, sites):
    both = read(params, tokens, padded)
    found.append([np.asarray(logits)[: len(kept)] for logits in both])
  late, early = (np.concatenate(each) for each in zip(*found, strict=True))
  if not np.isfinite(late).all() or not np.isfinite(early).all():
    raise ValueError(f'{loaded.name} gives logits that are not finite')
  return late, early


def _by_text(texts, sites):
  """Yields (text, its places, the padded tokens i32[1, T], the places repeated to one number)."""
  places = {i: [t for j, t in sites if j == i] for i, _ in sites}
  width = max(map(len, places.values()))
  for i, kept in places.items():
    tokens = np.zeros((1, -(-len(texts[i]) // _PAD) * _PAD), np.int32)
    tokens[0, : len(texts[i])] = texts[i]
    yield texts[i], kept, tokens, np.resize(kept, width)


def _read_both(target, draft, texts, sites, exit_layer) -> tuple[Array, Array]:
  """Returns the logits f32[M, V] of the target, and of the draft model or the target's exit."""
  late, early = read_logits(target, texts, sites, exit_layer)
  if draft is not None:
    early, _ = read_logits(draft, texts, sites, draft.transformer.config.num_layers)
  return late, early


def count_hits(
  tree: StaticTree,
  target: LoadedModel,
  texts: Sequence[Sequence[int]],
  *,
  draft: LoadedModel | None = None,
  exit_layer: int,
  num_texts: int = 12,
) -> Array:
  """Returns i64[N], how often each node of a tree would be on the accepted path at temperature 0.

  A round starts at every place of the texts. A node deeper than the first counts only where the
  text itself goes on with the target's likeliest token, so that the drafter has read what it
  would have drafted.

  Args:
    tree: whose nodes are ranks of candidates.
    target: the target.
    texts: where both are read, the first `num_texts` of them.
    draft: the draft model; None is the target's first layers.
    exit_layer: how many of them.
    num_texts: texts at most.
  """
  nodes = {path: node for node, path in enumerate(tree.paths)}
  hits = np.zeros(tree.num_nodes, np.int64)
  texts = texts[:num_texts]
  sites = [(i, t) for i, text in enumerate(texts) for t in range(len(text))]
  late, early = _read_both(target, draft, texts, sites, exit_layer)
  best_of_all = late.argmax(-1)
  ranks_of_all = (early > np.take_along_axis(early, best_of_all[:, None], 1)).sum(-1)
  ends = np.cumsum([len(text) for text in texts])[:-1]
  parts = (np.split(array, ends) for array in (best_of_all, ranks_of_all))
  for text, best, ranks in zip(texts, *parts, strict=True):
    follows = best[:-1] == np.asarray(text)[1:]
    for start in range(len(text)):
      path: tuple[int, ...] = ()
      hits[0] += 1
      for t in range(start, len(text)):
        path = (*path, int(ranks[t]))
        if path not in nodes:
          break
        hits[nodes[path]] += 1
        if t == len(follows) or not follows[t]:
          break
  return hits


def softmax(logits: Array, temperature: float) -> Array:
  """Returns f64[M, V], the laws of logits at a temperature above 0."""
  scaled = logits.astype(np.float64) / temperature
  weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def acceptance_by_rank(
  target: LoadedModel,
  texts: Sequence[Sequence[int]],
  *,
  draft: LoadedModel | None = None,
  exit_layer: int,
  num_ranks: int = 8,
  num_sites: int = 512,
) -> Array:
  """Returns f64[R], how often the target's likeliest token is the draft's of each rank.

  That is the acceptance of each candidate at temperature 0, which tree builders ask for.

  Args:
    target: the target.
    texts: where both are read.
    draft: the draft model; None is the target's first layers.
    exit_layer: how many of them.
    num_ranks: R.
    num_sites: places at most, drawn from all.
  """
  sites = choose_sites(texts, num_sites, np.random.default_rng(0))
  late, early = _read_both(target, draft, texts, sites, exit_layer)
  ranked = np.argsort(-early, axis=-1, kind='stable')[:, :num_ranks]
  return np.mean(ranked == late.argmax(-1)[:, None], axis=0)


def prompt_acceptance(
  target: LoadedModel,
  prompts: PromptTokens,
  texts: Sequence[Sequence[int]],
  *,
  num_ranks: int = 8,
  num_sites: int = 512,
) -> Array:
  """Returns f64[K, R], how often each prompt token's guess of each rank is the target's likeliest.

  That is the acceptance at temperature 0 which `static_trees.ppd` asks for: of the rounds that
  reach a depth. So a place counts at a depth only where the text goes on with the target's
  likeliest tokens up to it, and where those were among the R guesses of the depths before.

  Args:
    target: the target.
    prompts: K prompt tokens.
    texts: where both are read, and drafts begin.
    num_ranks: R.
    num_sites: places at most, drawn from all.
  """
  depths = prompts.config.num_prompts
  reached, hits = np.zeros(depths), np.zeros((depths, num_ranks))
  for text, anchors, best, ranks in _prompt_ranks(target, prompts, texts, num_sites):
    for anchor, found in zip(anchors, ranks, strict=True):
      for depth, rank in enumerate(found):
        place = anchor + 1 + depth  # its law is of the draft
        if place >= len(text) or (depth and best[place - 1] != text[place]):
          break
        reached[depth] += 1
        if rank >= num_ranks:
          break
        hits[depth, rank] += 1
  return hits / np.maximum(reached, 1)[:, None]


def _prompt_ranks(target, prompts, texts, num_sites):
  """Yields (text, places, likeliest successor of each token, ranks i64[places, K] of drafts)."""
  graph, params = nnx.split((target.transformer, prompts))
  depths = jnp.arange(prompts.config.num_prompts)

  @jax.jit
  def read(params, tokens, anchors):
    module, prompts = nnx.merge(graph, params)
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    text, hidden = read_prompts(
      prompts, module, tokens, jnp.arange(length)[None], mask, anchors[None]
    )
    best = jnp.argmax(module.unembed(text[0]), axis=-1)
    logits = prompts.logits(module, hidden[0])
    wanted = best[jnp.minimum(anchors[:, None] + 1 + depths[None], length - 1)]
    chosen = jnp.take_along_axis(logits, wanted[:, :, None], axis=2)
    return best, jnp.sum(logits > chosen, axis=-1)

  sites = choose_sites(texts, num_sites, np.random.default_rng(0))
  for text, kept, tokens, padded in _by_text(texts, sites):
    best, ranks = jax.device_get(read(params, tokens, padded))
    yield text, kept, best, ranks[: len(kept)]

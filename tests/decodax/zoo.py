"""What the tests of the loop share: a small transformer, requests, odd drafters, compiled runs.

Axes: `B` batch, `N` nodes, `D` depth, `S` slots, `V` vocabulary.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

import decodax
from decodax import drafters
from decodax.decode import root_tokens
from decodax.drafters.plain import stateless_init
from decodax.drafters.plain import stateless_observe
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Model
from decodax.types import Proposal
from decodax.types import PyTree
from models.adapter import as_model
from models.config import TransformerConfig
from models.transformer import Transformer

VOCAB_SIZE, CAPACITY = 24, 64
PROMPT_LENGTHS = (1, 5, 17, 9, 2, 30, 4, 12)
MAX_NEW_TOKENS = (24, 24, 20, 24, 1, 30, 24, 17)
BATCH = len(PROMPT_LENGTHS)
EOS_IDS = ((3, 7), (), (5,), (11, 2), (), (), (0,), ())
NUM_DRAFTS = 4  # of the scripted chain

# One row each: every rule alone at some row, all together, and nothing but the temperature.
MIXED = dict(
  temperature=(0.0, 1.0, 1.0, 0.7, 1.3, 1.0, 0.0, 0.9),
  top_k=(0, 0, 0, 3, 0, 0, 0, 10),
  top_p=(1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 1.0, 0.95),
  min_p=(0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.02),
  repetition_penalty=(1.0, 1.0, 1.0, 1.0, 1.0, 1.3, 1.2, 1.1),
)
GREEDY = {**MIXED, 'temperature': 0.0}
_CONFIG = TransformerConfig(
  vocab_size=VOCAB_SIZE,
  hidden_size=32,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  intermediate_size=48,
)


class Compiled:
  """A jitted function that counts its traces.

  Compiled without optimisation: these programs run for milliseconds and compile for seconds.
  """

  def __init__(self, fn: Callable):
    self.num_traces = 0

    def counted(*args):
      self.num_traces += 1
      return fn(*args)

    self.jitted = jax.jit(counted, compiler_options={'xla_backend_optimization_level': 0})

  def __call__(self, *args):
    return self.jitted(*args)


class Zoo:
  """A small model, and the drafters by name. What is compiled once is kept for all tests."""

  def __init__(self):
    transformer, self.params = _make_transformer(0)
    _, self.other_params = _make_transformer(1)
    self.model = as_model(transformer)
    self.drafters = {
      'plain': drafters.plain(),
      'ngram': drafters.ngram(min_ngram=1),
      'early_exit': drafters.early_exit(as_model(transformer, exit_layer=2)),
      'draft_model': drafters.draft_model(self.model),
      'scripted': scripted_chain(NUM_DRAFTS),
      'tree': random_tree(num_nodes=9, max_depth=4, widths=(3, 9)),
    }
    self._compiled = {}

  def decode(self, drafter: str, verifier: str, **options) -> Compiled:
    """Returns the compiled `decode`; it takes (params, request)."""
    return self.compiled(decodax.decode, drafter, verifier=verifier, **options)

  def compiled(self, fn, drafter: str, *, verifier: str | None = None, **options) -> Compiled:
    """Returns `fn` compiled with model, drafter and, if any, verifier bound."""
    key = (fn, drafter, verifier, *options.items())
    if key not in self._compiled:
      if verifier is not None:
        options['verifier'] = decodax.verifiers.BY_NAME[verifier]
      bound = functools.partial(fn, model=self.model, drafter=self.drafters[drafter], **options)
      self._compiled[key] = Compiled(bound)
    return self._compiled[key]

  def plain(self, verifier: str, request: decodax.Request) -> decodax.DecodeResult:
    """Returns what plain decoding gives."""
    return jax.device_get(self.decode('plain', verifier)(decodax.Params(self.params), request))


def _make_transformer(seed):
  """Returns (a random transformer, its parameters), with laws that are neither flat nor certain."""
  transformer = Transformer(_CONFIG, rngs=nnx.Rngs(seed))

  def sharpen(path, array):
    name = jax.tree_util.keystr(path)
    return array if 'norm' in name else array * (30 if 'head' in name else 8)

  return transformer, jax.tree_util.tree_map_with_path(sharpen, nnx.state(transformer))


def make_request(
  sampling: dict[str, Any] | None = None, *, seed: int = 0, **options: Any
) -> decodax.Request:
  """Returns a ragged request of `BATCH` rows."""
  rng = np.random.default_rng(seed)
  texts = [np.tile(rng.integers(0, VOCAB_SIZE, 7), 5) for _ in PROMPT_LENGTHS]
  prompts = [text[:length] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]
  defaults: dict[str, Any] = dict(
    max_new_tokens=MAX_NEW_TOKENS, eos_ids=EOS_IDS, seed=seed, capacity=CAPACITY,
    vocab_size=VOCAB_SIZE,
  )  # fmt: skip
  return decodax.make_request(prompts, **{**defaults, **(sampling or MIXED), **options})


def take_rows(tree: PyTree, rows) -> PyTree:
  """Returns the tree with `rows` of every array: of a request, result, or script."""
  return jax.tree.map(lambda array: array[np.asarray(rows)], tree)


def concatenate(*requests: decodax.Request) -> decodax.Request:
  """Returns the rows of several requests of equal capacity in one batch."""
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *requests)


def assert_same_output(actual: decodax.DecodeResult, expected: decodax.DecodeResult) -> None:
  """Asserts equal tokens, lengths and results; statistics may differ."""
  width = min(actual.tokens.shape[1], expected.tokens.shape[1])
  np.testing.assert_array_equal(actual.tokens[:, :width], expected.tokens[:, :width])
  np.testing.assert_array_equal(actual.length, expected.length)
  np.testing.assert_array_equal(actual.result, expected.result)


# --- Drafters that no one would use --------------------------------------------------------------


class Script(NamedTuple):
  """What a scripted drafter proposes, as its parameters: rows differ, and nothing is recompiled."""

  text: jax.Array  # i32[B, S] the token it proposes for each position
  num_right: jax.Array  # i32[B] drafts taken from the text; -1: another number every round
  num_drafts: jax.Array  # i32[B] drafts proposed; -1: another number every round
  wrong: jax.Array  # i32[B] what is proposed instead of the text; any number at all


def make_script(
  text: ArrayLike,
  *,
  num_right: ArrayLike = -1,
  num_drafts: ArrayLike = -1,
  wrong: ArrayLike = VOCAB_SIZE + 5,
) -> Script:
  """Returns a script whose options may be one value or one per row."""
  text = jnp.asarray(text, jnp.int32)
  rows = [
    jnp.broadcast_to(jnp.asarray(values, jnp.int32), text.shape[:1])
    for values in (num_right, num_drafts, wrong)
  ]
  return Script(text, *rows)


def scripted_chain(num_drafts: int) -> Drafter:
  """Returns a drafter that proposes what a `Script` in `Params.drafter` says."""

  def propose(params, state, *, noise_fn, with_laws):
    del noise_fn, with_laws
    script: Script = params.drafter
    right = jnp.where(script.num_right < 0, state.round % (num_drafts + 1), script.num_right)
    count = jnp.where(script.num_drafts < 0, -state.round % (num_drafts + 1), script.num_drafts)
    depth = jnp.arange(num_drafts)[None]
    index = state.length[:, None] + depth
    drafts = jnp.take_along_axis(script.text, index, axis=1, mode='clip')
    drafts = jnp.where(depth < right[:, None], drafts, script.wrong[:, None])
    return chain_proposal(root_tokens(state), drafts, count), ()

  return _stateless(
    DraftShape(num_drafts + 1, num_drafts, Candidates.DETERMINISTIC, widths=(1, num_drafts + 1)),
    propose,
  )


def random_tree(*, num_nodes: int, max_depth: int, widths: tuple[int, ...] = ()) -> Drafter:
  """Returns a drafter whose tree differs from row to row and from round to round.

  Three quarters of its nodes hold what the `Script` in `Params.drafter` has for their position,
  so that some paths are long; the others hold any token, -1 and V + 1 included.
  """

  def propose(params, state, *, noise_fn, with_laws):
    del noise_fn, with_laws
    keys = jax.vmap(jax.random.fold_in)(state.rng_keys, 10_000 + state.round)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (4, num_nodes)))(keys)
    parents, depths = _random_parents(draws[:, 0], max_depth)
    index = state.length[:, None] - 1 + depths
    right = jnp.take_along_axis(params.drafter.text, index, axis=1, mode='clip')
    other = jnp.floor(draws[:, 1] * (VOCAB_SIZE + 3)).astype(jnp.int32) - 1
    tokens = jnp.where(draws[:, 2] < 0.75, right, other).at[:, 0].set(root_tokens(state))
    count = 1 + jnp.floor(draws[:, 3, 0] * num_nodes)
    valid = jnp.arange(num_nodes)[None] < count[:, None]
    return Proposal(tokens, parents, valid), ()

  return _stateless(
    DraftShape(num_nodes, max_depth, Candidates.DETERMINISTIC, widths=widths), propose
  )


def _random_parents(draws, max_depth):
  """Returns (parents, depths), each i32[B, N], of random trees no deeper than max_depth."""
  rows = jnp.arange(draws.shape[0])
  parents, depths = jnp.full(draws.shape, -1, jnp.int32), jnp.zeros(draws.shape, jnp.int32)
  for node in range(1, draws.shape[1]):
    parent = jnp.floor(jnp.sqrt(draws[:, node]) * node).astype(jnp.int32)
    parent = jnp.where(depths[rows, parent] < max_depth, parent, 0)
    parents = parents.at[:, node].set(parent)
    depths = depths.at[:, node].set(depths[rows, parent] + 1)
  return parents, depths


def _stateless(shape, propose):
  return Drafter(shape, stateless_init, stateless_prefill, propose, stateless_observe)


# --- A model that breaks -------------------------------------------------------------------------


def failing(model: Model) -> Model:
  """Returns a model whose row b is NaN from position limit[b] on.

  Its parameters are a pair: those of the model, and limit i32[B].
  """

  def extend(params, cache, tokens, positions, mask, **options):
    inner, limit = params
    output, block = model.extend(inner, cache, tokens, positions, mask, **options)
    broken = positions >= limit[:, None]
    by_node = broken[None, :, None, :, None]
    block = block._replace(
      keys=jnp.where(by_node, jnp.nan, block.keys),
      values=jnp.where(by_node, jnp.nan, block.values),
    )
    return output._replace(hidden=jnp.where(broken[..., None], jnp.nan, output.hidden)), block

  return model._replace(
    init_cache=lambda params, *args: model.init_cache(params[0], *args),
    extend=extend,
    unembed=lambda params, hidden: model.unembed(params[0], hidden),
    init_scratch=None,
  )

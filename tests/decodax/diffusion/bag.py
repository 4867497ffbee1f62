"""A masked network small enough to compile at once, and what the diffusion tests share.

Each position sees the mean of what it may see, a position-dependent key per token, so that every
token and every position counts. A key depends on its own token alone: a cache that keeps the right
ones is exact on it.

Axes: `B` batch, `T` tokens, `S` slots, `V` vocabulary, `D` hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import decodax
from decodax import diffusion
from decodax.types import Model
from decodax.types import ModelOutput

VOCAB_SIZE, MASK, SIZE, MAX_POSITION = 13, 12, 24, 64
CAPACITY, WIDTH = 26, 8
PROMPT_LENGTHS = (1, 5, 9, 3, 6, 2)
CANVAS = (12, 16, 7, 16, 1, 20)
EOS_IDS = ((), (3, 7), (), (5,), (), (0, 1, 2, 4))
BATCH = len(PROMPT_LENGTHS)


class _Cache(NamedTuple):
  keys: jax.Array  # f[B, S, D]
  length: jax.Array  # i32[B]


def bag_model() -> Model:
  """Returns the model; its parameters come from `bag_params`."""

  def init_cache(params, batch_size, capacity):
    del params
    return _Cache(jnp.zeros((batch_size, capacity, SIZE)), jnp.zeros((batch_size,), jnp.int32))

  def extend(params, cache, tokens, positions, mask, *, scratch=None, offset=0):
    del scratch, offset
    keys = params['embedding'][tokens] * params['place'][positions]
    valid = jnp.arange(cache.keys.shape[1])[None] < cache.length[:, None]
    cached = jnp.where(valid[:, :, None], cache.keys, 0).sum(1)
    total = jnp.einsum('btn,bnd->btd', mask.astype(keys.dtype), keys) + cached[:, None]
    count = mask.sum(-1) + cache.length[:, None]
    mean = total / jnp.sqrt(jnp.maximum(count, 1))[:, :, None]
    own = params['embedding'][tokens] + params['place'][positions]
    return ModelOutput(jnp.tanh(mean @ params['mix'] + own)), keys

  def commit(cache, block, path, count):
    kept = jnp.take_along_axis(block, path[:, :, None], axis=1, mode='clip')
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0)))
    return _Cache(write(cache.keys, kept, cache.length), cache.length + count)

  def unembed(params, hidden):
    return hidden @ params['head']

  return Model(init_cache, extend, commit, unembed, VOCAB_SIZE)


def bag_params(seed: int = 0, sharpness: float = 2.0) -> Any:
  """Returns parameters whose laws are neither flat nor certain."""
  rng = np.random.default_rng(seed)
  shapes = {
    'embedding': (VOCAB_SIZE, SIZE),
    'place': (MAX_POSITION, SIZE),
    'mix': (SIZE, SIZE),
    'head': (SIZE, VOCAB_SIZE),
  }
  scales = {'embedding': 1, 'place': 1, 'mix': 0.4, 'head': sharpness}
  return {
    name: jnp.asarray(scales[name] * rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


def network(**options: Any) -> diffusion.MaskedModel:
  """Returns the network."""
  return diffusion.MaskedModel(bag_model(), MASK, **options)


def make_request(seed: int = 0, rows=slice(None), **options: Any) -> decodax.Request:
  """Returns a ragged request; every other row is sampled unless told otherwise."""
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(0, MASK, length) for length in PROMPT_LENGTHS]
  prompts[2][1] = MASK  # a prompt may hold the mask's id
  defaults: dict[str, Any] = dict(
    max_new_tokens=CANVAS, eos_ids=EOS_IDS, temperature=(0.0, 1.0, 0.7, 0.0, 1.0, 0.0), seed=seed,
    capacity=CAPACITY, vocab_size=VOCAB_SIZE,
  )  # fmt: skip
  request = decodax.make_request(prompts, **{**defaults, **options})
  return jax.tree.map(lambda array: array[rows], request)


def make_template() -> np.ndarray:
  """Returns i32[B, G], a canvas with some fixed tokens; the third row's first ten are all fixed."""
  template = np.full((BATCH, 20), MASK, np.int32)
  template[1, [0, 4, 9]] = 6, 9, 8
  template[2, :3] = 1, 2, 4
  template[5, :9] = 9
  return template


class Compiled:
  """A jitted function that counts its traces, compiled without optimisation."""

  def __init__(self, fn: Callable):
    self.num_traces = 0

    def counted(*args):
      self.num_traces += 1
      return fn(*args)

    self.jitted = jax.jit(counted, compiler_options={'xla_backend_optimization_level': 0})

  def __call__(self, *args):
    return jax.device_get(self.jitted(*args))


_compiled: dict[Any, Compiled] = {}


def denoiser(name: str, policy_fn: Callable[..., Any], **options: Any) -> Compiled:
  """Returns compiled `denoise` of (params, request, *knobs of the policy), kept by name."""
  if name not in _compiled:

    def run(params, request, *knobs):
      defaults = dict(net=network(), blocks=diffusion.fixed_blocks(WIDTH))
      return diffusion.denoise(params, request, policy=policy_fn(*knobs), **{**defaults, **options})

    _compiled[name] = Compiled(run)
  return _compiled[name]


def assert_same(actual, expected, *, counts: bool = False) -> None:
  """Asserts equal tokens, lengths, traces and results; with `counts`, statistics too."""
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.length, expected.length)
  np.testing.assert_array_equal(actual.committed_at, expected.committed_at)
  np.testing.assert_array_equal(actual.result, expected.result)
  if counts:
    jax.tree.map(np.testing.assert_array_equal, actual.stats, expected.stats)

"""The ways of unmasking that the experiments can run. To add one, add an entry to `_ENTRIES`.

An entry names its policy and the values of its knob to sweep, from careful to bold. A traced knob
never recompiles; a static one (a number of steps) compiles once per value.
"""

from collections.abc import Callable, Sequence
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decodax import diffusion
from decodax.diffusion import policies
from decodax.types import Request
from train import list_tasks
from train.configs import tiny_d2f

STATIC = 'static'  # what the others are compared with: one slot per forward, the surest first
ORACLE = 'oracle'  # a bound: it is told what static will write


class DiffusionMethod(NamedTuple):
  """A way of unmasking, with one knob."""

  name: str
  summary: str  # one line for a person who chooses
  make: Callable[[Any], diffusion.Policy]  # of the knob's value
  knobs: tuple[float, ...]  # from careful to bold
  default: float
  traced: bool = True
  free_drafts: int = 0  # drafts per forward of free drafting; 0 is the plain loop
  needs: str = ''  # what must be there first: a key of `tiny_diffusion.trained_parts`, or
  # 'static answers'
  guidance: bool = False  # is the knob the guidance of a threshold policy?

  @property
  def exactness(self) -> str:
    """What it reproduces or gives up."""
    if self.free_drafts:
      return 'token-identical to static'
    return self.make(self.default).exactness


def _threshold(tau):
  return policies.threshold(tau)


_BOLD = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
_ENTRIES = (
  DiffusionMethod(
    STATIC, 'LLaDA: a fixed number of steps, the surest slots first',
    lambda n: policies.llada(n), (8, 4, 3, 2, 1), 8,
  ),
  DiffusionMethod(
    'random', 'LLaDA: a fixed number of steps, slots at random',
    lambda n: policies.llada(n, 'random'), (8, 4, 2, 1), 8,
  ),
  DiffusionMethod(
    'dream-entropy', 'Dream: a time grid, the least entropy first',
    lambda n: policies.dream(int(n), 'entropy'), (8, 3), 8, traced=False,
  ),
  DiffusionMethod(
    'dream-margin', 'Dream: a time grid, the largest margin first',
    lambda n: policies.dream(int(n), 'margin'), (8, 3), 8, traced=False,
  ),
  DiffusionMethod(
    'maskgit', 'MaskGIT: a cosine schedule', lambda n: policies.maskgit(int(n)), (6, 3), 6,
    traced=False,
  ),
  DiffusionMethod(
    'threshold', 'Fast-dLLM: every slot above a probability', _threshold, _BOLD, 0.9
  ),
  DiffusionMethod(
    'factor', 'Fast-dLLM: the more slots, the surer each', policies.factor,
    (0.1, 0.3, 0.7, 1.0, 1.6, 2.5), 1.0,
  ),
  DiffusionMethod(
    'entropy-bound', 'EB-Sampler: a bound on the dependence, in nats', policies.entropy_bound,
    (0.001, 0.01, 0.1, 0.3, 1.0, 3.0), 0.1,
  ),
  DiffusionMethod(
    'dimple', 'Dimple: a threshold, a schedule where nothing passes',
    lambda tau: policies.dimple(8, tau), (0.99, 0.95, 0.8, 0.5), 0.95,
  ),
  DiffusionMethod(
    'local-leap', 'LocalLeap: less is asked near a sure slot',
    lambda tau: policies.local_leap(tau, 0.75 * tau), (0.95, 0.9, 0.7), 0.9,
  ),
  DiffusionMethod(
    'hierarchy', 'the best slot of every masked run', lambda tau: policies.hierarchy(tau, 0.4),
    (0.95, 0.9, 0.7), 0.9,
  ),
  DiffusionMethod(
    'credit', 'CreditDecoding: a lasting best guess passes earlier', policies.credit,
    (0.99, 0.95, 0.9, 0.7), 0.9,
  ),
  DiffusionMethod(
    'klass', 'KLASS: sure slots whose laws stopped moving',
    lambda tau: policies.klass(tau, 0.01, history=1), (0.95, 0.9, 0.6), 0.9,
  ),
  DiffusionMethod(
    'wino', 'WINO: fill boldly, reopen what a second look doubts',
    lambda tau: policies.wino(tau, 0.9), (0.9, 0.6, 0.3), 0.6,
  ),
  DiffusionMethod(
    'editing', 'LLaDA2.1: fill boldly, overwrite', lambda tau: policies.editing(tau, 0.5),
    (0.9, 0.7, 0.3), 0.7,
  ),
  DiffusionMethod(
    'remdm', 'ReMDM: reveal and mask again', lambda n: policies.remdm(int(n), 0.1), (8, 16), 8,
    traced=False,
  ),
  DiffusionMethod(
    'ancestral', 'MDLM: every mask on its own', lambda n: policies.ancestral(int(n)), (16, 4), 16,
    traced=False,
  ),
  DiffusionMethod(
    'guided', 'the threshold, with guidance', lambda scale: policies.threshold(0.9),
    (0.0, 0.5, 1.0), 0.5, guidance=True,
  ),
  DiffusionMethod(
    'free-draft', 'FreeDave: the static sampler in fewer forwards',
    lambda n: policies.llada(n), (8,), 8, free_drafts=4,
  ),
  DiffusionMethod(
    ORACLE, 'no method but a bound: fills what is already as static will have it',
    lambda _: policies.oracle(), (0,), 0, needs='static answers',
  ),
  DiffusionMethod(
    'learned-filter', 'Learn2PD: a trained filter says what is final', policies.learned_filter,
    (0.99, 0.96, 0.9, 0.7, 0.5), 0.96, needs='filter',
  ),
  DiffusionMethod(
    'pair-filter', 'Learn2PD, with a filter of ours that sees pairs of slots',
    lambda tau: policies.learned_filter(tau, joint=True), (0.97, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3),
    0.9, needs='pair filter',
  ),
  DiffusionMethod(
    'distilled', 'dParallel: a network trained to be sure early', policies.entropy_threshold,
    (0.05, 0.2, 0.5, 1.0), 0.5, needs='distilled',
  ),
  DiffusionMethod(
    'pipelined', 'D2F: a network trained to start a block before the last is done',
    lambda tau: policies.pipelined(tiny_d2f.BLOCK_SIZE, tau), (0.99, 0.95, 0.9, 0.8, 0.7, 0.5),
    0.9, needs='forced',
  ),
  DiffusionMethod(
    'waiting', 'the same network, block after block',
    lambda tau: policies.pipelined(tiny_d2f.BLOCK_SIZE, tau, start_at=1.0, press_at=1.0),
    (0.99, 0.95, 0.9, 0.8, 0.7, 0.5), 0.9, needs='forced',
  ),
)  # fmt: skip
METHODS: dict[str, DiffusionMethod] = {entry.name: entry for entry in _ENTRIES}


class Compiled(NamedTuple):
  """A method compiled for one shape of requests."""

  run: Callable[..., diffusion.DenoiseResult]  # (params, request, knob)
  seconds: float


class Runner:
  """Runs methods on one request; what is compiled is kept."""

  def __init__(
    self,
    net: diffusion.MaskedModel,
    params: Any,
    request: Request,
    *,
    blocks: diffusion.BlockRule,
    cache: diffusion.CacheRule | None = None,
    trained: dict[str, Any] | None = None,
  ):
    self.net, self.params, self.request = net, params, request
    self.blocks, self.cache = blocks, cache
    self.trained = dict(trained or {})
    self._compiled: dict[tuple, Compiled] = {}
    static, _ = self.run(METHODS[STATIC], METHODS[STATIC].default)
    self.trained['static answers'] = jnp.asarray(static.tokens)

  def available(self) -> list[str]:
    """Returns the methods whose weights are there, and that go with the temperature."""
    greedy = not bool((self.request.sampling.temperature > 0).any())
    return [
      name
      for name, method in METHODS.items()
      if (not method.needs or method.needs in self.trained) and (greedy or not method.free_drafts)
    ]

  def compile(self, method: DiffusionMethod, knob: float) -> Compiled:
    """Returns the compiled method."""
    key = (method.name, None if method.traced else knob)
    if key not in self._compiled:
      start = time.perf_counter()
      fn = jax.jit(functools.partial(self._decode, method, None if method.traced else knob))
      args = (self._params(method), self.request, self._knob(method, knob))
      self._compiled[key] = Compiled(fn.lower(*args).compile(), time.perf_counter() - start)
    return self._compiled[key]

  def run(self, method: DiffusionMethod, knob: float) -> tuple[diffusion.DenoiseResult, float]:
    """Returns (the result on the host, seconds), compiling apart."""
    compiled = self.compile(method, knob)
    args = (self._params(method), self.request, self._knob(method, knob))
    start = time.perf_counter()
    result = jax.block_until_ready(compiled.run(*args))
    return jax.device_get(result), time.perf_counter() - start

  def _decode(self, method, static, params, request, knob):
    value = knob if static is None else static
    options: dict[str, Any] = dict(net=self.net, blocks=self.blocks, cache=self.cache)
    if method.needs == 'forced':
      size = tiny_d2f.BLOCK_SIZE
      options['net'] = self.net._replace(block_size=size, forced=True)
      # Blocks count from position 0, so the canvas may reach into one more.
      options['blocks'] = diffusion.fixed_blocks((-(-list_tasks.CANVAS // size) + 1) * size)
    if method.free_drafts:
      return diffusion.free_draft(
        params, request, num_steps=value, num_drafts=method.free_drafts, **options
      )
    if method.guidance:
      options['guidance'] = value
    return diffusion.denoise(params, request, policy=method.make(value), **options)

  def _params(self, method):
    if method.needs in ('distilled', 'forced'):
      return diffusion.Params(self.trained[method.needs])
    return diffusion.Params(self.params, self.trained.get(method.needs, ()))

  def _knob(self, method, knob):
    whole = isinstance(method.default, int)
    return jnp.asarray(knob, jnp.int32 if whole else jnp.float32)


def choose(names: str | None, available: Sequence[str]) -> list[str]:
  """Returns the methods named, the static sampler first; without names, all that can be run.

  Raises:
    ValueError: for a name that is unknown, or whose weights are missing.
  """
  wanted = list(available) if names is None else [name.strip() for name in names.split(',')]
  for name in wanted:
    if name not in METHODS:
      raise ValueError(f'unknown method {name!r}; there are {", ".join(METHODS)}')
    if name not in available:
      needs = METHODS[name].needs or 'temperature 0'
      raise ValueError(f'{name!r} needs what is not there: {needs}')
  return [STATIC, *(name for name in wanted if name != STATIC)]

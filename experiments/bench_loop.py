"""What the decoding loop costs, as ratios within one run.

    python -m experiments.bench_loop --out results/bench-loop

Measures, for a model (SmolLM2-135M-Instruct unless named) at batch 1, greedy:

* plain decoding in tokens/s beside Hugging Face transformers with the same weights and prompts, if
  it is installed (`pip install -e '.[interop]'`), with and without the time to the first token;
* plain decoding as a fraction of what reading the weights once per token would allow at the
  memory bandwidth measured in the same run;
* the time of a call that verifies T tokens, relative to T = 1;
* the time of a call with a cache of 8192 slots relative to 512, 200 of them filled;
* the seconds it takes to compile reading the prompt and a whole generation.

Things compared take turns, and the best of the turns counts: other work on a machine only ever adds
time. On two cores the whole takes about five minutes.
"""

import argparse
from collections.abc import Callable, Mapping
import functools
import pathlib
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

import decodax
from decodax import drafters
from decodax import verifiers
from decodax.types import Params
from experiments import cli
from experiments import files
from models.adapter import as_model
from models.registry import DEFAULT_MODEL
from models.registry import load_model
from models.weights import LoadedModel

_FILLED = 200  # committed tokens when calls are timed
_CALLS = 8  # calls in one timed loop
_READS = 30  # readings of memory, of which the fastest counts
_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16)
_CAPACITIES = (512, 2048, 8192)


class Speed(NamedTuple):
  """Tokens per second over all prompts."""

  decoding: float  # from the first emitted token on
  whole: float  # reading the prompt included


class Result(NamedTuple):
  """All that was measured. Times are best of the repeats."""

  model: str
  device: str
  plain: Speed
  peer: Speed | None
  bandwidth_gb_per_second: float
  weights_gb: float
  call_ms: dict[int, float]  # by width, capacity 512
  capacity_ms: dict[int, float]  # by capacity, width 1
  compile_seconds: dict[str, float]

  def ratios(self) -> dict[str, float]:
    """Returns the figures that are compared between versions, by name."""
    ideal = self.bandwidth_gb_per_second / self.weights_gb
    ratios = {
      'plain / bandwidth limit': self.plain.decoding / ideal,
      'block of 5 / 1 token': self.call_ms[5] / self.call_ms[1],
      'capacity 8192 / 512': self.capacity_ms[8192] / self.capacity_ms[512],
    }
    if self.peer is not None:
      ratios['plain / transformers, decoding'] = self.plain.decoding / self.peer.decoding
      ratios['plain / transformers, prompt and output'] = self.plain.whole / self.peer.whole
    return ratios


# --- Taking turns --------------------------------------------------------------------------------


def best_seconds(jobs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
  """Returns the shortest of `repeats` runs of each job, after one warm-up; jobs take turns."""
  for job in jobs.values():
    job()
  best = dict.fromkeys(jobs, float('inf'))
  for _ in range(repeats):
    for name, job in jobs.items():
      start = time.perf_counter()
      job()
      best[name] = min(best[name], time.perf_counter() - start)
  return best


def _ready(function, *args):
  return functools.partial(lambda: jax.block_until_ready(function(*args)))


# --- What is measured ----------------------------------------------------------------------------


def measure(loaded: LoadedModel, prompts: list[list[int]], options) -> Result:
  """Returns everything the module docstring promises, for one model."""
  params = nnx.state(loaded.transformer)
  num_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
  bandwidth = num_bytes / best_seconds({'read': _read_job(num_bytes)}, _READS)['read'] / 1e9
  generate, compile_seconds = _compile_generation(loaded, params, prompts, options)
  peer = None if options.no_peer else load_peer(loaded)
  lengths = 1, options.max_new_tokens
  jobs = {}
  for index, prompt in enumerate(prompts):
    for length in lengths:
      jobs['plain', index, length] = functools.partial(generate, prompt, length)
      if peer is not None:
        jobs['peer', index, length] = functools.partial(peer, prompt, length)
  best = best_seconds(jobs, options.repeats)

  def speed(who):
    first, whole = (sum(best[who, index, n] for index in range(len(prompts))) for n in lengths)
    num_tokens = options.max_new_tokens * len(prompts)
    return Speed((num_tokens - len(prompts)) / (whole - first), num_tokens / whole)

  calls = {('width', width): _call_job(loaded, params, width, 512) for width in _WIDTHS}
  calls |= {('capacity', c): _call_job(loaded, params, 1, c) for c in _CAPACITIES}
  seconds = best_seconds(calls, options.call_repeats)
  by_kind = {
    kind: {n: 1e3 * s / _CALLS for (k, n), s in seconds.items() if k == kind}
    for kind in ('width', 'capacity')
  }
  return Result(
    model=loaded.name,
    device=str(jax.devices()[0].device_kind),
    plain=speed('plain'),
    peer=None if peer is None else speed('peer'),
    bandwidth_gb_per_second=bandwidth,
    weights_gb=_bytes_per_token(loaded, params) / 1e9,
    call_ms=by_kind['width'],
    capacity_ms=by_kind['capacity'],
    compile_seconds=compile_seconds,
  )


def _bytes_per_token(loaded, params):
  """Returns the bytes of weights a token must read; an untied embedding is only looked up."""
  total = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
  embedding = params['embedding'][...]
  untied = not loaded.transformer.config.tie_embeddings
  return total - untied * embedding.size * embedding.dtype.itemsize


def _read_job(num_bytes):
  """Returns a job that reads as many bytes as the weights have: the sum of one long array."""
  array = jnp.ones((num_bytes // 4,), jnp.float32)
  return _ready(jax.jit(jnp.sum), array)


def _compile_generation(loaded, params, prompts, options):
  """Returns ((prompt, number of tokens) -> tokens, seconds of compiling each of its two parts)."""
  model, drafter = as_model(loaded.transformer), drafters.plain()
  step_fn = decodax.make_step_fn(model=model, drafter=drafter, verifier=verifiers.greedy)
  needed = max(map(len, prompts)) + options.max_new_tokens

  def request(prompt, num_tokens):
    return decodax.make_request(
      [prompt],
      max_new_tokens=num_tokens,
      vocab_size=model.vocab_size,
      capacity=1 << (needed - 1).bit_length(),
    )

  def read(params, request):
    state = decodax.init_state(params, request, model=model, drafter=drafter)
    return decodax.prefill(params, state, model=model, drafter=drafter)

  def decode(params, state):
    return decodax.finish(decodax.generate(params, state, step_fn=step_fn))

  everything = Params(params)
  compiled, seconds = [], {}
  example = request(prompts[0], 1)
  for name, function in (('prefill', read), ('generate', decode)):
    start = time.perf_counter()
    compiled.append(jax.jit(function).lower(everything, example).compile())
    seconds[name] = time.perf_counter() - start
    example = jax.eval_shape(function, everything, example)

  def generate(prompt, num_tokens):
    state = compiled[0](everything, request(prompt, num_tokens))
    return jax.block_until_ready(compiled[1](everything, state)).tokens

  return generate, seconds


def _call_job(loaded, params, width, capacity):
  """Returns a job of `_CALLS` target calls over `width` tokens, one after the other."""
  model = as_model(loaded.transformer)
  cache = model.init_cache(params, 1, capacity)
  cache = cache._replace(length=jnp.full((1,), _FILLED, jnp.int32))
  path = jnp.arange(width, dtype=jnp.int32)[None]
  mask = jnp.tril(jnp.ones((1, width, width), bool))

  def call(params, carry):
    cache, tokens = carry
    positions = cache.length[:, None] + path
    output, block = model.extend(params, cache, tokens, positions, mask)
    logits = model.unembed(params, output.hidden)
    cache = model.commit(cache, block, path, jnp.ones((1,), jnp.int32))
    return cache, decodax.sampling.argmax(logits)

  def calls(params, cache):
    body = functools.partial(lambda _, carry: call(params, carry))
    cache, _ = jax.lax.fori_loop(0, _CALLS, body, (cache, jnp.ones((1, width), jnp.int32)))
    return cache._replace(length=jnp.full((1,), _FILLED, jnp.int32))

  compiled = jax.jit(calls, donate_argnums=1)
  held = [cache]

  def job():
    held[0] = jax.block_until_ready(compiled(params, held[0]))

  return job


def load_peer(loaded: LoadedModel) -> Callable[[list[int], int], Any] | None:
  """Returns (prompt, number of tokens) -> tokens of transformers' greedy generation.

  None if transformers is not installed.
  """
  try:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  path = pathlib.Path(loaded.source['path'] or '')
  where = (path.parent, {'gguf_file': path.name}) if path.suffix == '.gguf' else (path, {})
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    where[0], dtype=torch.float32, **where[1]
  ).eval()
  peer.generation_config.eos_token_id = None

  def generate(prompt, num_tokens):
    with torch.inference_mode():
      return peer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
      )

  return generate


# --- Telling -------------------------------------------------------------------------------------


def render(result: Result) -> str:
  """Returns the result as Markdown."""
  lines = [
    f'{result.model} on {result.device}, float32, batch 1, greedy.',
    '',
    '| figure | value |',
    '|---|---|',
    *_speed_lines('plain decoding', result.plain),
    *_speed_lines('transformers', result.peer),
    f'| memory bandwidth, GB/s | {result.bandwidth_gb_per_second:.1f} |',
    f'| weights read per token, GB | {result.weights_gb:.3f} |',
    *(f'| {name} | {value:.2f} |' for name, value in result.ratios().items()),
    *(f'| compile {name}, s | {value:.2f} |' for name, value in result.compile_seconds.items()),
    '',
    '| tokens in a call | ms | ratio |',
    '|---|---|---|',
  ]
  for width, ms in result.call_ms.items():
    lines.append(f'| {width} | {ms:.2f} | {ms / result.call_ms[1]:.2f} |')
  lines += ['', '| cache slots, 200 filled | ms a call | ratio |', '|---|---|---|']
  for capacity, ms in result.capacity_ms.items():
    lines.append(f'| {capacity} | {ms:.2f} | {ms / result.capacity_ms[512]:.2f} |')
  return '\n'.join(lines)


def _speed_lines(name, speed):
  if speed is None:
    return [f'| {name} | not installed |']
  return [
    f'| {name}, tokens/s | {speed.decoding:.1f} |',
    f'| {name} with the prompt, tokens/s | {speed.whole:.1f} |',
  ]


def main(argv=None) -> int:
  """Measures, prints Markdown and writes `bench_loop.json`."""
  parser = argparse.ArgumentParser(description='What the decoding loop costs.')
  parser.add_argument('--model', default=DEFAULT_MODEL)
  parser.add_argument('--num-prompts', type=int, default=4)
  parser.add_argument('--max-new-tokens', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--call-repeats', type=int, default=12)
  parser.add_argument('--no-peer', action='store_true', help='leave transformers out')
  parser.add_argument('--out', type=pathlib.Path, help='folder for bench_loop.json')
  options = parser.parse_args(argv)
  loaded = load_model(options.model)
  prompts = [
    loaded.tokenizer.encode_chat([{'role': 'user', 'content': prompt.text}])
    for prompt in cli.read_prompts(cli.DEFAULT_PROMPTS, options.num_prompts)
  ]
  result = measure(loaded, prompts, options)
  print(render(result))
  if options.out is not None:
    record = result._asdict()
    record['plain'], record['peer'] = (
      speed and speed._asdict() for speed in (result.plain, result.peer)
    )
    record |= {'ratios': result.ratios(), 'jax': jax.__version__}
    files.write_whole(options.out / 'bench_loop.json', files.to_json(record))
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

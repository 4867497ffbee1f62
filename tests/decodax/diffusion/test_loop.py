"""The loop around the policies: references, caches, blocks, guidance, ends, failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import diffusion
from decodax.diffusion import policies
from decodax.diffusion.loop import init_denoising
from decodax.types import Result
from pallas_kernels import default_implementation
from tests.decodax.diffusion.bag import BATCH
from tests.decodax.diffusion.bag import CANVAS
from tests.decodax.diffusion.bag import CAPACITY
from tests.decodax.diffusion.bag import MASK
from tests.decodax.diffusion.bag import PROMPT_LENGTHS
from tests.decodax.diffusion.bag import VOCAB_SIZE
from tests.decodax.diffusion.bag import WIDTH
from tests.decodax.diffusion.bag import Compiled
from tests.decodax.diffusion.bag import assert_same
from tests.decodax.diffusion.bag import bag_model
from tests.decodax.diffusion.bag import bag_params
from tests.decodax.diffusion.bag import denoiser
from tests.decodax.diffusion.bag import make_request
from tests.decodax.diffusion.bag import network

PARAMS = diffusion.Params(bag_params())


def greedy(**options):
  return make_request(temperature=0.0, **options)


def one_by_one(request, params=PARAMS):
  """Returns the reference: one slot per step, the surest first."""
  return denoiser('static', policies.llada)(params, request, WIDTH)


# --- Policies that must coincide ------------------------------------------------------------------

SAME = {
  'threshold above one': ('threshold', policies.threshold, (1.5,)),
  'factor of zero': ('factor', policies.factor, (0.0,)),
  'no entropy allowed': ('entropy_bound', policies.entropy_bound, (0.0,)),
}


@pytest.mark.parametrize('case', SAME)
def test_a_policy_without_nerve_fills_one_slot_per_step(case):
  name, policy_fn, knobs = SAME[case]
  request = greedy()
  assert_same(denoiser(name, policy_fn)(PARAMS, request, *knobs), one_by_one(request), counts=True)


LIKE_THRESHOLD = {
  'local leap without a radius': (lambda tau: policies.local_leap(tau, 0.1, 0), ()),
  'local leap that relaxes nothing': (lambda tau: policies.local_leap(tau, tau, 3), ()),
  'hierarchy without a floor': (lambda tau: policies.hierarchy(tau, 2.0), ()),
  'credit that counts for nothing': (lambda tau: policies.credit(tau, fusion=0.0), ()),
  'klass that lets anything move': (lambda tau: policies.klass(tau, float('inf')), ()),
  'editing that never edits': (lambda tau: policies.editing(tau, 1.0), ()),
}


@pytest.mark.parametrize('case', LIKE_THRESHOLD)
def test_a_policy_that_comes_down_to_the_threshold(case):
  policy_fn, knobs = LIKE_THRESHOLD[case]
  request, tau = greedy(eos_ids=()), jnp.float32(0.6)
  expected = denoiser('threshold', policies.threshold)(PARAMS, request, tau)
  actual = denoiser(case, policy_fn)(PARAMS, request, tau, *knobs)
  assert_same(actual, expected, counts=True)
  assert expected.stats.num_calls.sum() < sum(CANVAS)


def test_a_pipeline_that_waits_is_the_threshold_in_small_blocks():
  size, tau = 3, jnp.float32(0.6)
  request = greedy(eos_ids=())
  waits = lambda tau: policies.pipelined(size, tau, start_at=1.0, press_at=1.0)  # noqa: E731
  actual = denoiser('a pipeline that waits', waits, blocks=diffusion.fixed_blocks(21))(
    PARAMS, request, tau
  )  # fmt: skip
  small = denoiser('threshold in threes', policies.threshold, blocks=diffusion.fixed_blocks(size))
  expected = small(PARAMS, request, tau)
  assert_same(actual, expected)
  np.testing.assert_array_equal(actual.stats.num_calls, expected.stats.num_calls)
  eager = lambda tau: policies.pipelined(size, tau, start_at=0.0, press_at=0.0)  # noqa: E731
  other = denoiser('a pipeline that does not wait', eager, blocks=diffusion.fixed_blocks(21))(
    PARAMS, request, tau
  )  # fmt: skip
  assert other.stats.num_calls.sum() < expected.stats.num_calls.sum()


def test_a_pipeline_that_waits_is_a_block_causal_network_block_after_block():
  size, tau = 4, jnp.float32(0.6)
  request = greedy()
  waits = lambda tau: policies.pipelined(size, tau, start_at=1.0, press_at=1.0)  # noqa: E731
  net = network(block_size=size, forced=True)
  decode = denoiser('forced', waits, net=net, blocks=diffusion.fixed_blocks(6 * size))
  plain = denoiser(
    'causal in fours', policies.threshold, net=network(block_size=size),
    blocks=diffusion.fixed_blocks(size),
  )  # fmt: skip
  actual, expected = (run(PARAMS, request, tau) for run in (decode, plain))
  assert_same(actual, expected)
  np.testing.assert_array_equal(actual.stats.num_calls, expected.stats.num_calls)


FILTERS = {
  'confidences': lambda bias: policies.Filter(
    jnp.zeros((WIDTH, WIDTH)), jnp.zeros(WIDTH), jnp.zeros((WIDTH, WIDTH)), jnp.full(WIDTH, bias)
  ),
  'pairs': lambda bias: policies.init_pair_filter(jax.random.key(0), 4)._replace(
    outer=jnp.zeros(4), outer_bias=jnp.float32(bias)
  ),
}


@pytest.mark.parametrize('kind', FILTERS)
def test_a_filter_that_always_says_the_same(kind):
  decode = denoiser(f'filter of {kind}', policies.learned_filter)
  request, tau = greedy(eos_ids=()), jnp.float32(0.5)
  never = decode(diffusion.Params(PARAMS.target, FILTERS[kind](-9.0)), request, tau)
  assert_same(never, one_by_one(request), counts=True)
  always = decode(diffusion.Params(PARAMS.target, FILTERS[kind](9.0)), request, tau)
  np.testing.assert_array_equal(always.stats.num_calls, always.stats.num_blocks)


def test_a_filter_of_pairs_that_reads_confidences_only_is_the_threshold():
  # Hidden units hold the positive and the negative part of the log odds; no message is heard.
  blank = jax.tree.map(jnp.zeros_like, policies.init_pair_filter(jax.random.key(0), 2))
  odds = blank.slot.at[2].set(jnp.array([10.0, -10.0]))
  params = blank._replace(slot=odds, outer=jnp.array([1.0, -1.0]))
  request, tau = greedy(eos_ids=()), jnp.float32(0.6)
  decode = denoiser('filter of pairs', policies.learned_filter)
  actual = decode(diffusion.Params(PARAMS.target, params), request, tau)
  expected = denoiser('threshold', policies.threshold)(PARAMS, request, tau)
  assert_same(actual, expected, counts=True)


def test_a_filter_for_another_width_is_refused():
  request = greedy(eos_ids=())
  wrong = policies.init_filter(jax.random.key(0), WIDTH + 1)
  for params in (wrong, ()):
    with pytest.raises(ValueError, match='Filter of width 8'):
      diffusion.denoise(
        diffusion.Params(PARAMS.target, params), request, net=network(),
        policy=policies.learned_filter(), blocks=diffusion.fixed_blocks(WIDTH),
      )  # fmt: skip


def test_left_to_right_is_plain_greedy_decoding():
  request = greedy(eos_ids=())
  result = denoiser('l2r', lambda: policies.llada(WIDTH, 'left_to_right'))(PARAMS, request)
  for row, (start, size) in enumerate(zip(PROMPT_LENGTHS, CANVAS, strict=True)):
    np.testing.assert_array_equal(result.committed_at[row, start : start + size], np.arange(size))
  blocks = denoiser('width one', lambda: policies.llada(1), blocks=diffusion.fixed_blocks(1))
  assert_same(blocks(PARAMS, request), result)


def test_the_loop_equals_its_python_twin():
  request = make_request()

  def loop_fn(cond_fn, body_fn, init):
    return decodax.python_while_loop(cond_fn, Compiled(body_fn), init)

  twin = diffusion.denoise(
    PARAMS, request, net=network(), policy=policies.threshold(0.6),
    blocks=diffusion.fixed_blocks(WIDTH), loop_fn=loop_fn,
  )  # fmt: skip
  assert_same(twin, denoiser('threshold', policies.threshold)(PARAMS, request, 0.6), counts=True)


def test_kernels_do_not_change_what_is_written():
  request = greedy()
  with default_implementation('interpret'):
    with_kernels = denoiser('interpreted', policies.threshold)(PARAMS, request, 0.6)
  assert_same(with_kernels, denoiser('threshold', policies.threshold)(PARAMS, request, 0.6))


def test_a_sweep_and_other_prompts_do_not_recompile():
  compiled = denoiser('sweep', policies.threshold)
  for seed, tau in enumerate((0.5, 0.7, 0.9)):
    request = make_request(seed, temperature=0.2 * seed, max_new_tokens=3 + seed)
    compiled(PARAMS, request, jnp.float32(tau))
  assert compiled.num_traces == 1


# --- Caches ---------------------------------------------------------------------------------------

CACHES = {
  'prefix': diffusion.prefix_cache(),
  'dual': diffusion.dual_cache(),
  'delayed': diffusion.delayed_cache(3),
}


@pytest.mark.parametrize(
  ('name', 'shifted'),
  [
    ('dual', False),
    ('delayed', True),
    pytest.param('dual', True, marks=pytest.mark.slow),
    pytest.param('delayed', False, marks=pytest.mark.slow),
    pytest.param('prefix', False, marks=pytest.mark.slow),
    pytest.param('prefix', True, marks=pytest.mark.slow),
  ],
)
def test_caches_keep_the_right_keys(name, shifted):
  # The key of a token depends on that token alone, so nothing that is kept is ever stale.
  net = network(shifted=shifted)
  request = make_request()
  uncached = denoiser(f'uncached {shifted}', policies.threshold, net=net)
  cached = denoiser(f'{name} {shifted}', policies.threshold, net=net, cache=CACHES[name])
  for tau, share in ((0.6, 1.0), (2.0, 0.8)):
    expected, actual = (run(PARAMS, request, tau) for run in (uncached, cached))
    assert_same(actual, expected)
    assert (actual.stats.num_queries <= expected.stats.num_queries).all()
    assert actual.stats.num_queries.sum() < share * expected.stats.num_queries.sum()


@pytest.mark.parametrize('shifted', [False, True])
def test_the_cache_of_a_block_causal_network_is_exact(shifted):
  net = network(shifted=shifted, block_size=WIDTH)
  request = make_request()
  expected = denoiser(f'causal {shifted}', policies.threshold, net=net)(PARAMS, request, 0.6)
  cache = diffusion.block_causal_cache(prefill_chunk=WIDTH)
  cached = denoiser(f'causal cache {shifted}', policies.threshold, net=net, cache=cache)
  actual = cached(PARAMS, request, 0.6)
  assert_same(actual, expected)
  # Of a block's forwards the first recomputes two blocks at most, the others one.
  most = WIDTH * (actual.stats.num_calls + actual.stats.num_blocks + 1)
  assert (actual.stats.num_queries <= most).all()


def test_an_audited_cache_reports_no_deviation_where_there_is_none():
  cache = diffusion.audited(diffusion.dual_cache())
  request = greedy(eos_ids=())
  result = denoiser('audited', policies.threshold, cache=cache)(PARAMS, request, 0.6)
  plain = denoiser('dual False', policies.threshold, cache=CACHES['dual'])
  assert_same(result, plain(PARAMS, request, 0.6), counts=True)
  deviation = result.cache
  np.testing.assert_array_equal(deviation.same_best, deviation.num_slots)
  assert (deviation.num_slots >= CANVAS).all()
  assert (np.abs(deviation.kl) < 1e-3).all()


# --- Free drafting --------------------------------------------------------------------------------


def free_drafts(num_drafts, **options):
  def run(params, request, num_steps):
    defaults = dict(net=network(), blocks=diffusion.fixed_blocks(WIDTH))
    return diffusion.free_draft(
      params, request, num_steps=num_steps, num_drafts=num_drafts, **{**defaults, **options}
    )

  return Compiled(run)


@pytest.mark.parametrize(
  'num_drafts', [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_free_drafting_is_the_static_sampler_in_fewer_forwards(num_drafts):
  compiled = free_drafts(num_drafts)
  saved = 0
  for seed, num_steps in ((0, WIDTH), (1, 5), (2, 3), (3, WIDTH)):
    params = diffusion.Params(bag_params(seed))
    for eos in ({}, {'eos_ids': ()}):
      request = greedy(seed=seed, **eos)
      static = denoiser('static', policies.llada)(params, request, num_steps)
      free = compiled(params, request, num_steps)
      assert_same(free, static)
      assert (free.stats.num_calls <= static.stats.num_calls).all()
      if num_drafts == 1 and eos:
        np.testing.assert_array_equal(free.stats.num_calls, static.stats.num_calls)
      saved += int((static.stats.num_calls - free.stats.num_calls).sum())
  assert (saved > 0) == (num_drafts > 1)


def test_free_drafting_refuses_rows_that_sample():
  result = free_drafts(3)(PARAMS, make_request(), WIDTH)
  sampled = np.asarray(make_request().sampling.temperature) > 0
  np.testing.assert_array_equal(result.result == Result.UNSATISFIABLE, sampled)


@pytest.mark.parametrize('shifted', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_free_drafting_with_the_exact_cache(shifted):
  net = network(shifted=shifted, block_size=WIDTH)
  request = greedy()
  compiled = free_drafts(3, net=net, cache=diffusion.block_causal_cache(), score='margin')
  margin = denoiser(f'margin causal {shifted}', lambda n: policies.llada(n, 'margin'), net=net)(
    PARAMS, request, WIDTH
  )
  free = compiled(PARAMS, request, WIDTH)
  assert_same(free, margin)
  assert free.stats.num_calls.sum() < margin.stats.num_calls.sum()


# --- Blocks, guidance, ends -----------------------------------------------------------------------


def test_adaptive_blocks_end_at_a_delimiter():
  request = greedy(eos_ids=())
  never = denoiser(
    'adaptive', policies.threshold,
    blocks=diffusion.adaptive_blocks(WIDTH, [4, 9], 2.0, window=WIDTH),
  )  # fmt: skip
  fixed = denoiser('threshold', policies.threshold)
  assert_same(never(PARAMS, request, 0.6), fixed(PARAMS, request, 0.6), counts=True)
  always = denoiser(
    'adaptive now', policies.threshold,
    blocks=diffusion.adaptive_blocks(WIDTH, range(MASK), 0.0, window=5),
  )  # fmt: skip
  result = always(PARAMS, request, 2.0)
  # Every token is a delimiter: a block ends at the surest of its next five slots, which is filled
  # first of all.
  for row, (start, size) in enumerate(zip(PROMPT_LENGTHS, CANVAS, strict=True)):
    when = result.committed_at[row, start : start + size]
    assert result.stats.num_blocks[row] == np.sum(np.maximum.accumulate(when) == np.arange(size))


def test_guidance_of_nothing_changes_nothing_and_some_does():
  request = greedy()
  plain = denoiser('threshold', policies.threshold)(PARAMS, request, 0.6)

  def run(params, request, scale):
    return diffusion.denoise(
      params, request, net=network(), policy=policies.threshold(0.6), guidance=scale,
      blocks=diffusion.fixed_blocks(WIDTH),
    )  # fmt: skip

  guided = Compiled(run)
  nothing = guided(PARAMS, request, jnp.zeros(BATCH))
  assert_same(nothing, plain)
  np.testing.assert_array_equal(nothing.stats.num_queries, 2 * plain.stats.num_queries)
  scales = jnp.asarray([0.0, 1.5, 0.0, 1.5, 0.0, 1.5])
  some = guided(PARAMS, request, scales)
  np.testing.assert_array_equal(some.tokens[::2], plain.tokens[::2])
  assert (some.tokens[1::2] != plain.tokens[1::2]).any()


def test_truncation_ends_a_row_behind_its_stop_id():
  request = greedy()
  result = denoiser(
    'truncated', lambda: policies.llada(20), truncate=True, blocks=diffusion.fixed_blocks(20)
  )(PARAMS, request)
  ended = result.result == Result.EOS
  assert ended.any()
  for row in np.flatnonzero(ended):
    assert result.tokens[row, result.length[row] - 1] in request.eos_ids[row]
    # Nothing behind the end is filled after it, so each forward wrote one slot of the text.
    assert result.committed_at[row].max() < result.stats.num_calls[row]


def test_a_network_that_breaks_down_stops_its_row_only():
  params = bag_params()
  bad = params['embedding'].at[int(MASK) - 1].set(jnp.nan)
  request = greedy(eos_ids=())
  tokens = jnp.where(request.tokens == MASK - 1, 0, request.tokens)
  healthy = request._replace(tokens=tokens)
  broken = request._replace(tokens=tokens.at[1, 0].set(MASK - 1))
  bad_params = diffusion.Params({**params, 'embedding': bad})
  result = one_by_one(broken, bad_params)
  assert result.result[1] == Result.NON_FINITE
  assert (result.result[[0, 2, 3, 4, 5]] != Result.NON_FINITE).any()
  same = one_by_one(healthy, bad_params)
  others = [0, 2, 3, 4, 5]
  np.testing.assert_array_equal(result.tokens[others], same.tokens[others])


REFUSED = {
  'blocks of another size': dict(
    net=network(block_size=4), blocks=diffusion.fixed_blocks(8), policy=policies.threshold()
  ),
  'parts of blocks': dict(
    net=network(block_size=4, forced=True),
    blocks=diffusion.fixed_blocks(6),
    policy=policies.threshold(),
  ),
  'a mask outside': dict(
    net=diffusion.MaskedModel(bag_model(), VOCAB_SIZE), policy=policies.threshold()
  ),
  'revoking from a cache': dict(policy=policies.editing(), cache=diffusion.delayed_cache()),
  'a shadow of a shifted head': dict(net=network(shifted=True), policy=policies.wino()),
  'a frozen cache of a causal network': dict(
    net=network(block_size=WIDTH), policy=policies.threshold(), cache=diffusion.dual_cache()
  ),
  'an exact cache of any network': dict(
    policy=policies.threshold(), cache=diffusion.block_causal_cache()
  ),
  'a template of other rows': dict(
    policy=policies.threshold(), template=np.zeros((BATCH + 1, 4), np.int32)
  ),
  'a filter without parameters': dict(policy=policies.learned_filter()),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_go_together_is_refused(case):
  options = {'net': network(), 'blocks': diffusion.fixed_blocks(WIDTH), **REFUSED[case]}
  with pytest.raises(ValueError):
    diffusion.denoise(PARAMS, make_request(), **options)


@pytest.mark.parametrize(
  'make',
  [
    lambda: diffusion.fixed_blocks(0),
    lambda: diffusion.adaptive_blocks(4, []),
    lambda: diffusion.adaptive_blocks(4, [1], window=0),
    lambda: diffusion.delayed_cache(0),
    lambda: diffusion.prefix_cache(refresh=0),
    lambda: diffusion.free_draft(
      PARAMS, make_request(), net=network(), num_steps=4, score='random',
      blocks=diffusion.fixed_blocks(4),
    ),
    lambda: diffusion.free_draft(
      PARAMS, make_request(), net=network(), num_steps=4, cache=diffusion.dual_cache(),
      blocks=diffusion.fixed_blocks(4),
    ),
  ],
)  # fmt: skip
def test_a_senseless_option_is_refused(make):
  with pytest.raises(ValueError):
    make()


# --- Laws -----------------------------------------------------------------------------------------


def many(policy, blocks, size, rows=4000, seed=0):
  """Returns canvases i32[rows, size] of one prompt, each row with its own random numbers."""
  request = decodax.make_request(
    np.tile(np.array([[3, 1]]), (rows, 1)), max_new_tokens=size, temperature=1.0, seed=seed,
    vocab_size=VOCAB_SIZE, capacity=2 + size,
  )  # fmt: skip
  run = jax.jit(
    lambda p, r: diffusion.denoise(p, r, net=network(), policy=policy, blocks=blocks),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  return jax.device_get(run(diffusion.Params(bag_params(1, 0.5)), request))


def test_the_first_token_has_the_networks_law():
  # One step, one slot: 4000 draws against the law itself, at a chance of 1e-3 to fail by accident.
  from scipy import stats

  result = many(policies.llada(1), diffusion.fixed_blocks(1), 1)
  model, params = bag_model(), bag_params(1, 0.5)
  tokens = jnp.asarray([[3, 1, MASK]])
  cache = model.init_cache(params, 1, 1)
  output, _ = model.extend(params, cache, tokens, jnp.arange(3)[None], jnp.ones((1, 3, 3), bool))
  logits = model.unembed(params, output.hidden)[0, 2].at[MASK].set(-jnp.inf)
  law = np.asarray(jax.nn.softmax(logits), np.float64)[:MASK]
  counts = np.bincount(result.tokens[:, 2], minlength=MASK)[:MASK]
  assert stats.chisquare(counts, 4000 * law / law.sum()).pvalue > 1e-3


@pytest.mark.parametrize('variant', ['cap', pytest.param('rescale', marks=pytest.mark.slow)])
def test_remasking_keeps_the_share_of_masks(variant):
  # After i of 6 steps a slot is masked with probability 1 - i / 6, whatever is remasked.
  policy = policies.remdm(6, 0.5, variant)
  size, rows = 8, 2000
  setup = diffusion.Setup(network(), policy, diffusion.fixed_blocks(size))
  request = decodax.make_request(
    np.tile(np.array([[3, 1]]), (rows, 1)), max_new_tokens=size, temperature=1.0,
    vocab_size=VOCAB_SIZE, capacity=2 + size,
  )  # fmt: skip
  params = diffusion.Params(bag_params(1, 0.5))
  state = jax.jit(lambda p, r: init_denoising(p, r, setup))(params, request)
  step = Compiled(lambda p, s: diffusion.denoise_step(p, s, setup=setup))
  for index in range(1, 6):
    state = step(params, state)
    share = np.mean(state.tokens[:, 2:] == MASK)
    # Slots of a row are nearly independent: 16000 of them, five standard errors.
    assert abs(share - (1 - index / 6)) < 5 * 0.5 / np.sqrt(rows * size), (variant, index)
  assert int(step(params, state).stats.num_revoked.sum()) > 0


def test_the_canvas_is_padded_to_any_capacity():
  small, large = greedy(), greedy(capacity=CAPACITY + 14)
  compiled = denoiser('threshold', policies.threshold)
  a, b = compiled(PARAMS, small, 0.6), compiled(PARAMS, large, 0.6)
  np.testing.assert_array_equal(a.tokens, b.tokens[:, :CAPACITY])
  np.testing.assert_array_equal(a.stats.num_calls, b.stats.num_calls)

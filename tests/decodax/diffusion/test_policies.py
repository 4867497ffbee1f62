"""What every policy must keep to, whatever it does: rows, prompts, masks, and an end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import diffusion
from decodax.diffusion import policies
from decodax.types import Result
from tests.decodax.diffusion.bag import BATCH
from tests.decodax.diffusion.bag import CANVAS
from tests.decodax.diffusion.bag import CAPACITY
from tests.decodax.diffusion.bag import EOS_IDS
from tests.decodax.diffusion.bag import MASK
from tests.decodax.diffusion.bag import PROMPT_LENGTHS
from tests.decodax.diffusion.bag import WIDTH
from tests.decodax.diffusion.bag import assert_same
from tests.decodax.diffusion.bag import bag_params
from tests.decodax.diffusion.bag import denoiser
from tests.decodax.diffusion.bag import make_request
from tests.decodax.diffusion.bag import make_template

_FILTER = policies.init_filter(jax.random.key(0), WIDTH)
_PAIR_FILTER = policies.init_pair_filter(jax.random.key(0), 4)
# name: (policy from its knobs, the knobs)
POLICIES = {
  'llada': (lambda steps: policies.llada(steps), (3,)),
  'llada_random': (lambda: policies.llada(4, 'random'), ()),
  'llada_late': (lambda: policies.llada(8, 'margin', late_ids=(3, 7)), ()),
  'dream': (lambda heat: policies.dream(5, 'entropy', order_temperature=heat), (0.3,)),
  'ancestral': (lambda: policies.ancestral(6), ()),
  'first_hitting': (policies.first_hitting, ()),
  'maskgit': (lambda heat: policies.maskgit(5, choice_temperature=heat), (1.0,)),
  'threshold': (policies.threshold, (0.6,)),
  'entropy_threshold': (policies.entropy_threshold, (0.7,)),
  'factor': (policies.factor, (1.0,)),
  'entropy_bound': (policies.entropy_bound, (0.5,)),
  'dimple': (lambda tau: policies.dimple(WIDTH, tau), (0.7,)),
  'local_leap': (lambda kappa, low: policies.local_leap(kappa, low, 2), (0.8, 0.5)),
  'hierarchy': (policies.hierarchy, (0.8, 0.3)),
  'credit': (lambda tau, fusion: policies.credit(tau, fusion=fusion), (0.8, 0.7)),
  'klass': (policies.klass, (0.6, 0.1)),
  'wino': (policies.wino, (0.4, 0.7)),
  'remdm': (lambda eta: policies.remdm(7, eta), (0.3,)),
  'remdm_confidence': (lambda: policies.remdm(7, variant='confidence'), ()),
  'remdm_loop': (lambda: policies.remdm(9, 0.4, 'loop', loop_alpha=0.6), ()),
  'editing': (lambda fill, edit: policies.editing(fill, edit, max_post_steps=3), (0.4, 0.3)),
  'learned_filter': (policies.learned_filter, (0.6,)),
  'pair_filter': (policies.learned_filter, (0.6,)),
  'pipelined': (lambda tau, share: policies.pipelined(3, tau, start_at=share), (0.6, 0.3)),
}
SLOW = (
  'llada_random', 'llada_late', 'ancestral', 'first_hitting', 'remdm_confidence', 'remdm_loop',
  'entropy_threshold', 'local_leap', 'hierarchy', 'factor',
)  # fmt: skip
ALL = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in POLICIES]


def run(name, request, params=None):
  policy_fn, knobs = POLICIES[name]
  options = {'template': make_template()} if len(request.tokens) == BATCH else {}
  compiled = denoiser(f'{name} on a template', policy_fn, **options)
  brought = _PAIR_FILTER if name == 'pair_filter' else _FILTER
  params = diffusion.Params(params or bag_params(), brought)
  return compiled(params, request, *(jnp.float32(k) if isinstance(k, float) else k for k in knobs))


@pytest.mark.parametrize('name', ALL)
def test_every_policy_fills_the_canvas_and_nothing_else(name):
  policy_fn, knobs = POLICIES[name]
  policy = policy_fn(*knobs)
  request, template = make_request(), make_template()
  result = run(name, request)
  for row in range(BATCH):
    start, length = PROMPT_LENGTHS[row], int(result.length[row])
    canvas = result.tokens[row, start:length]
    np.testing.assert_array_equal(result.tokens[row, :start], request.tokens[row, :start])
    assert MASK not in canvas
    assert (result.tokens[row, length:] == 0).all()
    # The template stands, unless the row ended before.
    fixed = template[row, : len(canvas)]
    np.testing.assert_array_equal(canvas[fixed != MASK], fixed[fixed != MASK])
    # A row ends at its first stop id, or at the end of its canvas.
    stops = np.isin(canvas, EOS_IDS[row])
    assert not stops[:-1].any()
    if result.result[row] == Result.EOS:
      assert stops[-1]
    else:
      assert result.result[row] == Result.LENGTH
      assert length == start + CANVAS[row]
    # Each block takes a bounded number of forwards.
    most = policy.max_steps(WIDTH) * -(-CANVAS[row] // WIDTH)
    assert 0 < result.stats.num_calls[row] <= most
    when = result.committed_at[row]
    free = np.zeros(CAPACITY, bool)
    free[start:length] = fixed == MASK
    assert (when[~free] == -1).all()
    assert (when[free] >= 0).all() and when.max() < result.stats.num_calls[row]
    if policy.guarded and not policy.revokes and result.result[row] == Result.LENGTH:
      assert set(when[free]) == set(range(result.stats.num_calls[row]))
      assert result.stats.num_committed[row] == free.sum()
    if not policy.revokes:
      assert result.stats.num_revoked[row] == result.stats.num_edited[row] == 0


@pytest.mark.parametrize('name', ALL)
def test_no_row_depends_on_its_neighbours(name):
  request = make_request()
  expected = run(name, request)
  # The same rows upside down, and each second one replaced: the template moves along by row.
  other = make_request(seed=5, row_ids=range(50, 50 + BATCH))
  keep = np.arange(BATCH) % 2 == 0
  mixed = jax.tree.map(
    lambda a, b: (
      jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)
      if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
      else jax.random.wrap_key_data(
        jnp.where(keep[:, None], jax.random.key_data(a), jax.random.key_data(b))
      )
    ),
    request._replace(eos_ids=request.eos_ids),
    other,
  )
  actual = run(name, mixed)
  take = lambda tree: jax.tree.map(lambda a: a[keep], tree)  # noqa: E731
  assert_same(take(actual), take(expected), counts=True)

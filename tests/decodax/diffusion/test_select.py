"""Each policy's rule against the same rule written as a plain loop over one row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.diffusion import policies
from decodax.diffusion.scores import by_rank
from decodax.diffusion.scores import ranks
from decodax.diffusion.scores import summarize
from decodax.diffusion.scores import top
from pallas_kernels.unmask.reference import unmask_reference
from tests.decodax.diffusion.views import ROWS
from tests.decodax.diffusion.views import SLOTS
from tests.decodax.diffusion.views import TOKENS
from tests.decodax.diffusion.views import laws_of
from tests.decodax.diffusion.views import make_view

SEEDS = range(6)


def row_of(view, row):
  """Returns (eligible slots in order of confidence, confidence f[W], entropy f[W])."""
  p = laws_of(view.logits[row])
  confidence = p.max(-1)
  entropy = -(p * np.log(p)).sum(-1)
  slots = [int(s) for s in np.flatnonzero(view.eligible[row])]
  return sorted(slots, key=lambda s: -confidence[s]), confidence, entropy


def naive_threshold(view, row):
  slots, confidence, _ = row_of(view, row)
  return [s for s in slots if confidence[s] >= 0.7]


def naive_entropy_threshold(view, row):
  slots, _, entropy = row_of(view, row)
  return [s for s in slots if entropy[s] <= 0.6]


def naive_factor(view, row):
  slots, confidence, _ = row_of(view, row)
  count = 0
  for n, slot in enumerate(slots, 1):
    if (n + 1) * (1 - confidence[slot]) >= 1.3:
      break
    count = n
  return slots[:count]


def naive_entropy_bound(view, row):
  slots, _, entropy = row_of(view, row)
  count = 0
  for n in range(1, len(slots) + 1):
    h = entropy[slots[:n]]
    if h.sum() - h.max() > 0.4:
      break
    count = n
  return slots[:count]


def naive_local_leap(view, row):
  slots, confidence, _ = row_of(view, row)
  anchors = [s for s in slots if confidence[s] >= 0.8]
  near = lambda s: any(abs(s - a) <= 2 for a in anchors)  # noqa: E731
  return [s for s in slots if confidence[s] >= (0.5 if near(s) else 0.8)]


def naive_hierarchy(view, row):
  slots, confidence, _ = row_of(view, row)
  chosen = [s for s in slots if confidence[s] >= 0.9]
  run = []
  for slot in range(SLOTS + 1):
    if slot in slots:
      run.append(slot)
      continue
    if run:
      best = max(run, key=lambda s: confidence[s])
      if confidence[best] > 0.45:
        chosen.append(best)
    run = []
  return chosen


def naive_llada(view, row):
  slots, _, _ = row_of(view, row)
  base, rest = divmod(int(view.num_masks[row]), 4)
  return slots[: base + (int(view.step[row]) < rest)]


def naive_dream(view, row):
  slots, _, entropy = row_of(view, row)
  times = np.linspace(1, 1e-3, 6)
  step = int(view.step[row])
  count = int(len(slots) * (1 - times[step + 1] / times[step])) if step < 4 else len(slots)
  return sorted(slots, key=lambda s: entropy[s])[:count]


def naive_maskgit(view, row):
  slots, _, _ = row_of(view, row)
  step = int(view.step[row])
  stay = int(np.floor(int(view.num_masks[row]) * np.cos(np.pi / 2 * (step + 1) / 5)))
  stay = 0 if step == 4 else min(max(stay, 1), max(len(slots) - 1, 1))
  return slots[: max(len(slots) - stay, 0)]


def naive_dimple(view, row):
  slots, confidence, _ = row_of(view, row)
  times, step, masks = np.linspace(1, 1e-3, 10), int(view.step[row]), len(slots)
  sure = [s for s in slots if confidence[s] > 0.95]
  if step == 8:
    return slots
  if sure:
    return sure
  left = masks / int(view.num_masks[row])
  for index in range(step + 1, 10):
    owed = int(np.floor(masks * (1 - times[index] / left)))
    if times[index] < left and owed >= 1:
      return slots[:owed]
  return slots


def naive_pipelined(view, row):
  open_slots, confidence, _ = row_of(view, row)
  chosen, before, started = [], 1.0, True
  for first in range(0, SLOTS, 3):
    started = started and before >= 0.3
    ours = [s for s in open_slots if first <= s < first + 3]
    sure = [s for s in ours if confidence[s] >= 0.7]
    if started:
      chosen += sure or (ours[:1] if before >= 0.6 else [])
    before = 1 - len(ours) / 3
  return chosen


NAIVE = {
  'threshold': (policies.threshold(0.7), naive_threshold),
  'entropy_threshold': (policies.entropy_threshold(0.6), naive_entropy_threshold),
  'factor': (policies.factor(1.3), naive_factor),
  'entropy_bound': (policies.entropy_bound(0.4), naive_entropy_bound),
  'local_leap': (policies.local_leap(0.8, 0.5, 2), naive_local_leap),
  'hierarchy': (policies.hierarchy(0.9, 0.45), naive_hierarchy),
  'llada': (policies.llada(4), naive_llada),
  'dream': (policies.dream(5, 'entropy'), naive_dream),
  'maskgit': (policies.maskgit(5), naive_maskgit),
  'dimple': (policies.dimple(9, 0.95), naive_dimple),
  'pipelined': (policies.pipelined(3, 0.7, start_at=0.3, press_at=0.6), naive_pipelined),
}


@pytest.mark.parametrize('name', NAIVE)
def test_a_policy_selects_what_its_rule_says(name):
  policy, naive = NAIVE[name]
  select = jax.jit(lambda view: policy.select((), (), view).commit & view.eligible)
  seen = set()
  for seed in SEEDS:
    view = make_view(seed, step=seed % 5)._replace(mask_id=TOKENS)
    chosen = np.asarray(select(view))
    for row in range(ROWS):
      wanted = sorted(set(naive(view, row)))
      assert list(np.flatnonzero(chosen[row])) == wanted, (name, seed, row)
      seen.add(len(wanted))
  assert len(seen) > 1  # the cases tell rules apart


def test_credit_adds_up_and_fades():
  tau, fusion, exponent, decay = 0.8, 0.9, 0.5, 0.6
  policy = policies.credit(tau, fusion=fusion, exponent=exponent, decay=decay)
  state = policy.init(ROWS, SLOTS, TOKENS)
  credit = np.zeros((ROWS, SLOTS, TOKENS))
  for step in range(3):
    view = make_view(step, step=step, sharpness=1.5)
    selection = policy.select((), state, view)
    state = selection.state
    p = laws_of(view.logits)
    credit *= decay
    for row, slot in zip(*np.nonzero(view.eligible), strict=True):
      best = p[row, slot].argmax()
      credit[row, slot, best] += p[row, slot, best] ** exponent
    fused = laws_of(np.asarray(view.logits) + fusion * np.log1p(credit))
    for row in range(ROWS):
      slots = np.flatnonzero(view.eligible[row])
      chance = fused[row].max(-1)
      wanted = {int(s) for s in slots if chance[s] >= tau} | {int(slots[chance[slots].argmax()])}
      assert set(np.flatnonzero(selection.commit[row])) == wanted
      np.testing.assert_array_equal(
        np.asarray(selection.tokens)[row, slots], fused[row, slots].argmax(-1)
      )


def test_credit_of_an_unchanged_context_only_grows():
  policy = policies.credit(0.9, decay=1.0)
  view = make_view(0, sharpness=0.5)
  state, last = policy.init(ROWS, SLOTS, TOKENS), 0
  for _ in range(4):
    count = int(policy.select((), state, view).commit.sum())
    state = policy.select((), state, view).state
    assert count >= last
    last = count


def test_klass_waits_until_a_law_is_quiet():
  policy = policies.klass(0.3, 0.05, history=2)
  state = policy.init(ROWS, SLOTS, TOKENS)
  view, moved = make_view(0), make_view(1, tokens=make_view(0).tokens)
  wanted = [False, False, True, False, False, True]
  for step, (seen, ready) in enumerate(
    zip([view, view, view, moved, moved, moved], wanted, strict=True)
  ):
    selection = policy.select((), state, seen)
    state = selection.state
    sure = np.asarray(seen.confidence) >= 0.3
    np.testing.assert_array_equal(selection.commit, sure & ready, err_msg=str(step))


def test_a_joint_filter_bounds_the_risk_of_a_step():
  params = policies.init_pair_filter(jax.random.key(1), 4)
  for joint in (False, True):
    policy, seen = policies.learned_filter(0.3, joint=joint), set()
    for seed in SEEDS:
      view = make_view(seed)._replace(mask_id=TOKENS)
      logits = policies.pair_filter_logits(params, policies.gather_evidence(view))
      chance = np.asarray(jax.nn.sigmoid(logits))
      chosen = np.asarray(policy.select(params, (), view).commit)
      for row in range(ROWS):
        slots, confidence, _ = row_of(view, row)
        wanted, risk = set(), 1.0
        for slot in sorted(slots, key=lambda s, row=row: -chance[row, s]):
          risk = risk * chance[row, slot] if joint else chance[row, slot]
          if risk >= 0.3:
            wanted.add(slot)
        wanted = wanted or set(slots[:1])
        assert set(np.flatnonzero(chosen[row])) == wanted
        seen.add(len(wanted))
    assert len(seen) > 1


def test_evidence_is_what_two_slots_make_of_each_other():
  view = make_view(2, sharpness=1.5)._replace(mask_id=TOKENS)
  found = jax.jit(policies.gather_evidence)(view)
  p, tokens = laws_of(view.logits), np.asarray(view.tokens)
  guess = np.where(tokens == TOKENS, np.asarray(view.candidates), tokens)
  eligible = np.asarray(view.eligible)
  for row in range(ROWS):
    for i in range(SLOTS):
      chance = p[row, i, guess[row, i]]
      wanted = [1, chance, np.log(chance / (1 - chance)) / 10, np.sort(p[row, i])[-2],
                -(p[row, i] * np.log(p[row, i])).sum()]  # fmt: skip
      wanted = np.array([*wanted, 0]) * eligible[row, i] + np.eye(6)[5] * eligible[row].mean()
      np.testing.assert_allclose(found.slots[row, i], wanted, rtol=1e-4, atol=1e-5)
      for j in range(SLOTS):
        a, b = guess[row, i], guess[row, j]
        same = a == b

        def gives(slot, token, same=same, row=row):
          masked = tokens[row, slot] == TOKENS
          return max(np.log(p[row, slot, token]), -12) if masked else (0 if same else -12)

        order = np.where(eligible[row], p[row].max(-1), 2)
        wanted = [gives(i, b) / 12, gives(j, a) / 12, same, eligible[row, j], order[j] > order[i]]
        np.testing.assert_allclose(found.pairs[row, i, j], wanted, atol=1e-5, err_msg=f'{i} {j}')


def test_wino_reopens_less_than_it_filled():
  policy = policies.wino(0.4, 0.5, fewest=2, most=4)
  for seed in SEEDS:
    view = make_view(seed, sharpness=1.5)
    before = np.array([1, 2, 3, 30])
    selection = policy.select((), jnp.asarray(before), view)
    opinion = laws_of(view.shadow)
    assert selection.revoke is not None
    for row in range(ROWS):
      slots, confidence, _ = row_of(view, row)
      sure = [s for s in slots if confidence[s] > 0.4] or slots[:1]
      filled = sure[: min(max(int(0.7 * len(slots)), 2), 4)]
      written = np.flatnonzero(view.editable[row])
      mine = {s: opinion[row, s, int(view.tokens[row, s])] for s in written}
      doubtful = [s for s in written if mine[s] < 0.5]
      doubtful = sorted(doubtful, key=lambda s: mine[s])[: before[row] - 1]
      assert list(np.flatnonzero(selection.commit[row])) == sorted(filled)
      reopened = sorted(doubtful) if len(filled) > 1 else []
      assert list(np.flatnonzero(selection.revoke[row])) == reopened
      assert int(selection.state[row]) == len(filled)


def test_greedy_product_is_the_greedy_joint_under_the_factor_rule():
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(400):
    joint = rng.dirichlet(np.full(27, 0.02)).reshape(3, 3, 3)
    marginals = [joint.sum(axis=tuple(a for a in range(3) if a != i)) for i in range(3)]
    least = min(m.max() for m in marginals)
    if (3 + 1) * (1 - least) < 1:
      hits += 1
      assert np.unravel_index(joint.argmax(), joint.shape) == tuple(m.argmax() for m in marginals)
  assert hits > 50


# --- What policies are made of ------------------------------------------------------------------


@pytest.mark.parametrize(('size', 'chunk'), [(7, 4096), (40, 8), (41, 8), (64, 64)])
def test_a_summary_is_that_of_the_whole_law(size, chunk):
  rng = np.random.default_rng(size)
  logits = 4 * rng.standard_normal((3, 5, size)).astype(np.float32)
  logits[0, :, 3:] = -np.inf
  logits[1, 0, [2, 6]] = 30.0  # a tie
  logits[2, :, : size // 2] = -np.inf
  found = jax.jit(lambda x: unmask_reference(x, chunk=chunk))(logits)
  p = laws_of(logits)
  ordered = np.sort(p, axis=-1)
  entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)
  np.testing.assert_array_equal(found.token, logits.argmax(-1))
  np.testing.assert_allclose(found.confidence, ordered[..., -1], rtol=2e-6)
  np.testing.assert_allclose(found.second, ordered[..., -2], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4, atol=2e-6)
  whole = summarize(jnp.asarray(logits))  # any number of leading axes
  np.testing.assert_array_equal(whole.best, found.token)
  for mine, theirs in zip(whole[1:], (found.confidence, found.second, *found[4:]), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-6)


def test_a_summary_of_nonsense_is_not_finite():
  logits = np.zeros((2, 6), np.float32)
  logits[0, 4] = np.nan
  logits[1, 0] = np.inf
  for chunk in (2, 6):
    found = unmask_reference(jnp.asarray(logits)[None], chunk=chunk)
    assert not np.isfinite(found.log_normalizer).any()
  assert not np.isfinite(summarize(jnp.asarray(logits)).log_normalizer).any()


def test_ranks_are_a_permutation_with_the_best_first():
  score = jnp.asarray([[1.0, 5.0, 5.0, 0.0], [-jnp.inf, 2.0, 1.0, 3.0]])
  eligible = jnp.asarray([[True, True, True, False], [True, False, True, True]])
  np.testing.assert_array_equal(ranks(score, eligible), [[2, 0, 1, 3], [2, 3, 1, 0]])
  np.testing.assert_array_equal(
    by_rank(score, ranks(score, eligible)), [[5, 5, 1, 0], [3, 1, -np.inf, 2]]
  )
  np.testing.assert_array_equal(
    top(score, eligible, jnp.asarray([2, 9])),
    [[False, True, True, False], [True, False, True, True]],
  )


@pytest.mark.parametrize(
  'make',
  [
    lambda: policies.llada(0),
    lambda: policies.llada(4, 'best'),
    lambda: policies.dream(0),
    lambda: policies.dream(4, order_temperature=-1.0),
    lambda: policies.maskgit(4, schedule='sine'),
    lambda: policies.threshold(-0.1),
    lambda: policies.factor(-1.0),
    lambda: policies.entropy_bound(-1.0),
    lambda: policies.local_leap(radius=-1),
    lambda: policies.credit(decay=1.5),
    lambda: policies.klass(history=0),
    lambda: policies.wino(fewest=9, most=3),
    lambda: policies.remdm(4, 2.0),
    lambda: policies.remdm(4, variant='wave'),
    lambda: policies.editing(max_post_steps=-1),
    lambda: policies.learned_filter(-1.0),
    lambda: policies.pipelined(0),
    lambda: policies.pipelined(4, -1.0),
    lambda: policies.pipelined(4, start_at=1.5),
    lambda: policies.pipelined(4, press_at=-0.5),
  ],
)
def test_a_senseless_knob_is_refused(make):
  with pytest.raises(ValueError, match=r'must|need|takes'):
    make()

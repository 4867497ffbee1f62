"""Length control: every rule by itself, and in the loop, where it must change nothing but speed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import controllers
from decodax import drafters
from decodax import static_trees
from decodax import theory
from decodax import verifiers
from decodax.controllers import DraftStep
from decodax.controllers import Feedback
from decodax.noise import RoundKeys
from decodax.types import Candidates
from decodax.types import Observation
from decodax.types import Proposal
from decodax.types import Verdict
from tests.decodax import zoo as zoo_lib
from tests.table_model import random_table
from tests.table_model import table_model

V, BATCH, MOST = 5, 6, 6
MODEL = table_model(V)
EXPANDER = drafters.model_expander(MODEL)
TARGET, DRAFT = (jnp.asarray(random_table(s, V, sharpness=2.0), jnp.float32) for s in (3, 4))
LENGTHS, TIMES = (0, 2, 4), (1.0, 1.3, 1.6)


def _step(index, probability, hidden=None):
  """A draft from a law whose largest probability is given per row, over two tokens."""
  p = jnp.asarray(probability, jnp.float32)
  logits = jnp.log(jnp.stack([p, 1 - p], axis=-1))
  hidden = jnp.zeros((len(p), 1)) if hidden is None else hidden
  return DraftStep(jnp.int32(index), jnp.zeros(len(p), jnp.int32), logits, hidden)


def _feedback(drafted, accepted, live=True):
  drafted, accepted = np.broadcast_arrays(drafted, accepted)
  tested = np.minimum(accepted + 1, drafted)
  return Feedback(
    *(jnp.asarray(a) for a in (drafted, accepted, tested, np.full(tested.shape, live)))
  )


def _state(batch_size):
  request = decodax.make_request([[1, 2]] * batch_size, max_new_tokens=8, vocab_size=V)
  return decodax.init_state(decodax.Params(TARGET), request, model=MODEL, drafter=drafters.plain())


def _limit(controller, ctl, batch_size):
  return controller.start((), ctl, _state(batch_size))


def _stops(controller, steps, params=()):
  """Returns, per row, the step after which the controller stops; -1 if it never does."""
  batch_size = steps[0].token.shape[0]
  _, ctl = _limit(controller, controller.init(batch_size), batch_size)
  stopped = np.full(batch_size, -1)
  for step in steps:
    stop, ctl = controller.should_stop(params, ctl, step)
    stopped = np.where((stopped < 0) & np.asarray(stop), int(step.index), stopped)
  return stopped.tolist()


# --- The rules, one by one -----------------------------------------------------------------------


def test_confidence_and_entropy_look_at_the_law_of_the_last_draft():
  laws = np.array([[0.9, 0.9, 0.55], [0.9, 0.7, 0.99], [0.59, 0.9, 0.9], [0.9, 0.9, 0.9]])
  steps = [_step(i + 1, laws[:, i]) for i in range(3)]
  assert _stops(controllers.confidence(0.6), steps) == [3, -1, 1, -1]
  entropy = -(laws * np.log(laws) + (1 - laws) * np.log(1 - laws))
  threshold = 0.5  # nats
  expected = [next((i + 1 for i in range(3) if row[i] > threshold), -1) for row in entropy]
  assert _stops(controllers.entropy(threshold), steps) == expected == [3, 2, 1, -1]


def test_cumulative_stops_at_the_product():
  steps = [_step(i, [0.8, 0.99]) for i in range(1, 8)]
  expected = next(i for i in range(1, 8) if 0.8**i < 0.3)
  assert _stops(controllers.cumulative(0.3), steps) == [expected, -1] == [6, -1]
  rule = controllers.cumulative(0.3, score_fn=lambda params, step: jnp.full((2,), params))
  assert _stops(rule, steps, params=0.5) == [2, 2]


def test_specdec_pp_stops_at_the_analytic_step():
  # The head gives the acceptance of the draft before; draft s is drafted before s is judged.
  acceptance = np.array(
    [[0.9, 0.8, 0.9, 0.9, 0.9, 0.9], [0.99] * 6, [0.5, 0.9, 0.9, 0.9, 0.9, 0.9]]
  )
  steps = [
    _step(i + 1, [0.5] * 3, hidden=jnp.asarray(acceptance[:, i - 1 : i] if i else -np.ones((3, 1))))
    for i in range(6)
  ]
  rule = controllers.specdec_pp(lambda params, step: step.hidden[:, 0], threshold=0.3)
  expected = []
  for row in acceptance:
    judged = np.concatenate([[1.0], np.cumprod(row)[:5]])  # after drafts 1 .. 6
    expected.append(next((i + 1 for i in range(6) if 1 - judged[i] > 0.3), -1))
  assert _stops(rule, steps) == expected == [4, -1, 2]


def test_expected_gain_stops_where_one_more_draft_no_longer_pays():
  cost, memory, prior = 0.2, 0.9, (4.0, 2.0)
  rule = controllers.expected_gain(cost, memory=memory, prior=prior)
  ctl = rule.init(1)
  tokens = time = 1.0
  accepted = rejected = 0.0
  for drafted, kept in ((4, 4), (4, 1), (3, 2)):
    ctl = rule.update((), ctl, _feedback([drafted], [kept]))
    tokens, time = memory * tokens + kept + 1, memory * time + 1 + cost * drafted
    accepted, rejected = memory * accepted + kept, memory * rejected + (kept < drafted)
  mean = (prior[0] + accepted) / (sum(prior) + accepted + rejected)
  expected = next(i for i in range(1, 30) if 0.8**i * mean < cost * tokens / time)
  _, ctl = _limit(rule, ctl, 1)
  stops = []
  for i in range(1, 30):
    stop, ctl = rule.should_stop((), ctl, _step(i, [0.8]))
    stops.append(bool(stop[0]))
  assert stops.index(True) + 1 == expected and 1 < expected < 10


def test_additive_grows_by_two_and_shrinks_by_one():
  rule = controllers.additive(8, start=4)
  ctl = rule.init(2)
  seen = []
  for accepted in ([4, 0], [6, 3], [8, 1], [2, 0], [7, 0]):
    seen.append(np.asarray(_limit(rule, ctl, 2)[0]).tolist())
    ctl = rule.update((), ctl, _feedback(seen[-1], accepted))
  assert seen == [[4, 4], [6, 3], [8, 5], [8, 4], [7, 3]]


@pytest.mark.parametrize(('alpha', 'cost', 'best'), [(0.6, 0.1, 3), (0.8, 0.05, 8), (0.3, 0.4, 0)])
def test_optimal_length_is_that_of_theory(alpha, cost, best):
  rule = controllers.optimal_length(alpha, controllers.cost_ratio_times(cost, 20))
  assert rule.lengths == (best,) and int(theory.optimal_draft_length(alpha, cost, 20)[0]) == best
  assert np.asarray(_limit(rule, rule.init(2), 2)[0]).tolist() == [best, best]


def test_optimal_length_follows_measured_positions_and_times():
  curve = theory.CostCurve(np.array([1, 2, 4, 8]), np.array([10.0, 11.0, 13.0, 30.0]))
  times = controllers.round_times_ms(curve, 5, draft_step_ms=1.0, overhead_ms=0.5)
  np.testing.assert_allclose(times, [10, 12.5, 14.5, 16.5, 21.75, 27.0])
  by_position = np.array([0.9, 0.8, 0.1, 0.1, 0.1])
  tokens = [1 + sum(np.prod(by_position[:j]) for j in range(1, g + 1)) for g in range(6)]
  best = int(np.argmax(np.array(tokens) / times))
  assert controllers.optimal_length(by_position, times).lengths == (best,) == (2,)


@pytest.mark.parametrize('alpha', [0.05, 0.5, 0.75, 0.95])
def test_online_learns_the_acceptance_and_takes_the_best_length(alpha):
  lengths, times = (0, 1, 2, 4, 8), np.array([1.0, 1.15, 1.3, 1.6, 2.2])
  rule = controllers.online(times, lengths, memory=0.995)
  rng, rows = np.random.default_rng(0), 64
  ctl = rule.init(rows)
  start = jax.jit(functools.partial(rule.start, state=_state(rows)))
  update, history = jax.jit(rule.update), []
  for _ in range(400):
    limit = np.asarray(start((), ctl)[0])
    runs = np.cumprod(rng.random((rows, 8)) < alpha, axis=1).sum(1)
    ctl = update((), ctl, _feedback(limit, np.minimum(runs, limit)))
    history.append(limit)
  late = np.concatenate(history[200:])
  value = np.asarray([theory.expected_tokens(alpha, n) for n in lengths]) / times
  best = lengths[int(np.argmax(value))]
  assert np.mean(late == best) > 0.75
  # What is chosen is worth within 3 % of the best, though each row explores now and then.
  worth = dict(zip(lengths, value, strict=True))
  assert np.mean([worth[n] for n in late]) > 0.97 * value.max()
  if best:  # with nothing drafted there is little to learn from
    mean = controllers.posterior_mean(ctl, (2.0, 1.0))
    assert abs(float(mean.mean()) - alpha) < 0.03


def test_untested_drafts_count_for_nothing():
  rule = controllers.online(TIMES, LENGTHS, memory=1.0)
  ctl = rule.update((), rule.init(3), _feedback([4, 4, 4], [0, 2, 4]))
  np.testing.assert_array_equal(ctl.accepted, [0, 2, 4])
  np.testing.assert_array_equal(ctl.rejected, [1, 1, 0])


def test_feedback_of_a_tree_tests_what_lies_below_the_path():
  #   0 - 1 - 3      row 0 accepts 1 and rejects 3; row 1 ends at the leaf 2; row 2 has no draft
  #     - 2
  proposal = Proposal(
    tokens=jnp.zeros((3, 4), jnp.int32),
    parents=jnp.tile(jnp.asarray([[-1, 0, 0, 1]]), (3, 1)),
    valid=jnp.asarray([[True] * 4, [True] * 4, [True, False, False, False]]),
  )
  verdict = Verdict(
    path=jnp.asarray([[0, 1, 0], [0, 2, 0], [0, 0, 0]]),
    num_accepted=jnp.asarray([1, 1, 0]),
    next_token=jnp.zeros(3, jnp.int32),
  )
  observation = Observation(proposal, verdict, jnp.asarray([2, 2, 0]), None, None)  # pyright: ignore
  feedback = controllers.feedback_of(observation)
  assert feedback.num_tested.tolist() == [2, 1, 0]
  assert feedback.num_drafted.tolist() == [3, 3, 0]
  assert feedback.live.tolist() == [True, True, False]


def test_widths_hold_every_length_the_controller_takes():
  assert controllers.widths_of(controllers.confidence(), 6) == (2, 3, 5, 7)
  assert controllers.widths_of(controllers.online(TIMES, LENGTHS), 4) == (1, 3, 5)
  assert controllers.widths_of(controllers.fixed(3), 8) == (4, 9)


# --- In the loop ---------------------------------------------------------------------------------


def _now_and_then():
  """No drafts for twenty rounds, four for the next three, and so on."""
  return controllers.fixed(0)._replace(
    start=lambda params, ctl, state: (jnp.where(state.round % 23 < 20, 0, 4), ctl), lengths=(0, 4)
  )


def _any_of(rules):
  """One controller that is each of the rules in turn: `Params.controller` says which."""

  def start(params, ctl, state):
    started = [rule.start((), c, state) for rule, c in zip(rules, ctl, strict=True)]
    limits = jnp.stack([limit for limit, _ in started])
    return limits[params], tuple(c for _, c in started)

  def should_stop(params, ctl, step):
    asked = [rule.should_stop((), c, step) for rule, c in zip(rules, ctl, strict=True)]
    return jnp.stack([stop for stop, _ in asked])[params], tuple(c for _, c in asked)

  return controllers.Controller(
    init=lambda batch_size: tuple(rule.init(batch_size) for rule in rules),
    start=start,
    should_stop=should_stop,
    update=lambda params, ctl, feedback: tuple(
      rule.update((), c, feedback) for rule, c in zip(rules, ctl, strict=True)
    ),
    min_drafts=min(rule.min_drafts for rule in rules),
    lengths=(0, 2, 4),
  )


DRAFTING = {
  'fixed': controllers.fixed(3),
  'additive': controllers.additive(MOST),
  'confidence': controllers.confidence(0.6),
  'entropy': controllers.entropy(0.8),
  'cumulative': controllers.cumulative(0.3),
  'specdec_pp': controllers.specdec_pp(
    lambda params, step: controllers.largest_probability(step.logits)
  ),
  'expected_gain': controllers.expected_gain(0.1),
}
PAUSING = {
  'none': controllers.fixed(0),
  'online': controllers.online(TIMES, LENGTHS, prior=(1.0, 1.0), memory=0.6),
  'now and then': _now_and_then(),
}
CONTROLLERS = [*DRAFTING, *PAUSING]


def _rule_of(name):
  """Returns the compiled loop's name, and the rule's number in it."""
  group = DRAFTING if name in DRAFTING else PAUSING
  return ('drafting' if name in DRAFTING else 'pausing'), jnp.int32(list(group).index(name))


def _request(seed=0, temperature=(1.0, 0.0, 0.7, 1.0, 1.3, 0.0)):
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(0, V, n).tolist() for n in (1, 5, 17, 9, 2, 12)]
  return decodax.make_request(
    prompts, max_new_tokens=(40, 25, 40, 1, 6, 40), vocab_size=V, temperature=temperature,
    seed=seed, capacity=64,
  )  # fmt: skip


@functools.cache
def _loop(name):
  """Compiled: (params, request) -> the finished rows, the drafter's last state."""
  rules = {'drafting': DRAFTING, 'pausing': PAUSING}.get(name, {})
  rule = _any_of(list(rules.values())) if rules else None
  drafter = drafters.plain()
  if name != 'plain':
    drafter = drafters.draft_model(MODEL, num_drafts=MOST, controller=rule)

  def run(params, request):
    state = decodax.init_state(params, request, model=MODEL, drafter=drafter)
    state = decodax.prefill(params, state, model=MODEL, drafter=drafter)
    step = decodax.make_step_fn(model=MODEL, drafter=drafter, verifier=verifiers.coupled)
    state = decodax.generate(params, state, step_fn=step)
    return decodax.finish(state), state.drafter

  return zoo_lib.Compiled(run)


@pytest.mark.parametrize('name', CONTROLLERS)
def test_output_is_that_of_plain_decoding(name):
  loop, number = _rule_of(name)
  for seed, draft in ((0, DRAFT), (1, TARGET)):
    params = decodax.Params(TARGET, draft, controller=number)
    request = _request(seed)
    plain, _ = _loop('plain')(params, request)
    out, drafter_state = _loop(loop)(params, request)
    zoo_lib.assert_same_output(out, plain)
    length = np.asarray(drafter_state.own.length)
    for row in range(BATCH):  # the cache holds what was emitted, as far as it was read
      read = np.asarray(drafter_state.own.cache.tokens)[row, : length[row]]
      np.testing.assert_array_equal(read, np.asarray(out.tokens)[row, : length[row]])
    behind = np.asarray(out.length) - length
    if name == 'none':
      assert (length < np.asarray(out.prompt_length)).all() and not out.stats.num_drafted.any()
    else:
      assert (out.stats.num_drafted > 0)[jnp.asarray([0, 2, 5])].all()
    if name in DRAFTING:
      assert (behind <= 2).all()


def test_a_row_that_stopped_drafting_catches_up_and_drafts_again():
  # In the pause the draft model reads nothing, and at its end all of it at once.
  _, number = _rule_of('now and then')
  params = decodax.Params(TARGET, TARGET, controller=number)
  out, _ = _loop('pausing')(params, _request(3, temperature=1.0))
  accepted = np.asarray(out.stats.num_accepted)
  # After twenty rounds, drafts from the target's own law are all accepted, so nothing was missed.
  drafted = np.asarray(out.stats.num_drafted)
  assert (drafted[[0, 2, 5]] >= 12).all()
  np.testing.assert_array_equal(accepted[[0, 2, 5]], drafted[[0, 2, 5]])


def test_rows_do_not_feel_their_neighbours():
  request = _request(temperature=1.0)
  for name in ('online', 'expected_gain'):
    loop, number = _rule_of(name)
    params = decodax.Params(TARGET, DRAFT, controller=number)
    together, _ = _loop(loop)(params, request)
    for row in (0, 2):
      alone, _ = _loop(loop)(params, zoo_lib.take_rows(request, [row] * BATCH))
      for field in ('num_target_calls', 'num_drafted', 'num_accepted'):
        assert getattr(alone.stats, field)[3] == getattr(together.stats, field)[row]


def _proposed(drafter, params, request):
  """The first proposal of a drafter, and its state. Compiled once per drafter."""
  if id(drafter) not in _PROPOSERS:

    def propose(params, request):
      state = decodax.init_state(params, request, model=MODEL, drafter=drafter)
      state = decodax.prefill(params, state, model=MODEL, drafter=drafter)
      return drafter.propose(params, state, noise_fn=RoundKeys.draft_gumbel, with_laws=True)

    _PROPOSERS[id(drafter)] = zoo_lib.Compiled(propose), drafter
  return _PROPOSERS[id(drafter)][0](params, request)


_PROPOSERS = {}


def test_a_sure_head_drafts_the_most_and_a_doubtful_one_the_least():
  rule = controllers.specdec_pp(
    lambda params, step: jnp.full(step.token.shape, params, jnp.float32)
  )
  drafter = drafters.draft_model(MODEL, num_drafts=MOST, controller=rule)
  propose = functools.partial(_proposed, drafter, request=_request())
  for head, drafts in ((1.0, MOST), (0.0, 2), (0.8, 3)):  # 1 - 0.8**2 > 0.3 after the third
    proposal, drafter_state = propose(decodax.Params(TARGET, DRAFT, controller=jnp.float32(head)))
    assert (proposal.valid.sum(-1) - 1 == drafts).all()
    # All but the last draft were read, in the slots of a chain.
    slots = np.asarray(drafter_state.slots)
    assert (slots[:, 1:drafts] == np.arange(drafts - 1)).all()
    assert (slots[:, drafts:] == -1).all()


def test_stopping_leaves_the_drafts_before_as_they_were():
  params, request = decodax.Params(TARGET, DRAFT), _request(temperature=1.0)
  full, _ = _proposed(drafters.draft_model(MODEL, num_drafts=MOST), params, request)
  rule = controllers.confidence(0.6)
  drafter = drafters.draft_model(MODEL, num_drafts=MOST, controller=rule)
  short, _ = _proposed(drafter, params, request)
  count = np.asarray(short.valid.sum(-1))
  assert 1 < count.min() < count.max()
  for row, n in enumerate(count):
    np.testing.assert_array_equal(short.tokens[row, :n], full.tokens[row, :n])
    np.testing.assert_allclose(short.laws[row, : n - 1], full.laws[row, : n - 1], rtol=1e-6)
  # A row stops after the first draft with an unsure law, whose token it still proposes.
  confident = np.asarray(jax.nn.softmax(full.laws, -1).max(-1))[:, :MOST] >= 0.6
  expected = np.minimum(np.cumprod(confident, axis=1).sum(1) + 1, MOST)
  np.testing.assert_array_equal(count - 1, expected)


@pytest.mark.parametrize('kind', ['static', 'eagle2', 'dyspec'])
def test_trees_take_the_controllers_number_of_nodes(kind):
  limits = jnp.asarray([0, 1, 2, 3, 5, 9])
  rule = controllers.fixed(0)._replace(
    start=lambda params, ctl, state: (limits, ctl), lengths=(0, 4)
  )
  tree = static_trees.kary((3, 2))
  if kind == 'static':
    drafter = drafters.static_tree(
      EXPANDER, tree, candidates=Candidates.WITHOUT_REPLACEMENT, controller=rule
    )
  else:
    grow = drafters.eagle2_tree if kind == 'eagle2' else drafters.dyspec_tree
    more = {} if kind == 'eagle2' else {'max_children': 3}
    drafter = grow(EXPANDER, num_nodes=10, max_depth=3, beam_width=3, controller=rule, **more)
  assert drafter.shape.widths == (1, 5, 10)
  params = decodax.Params(TARGET, DRAFT)
  request = decodax.make_request(
    [[1, 2]] * BATCH, max_new_tokens=40, vocab_size=V, temperature=1.0, seed=1, row_ids=[0] * BATCH
  )
  proposal, _ = _proposed(drafter, params, request)
  assert (proposal.valid.sum(-1) - 1).tolist() == limits.tolist()
  # The same draws, fewer of them: each row's nodes are among those of the next.
  paths = [_paths(proposal, row) for row in range(BATCH)]
  assert all(a <= b for a, b in zip(paths, paths[1:], strict=False))


def _paths(proposal, row):
  tokens, parents, valid = (np.asarray(a)[row] for a in proposal[:3])
  paths: list[tuple[int, ...]] = [()]
  for node in range(1, len(tokens)):
    if valid[node]:
      paths.append((*paths[parents[node]], int(tokens[node])))
  return set(paths)


def test_early_exit_takes_a_controller_and_keeps_the_text():
  exit_model = MODEL._replace(unembed=lambda params, hidden: MODEL.unembed(params, hidden) * 0.5)
  rule = controllers.online(TIMES, LENGTHS, prior=(1.0, 1.0), memory=0.6)
  drafter = drafters.early_exit(exit_model, num_drafts=4, controller=rule)
  decode = zoo_lib.Compiled(
    functools.partial(decodax.decode, model=MODEL, drafter=drafter, verifier=verifiers.coupled)
  )
  params, request = decodax.Params(TARGET), _request()
  out, (plain, _) = decode(params, request), _loop('plain')(params, request)
  zoo_lib.assert_same_output(out, plain)
  drafted = np.asarray(out.stats.num_drafted)
  assert drafted.sum() > 0


def test_options_that_make_no_sense_are_refused():
  with pytest.raises(ValueError, match='at least 0'):
    controllers.fixed(-1)
  with pytest.raises(ValueError, match='one time per length'):
    controllers.online((1.0, 2.0), (0, 1, 2))
  with pytest.raises(ValueError, match='lengths must rise'):
    controllers.online((1.0, 2.0), (2, 1))
  with pytest.raises(ValueError, match='memory in'):
    controllers.online((1.0, 2.0), (0, 1), memory=0.0)
  with pytest.raises(ValueError, match='one per draft'):
    controllers.optimal_length([0.5, 0.5], [1.0, 2.0])

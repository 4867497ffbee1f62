"""The methods that the experiments can run. To add one, add an entry to `_ENTRIES`.

An entry says how to build its drafter for given weights, and which verifiers go with it: the first
is the default and bears the entry's name, each other one gives a method `name/verifier`. Trees are
drafted by the trained head or the draft model if there is one, else by the target's first layers,
and have the same number of nodes, so that they can be compared.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx
import numpy as np

import decodax
from decodax import controllers
from decodax import drafters
from decodax import static_trees
from decodax import verifiers
from decodax.controllers import Controller
from decodax.drafters.expander import Expander
from decodax.static_trees import StaticTree
from decodax.types import Candidates
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import Model
from decodax.types import Params
from decodax.types import Request
from decodax.types import Verifier
from experiments.laws import acceptance_by_rank
from experiments.laws import count_hits
from experiments.laws import prompt_acceptance
from models.adapter import as_model
from models.heads import head_expander
from models.heads import head_taps
from models.heads.ppd import PromptTokens
from models.heads.ppd import ppd_drafter
from models.transformer import Transformer
from models.weights import LoadedModel
from train.export import LoadedHead

PLAIN = 'plain'  # the method that the others are compared with


class Setup(NamedTuple):
  """What a method may be built from."""

  target: LoadedModel
  draft: LoadedModel | None = None
  num_drafts: int | None = None  # tokens drafted a round; None: the method's own choice
  exit_layer: int | None = None  # for early exit; None: three quarters of the layers
  head: LoadedHead | None = None  # trained for the target, and named
  shipped_head: Callable[[], LoadedHead] | None = None  # reads the one that comes along
  sample_texts: Callable[[], Sequence[Sequence[int]]] | None = None  # to measure acceptance on

  def own_head(self) -> LoadedHead | None:
    """Returns the head of methods that need one: the named one, else the one that comes along."""
    if self.head is not None or self.shipped_head is None:
      return self.head
    return self.shipped_head()


class Decoder(NamedTuple):
  """A method built for given weights."""

  model: Model
  drafter: Drafter
  params: Params

  def read(self, params: Params, request: Request) -> DecodeState:
    """Returns the state after the prompts are read: what is compiled before the loop."""
    state = decodax.init_state(params, request, model=self.model, drafter=self.drafter)
    return decodax.prefill(params, state, model=self.model, drafter=self.drafter)


class Method(NamedTuple):
  """A way of decoding."""

  name: str
  summary: str  # one line for a person who chooses among methods
  build: Callable[[Setup], Decoder]
  candidates: Candidates  # what its drafter proposes
  verifier: Verifier
  needs_draft: bool = False  # weights of a draft model
  needs_head: bool = False  # a head trained for the target
  by_default: bool = True  # does it run when no method is named?
  bind: Callable[[Setup], Verifier] | None = None  # verifier, if it needs tokens

  def verifier_for(self, setup: Setup) -> Verifier:
    """Returns the verifier, with what it needs of the target."""
    return self.verifier if self.bind is None else self.bind(setup)

  def exactness(self, temperature: float) -> str:
    """Returns what the output has in common with plain decoding at this temperature."""
    if temperature == 0 and self.verifier.lossless:
      return 'token-identical'
    return self.verifier.exactness


def _plain(setup: Setup) -> Decoder:
  return _decoder(setup, drafters.plain())


def _ngram(setup: Setup) -> Decoder:
  return _decoder(setup, drafters.ngram(num_drafts=setup.num_drafts or 4))


def _early_exit(setup: Setup) -> Decoder:
  transformer = setup.target.transformer
  exit_model = as_model(transformer, exit_layer=_exit_layer(setup))
  # With so many layers a draft is dear: one of them pays best.
  return _decoder(setup, drafters.early_exit(exit_model, num_drafts=setup.num_drafts or 1))


def _reflective(setup: Setup) -> Verifier:
  prompt = setup.target.tokenizer.encode(_REFLECTION, add_special_tokens=False)
  return verifiers.reflective(verifiers.speculative, prompt)


def _controlled(make: Callable[[Setup], Controller]) -> Callable[[Setup], Decoder]:
  """Returns how to build an early exit that drafts as long as a controller lets it."""

  def build(setup):
    exit_model = as_model(setup.target.transformer, exit_layer=_exit_layer(setup))
    num_drafts = setup.num_drafts or _MAX_DRAFTS
    drafter = drafters.early_exit(exit_model, num_drafts=num_drafts, controller=make(setup))
    return _decoder(setup, drafter)

  return build


def _online(setup):
  share = _exit_layer(setup) / setup.target.transformer.config.num_layers
  times = controllers.cost_ratio_times(share, setup.num_drafts or _MAX_DRAFTS)
  lengths = [n for n in (0, 1, 2, 4) if n < len(times)]
  return controllers.online(times[np.asarray(lengths)], lengths=lengths)


def _draft_model(setup: Setup) -> Decoder:
  draft = _draft_of(setup)
  drafter = drafters.draft_model(as_model(draft), num_drafts=setup.num_drafts or 4)
  return _decoder(setup, drafter, nnx.state(draft))


def _trained_head(setup: Setup) -> Decoder:
  """Returns a decoder of chains."""

  def make(expander):
    num_drafts = setup.num_drafts or min(4, expander.max_depth or 4)
    return drafters.chain_drafter(expander, num_drafts=num_drafts)

  return _around_head(setup, make)


def _trained_head_tree(setup: Setup) -> Decoder:
  """Returns a decoder of trees: small ones for heads of a few depths."""

  def make(expander):
    depth = expander.max_depth
    few = [path for path in _HEAD_PATHS if len(path) <= (depth or 0)]
    tree = static_trees.from_paths(few) if few else _TREE
    return drafters.static_tree(expander, tree)

  return _around_head(setup, make)


def _around_head(setup, make):
  loaded = setup.own_head()
  if loaded is None:
    raise ValueError('this method needs a head trained for the target: give --head')
  expander = head_expander(loaded.head, setup.target.transformer)
  return _with_head(setup.target, loaded.head, make(expander))


def _with_head(target, head, drafter):
  transformer = target.transformer
  params = Params(nnx.state(transformer), nnx.state(head))
  return Decoder(as_model(transformer, taps=head_taps(head)), drafter, params)


def _draft_of(setup: Setup) -> Transformer:
  """Returns the draft model, once it is known to be there and to share the vocabulary."""
  draft, target = setup.draft, setup.target
  if draft is None:
    raise ValueError('draft-model needs the weights of a draft model: give --draft')
  sizes = [each.transformer.config.vocab_size for each in (draft, target)]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f'the draft model {draft.name} has a vocabulary of {sizes[0]}, {target.name} one of '
      f'{sizes[1]}: they must share one'
    )
  return draft.transformer


def _jacobi(**options) -> Callable[[Setup], Decoder]:
  def build(setup):
    return _decoder(setup, drafters.jacobi(num_drafts=setup.num_drafts or 7, **options))

  return build


def _lookahead(setup: Setup) -> Decoder:
  return _decoder(setup, drafters.lookahead(window=5, ngram=(setup.num_drafts or 3) + 1))


def _sjd(redraw: str) -> Callable[[Setup], Decoder]:
  def build(setup):
    vocab_size = setup.target.transformer.config.vocab_size
    num_drafts = setup.num_drafts or 7
    drafter = drafters.sjd(vocab_size=vocab_size, num_drafts=num_drafts, redraw=redraw)
    return _decoder(setup, drafter)

  return build


def _lexical_units(setup: Setup) -> Decoder:
  pad_id = _blank_id(setup.target)
  drafter = drafters.lexical_units(pad_id=pad_id, num_drafts=setup.num_drafts or 3)
  return _decoder(setup, drafter)


def _input_guided(setup: Setup) -> Decoder:
  return _decoder(setup, drafters.input_guided(num_drafts=setup.num_drafts or 15))


def _masked_draft(setup: Setup) -> Decoder:
  draft = _draft_of(setup)
  drafter = drafters.masked_draft(
    drafters.model_expander(as_model(draft)),
    mask_id=_blank_id(setup.target),
    num_drafts=setup.num_drafts or 7,
  )
  return _decoder(setup, drafter, nnx.state(draft))


def _blank_id(loaded):
  """Returns the token that stands for one to be filled in: the stop id, which no text contains."""
  return loaded.eos_ids[0] if loaded.eos_ids else 0


_REFLECTION = '\nIs this right? Once more, with care: '
_MAX_DRAFTS = 4  # of a controlled early exit
# Eight nodes with the root: three candidates at first, fewer the deeper. On a CPU a call of eight
# tokens costs half as much again as one of a single token; wider trees do not pay there.
_TREE = static_trees.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
# Heads of a few depths draft at next to no cost: what counts is the width of the call.
_HEAD_PATHS = ((0,), (1,), (2,), (0, 0), (1, 0))
_PROMPT_INPUTS = 16  # drafts and prompt tokens: half of them draft, at no other cost


def _static_tree(candidates: Candidates) -> Callable[[Setup], Decoder]:
  def make(expander):
    return drafters.static_tree(expander, _TREE, candidates=candidates)

  return _tree(make)


def _measured_tree(measure: Callable[..., StaticTree]) -> Callable[[Setup], Decoder]:
  """Returns how to build a tree drafter whose shape is measured on texts.

  Args:
    measure: (target, texts, draft=, exit_layer=) -> the tree.
  """

  def build(setup):
    if setup.sample_texts is None:
      raise ValueError('this tree needs texts to measure the acceptance on: Setup.sample_texts')
    tree = measure(
      setup.target, setup.sample_texts(), draft=setup.draft, exit_layer=_exit_layer(setup)
    )
    return _tree(lambda expander: drafters.static_tree(expander, tree))(setup)

  return build


def _sequoia(target, texts, **options) -> StaticTree:
  acceptance = acceptance_by_rank(target, texts, **options)
  return static_trees.sequoia(acceptance, _TREE.num_nodes, max_depth=_TREE.max_depth)


def _falcon(target, texts, **options) -> StaticTree:
  acceptance = np.tile(acceptance_by_rank(target, texts, **options), (_TREE.max_depth, 1))
  return static_trees.falcon(acceptance, _TREE.num_nodes, block_size=2, max_expanded=1).tree


def _prompt_trees(setup: Setup) -> Decoder:
  head = None if setup.head is None else setup.head.head
  if not isinstance(head, PromptTokens):
    raise ValueError('ppd-tree needs prompt tokens trained for the target (tiny_ppd): give --head')
  if setup.sample_texts is None:
    raise ValueError('ppd-tree needs texts to measure the acceptance on: Setup.sample_texts')
  acceptance = prompt_acceptance(setup.target, head, setup.sample_texts())
  trees = static_trees.ppd(acceptance, _PROMPT_INPUTS, max_prompts=head.config.num_prompts)
  return _with_head(setup.target, head, ppd_drafter(head, setup.target.transformer, trees))


def _pruned(target, texts, **options) -> StaticTree:
  template = static_trees.kary((4,) * _TREE.max_depth)
  hits = count_hits(template, target, texts, **options)
  return static_trees.prune(template, hits, _TREE.num_nodes)


def _tree(make: Callable[[Expander], Drafter]) -> Callable[[Setup], Decoder]:
  """Returns how to build a tree drafter around a head, a draft model, or else an early exit."""

  def build(setup):
    if setup.head is not None:
      expander = head_expander(setup.head.head, setup.target.transformer)
      return _with_head(setup.target, setup.head.head, make(expander))
    if setup.draft is None:
      exit_model = as_model(setup.target.transformer, exit_layer=_exit_layer(setup))
      return _decoder(setup, make(drafters.exit_expander(exit_model)))
    transformer = _draft_of(setup)
    expander = drafters.model_expander(as_model(transformer))
    return _decoder(setup, make(expander), nnx.state(transformer))

  return build


def _several_drafters(setup: Setup) -> Decoder:
  last = _exit_layer(setup)
  models: list[tuple[Expander, Any]] = [
    (drafters.exit_expander(as_model(setup.target.transformer, exit_layer=layer)), ())
    for layer in (last, max(1, last * 3 // 4))
  ]
  if setup.draft is not None:
    draft = _draft_of(setup)
    models = [(drafters.model_expander(as_model(draft)), nnx.state(draft)), models[0]]
  expanders, params = zip(*models, strict=True)
  drafter = drafters.several_chains(expanders, num_drafts=setup.num_drafts or 3)
  return _decoder(setup, drafter, params)


def _exit_layer(setup):
  # Without training only late layers agree with the last one.
  return setup.exit_layer or max(1, setup.target.transformer.config.num_layers * 3 // 4)


def _decoder(setup, drafter, drafter_params=()):
  transformer = setup.target.transformer
  params = Params(nnx.state(transformer), drafter_params)
  return Decoder(as_model(transformer), drafter, params)


class _Entry(NamedTuple):
  name: str
  summary: str
  build: Callable[[Setup], Decoder]
  candidates: Candidates
  verifiers: tuple[Verifier, ...] = (verifiers.coupled,)
  needs_draft: bool = False
  needs_head: bool = False
  by_default: bool = True
  bind: Callable[[Setup], Verifier] | None = None


_CHAIN_RULES = (
  verifiers.coupled, verifiers.speculative, verifiers.block, verifiers.sample_and_match,
  verifiers.lenient(), verifiers.typical(), verifiers.fuzzy(), verifiers.mentored(),
  verifiers.divergence_judge(), verifiers.enriched(),
)  # fmt: skip
_ENTRIES = (
  _Entry(PLAIN, 'one token per target call', _plain, Candidates.NONE),
  _Entry(
    'ngram', 'copies what followed the last tokens earlier in the text', _ngram,
    Candidates.DETERMINISTIC,
  ),
  _Entry(
    'early-exit', 'the first layers draft for all of them', _early_exit,
    Candidates.SAMPLED, _CHAIN_RULES,
  ),
  _Entry(
    'early-exit-reflective', 'early exit, and the target reads every draft twice', _early_exit,
    Candidates.SAMPLED, (verifiers.reflective(verifiers.speculative, [0]),), by_default=False,
    bind=_reflective,
  ),
  _Entry(
    'early-exit-confidence', 'early exit, until a draft is unsure (0.6)',
    _controlled(lambda setup: controllers.confidence()), Candidates.SAMPLED,
    (verifiers.coupled, verifiers.speculative), by_default=False,
  ),
  _Entry(
    'early-exit-online', 'early exit, while the acceptance learned so far pays',
    _controlled(_online),
    Candidates.SAMPLED, (verifiers.coupled, verifiers.speculative), by_default=False,
  ),
  _Entry(
    'draft-model', 'a smaller model with the same vocabulary drafts', _draft_model,
    Candidates.SAMPLED, _CHAIN_RULES, needs_draft=True,
  ),
  _Entry(
    'trained-head', 'a head trained for the target drafts a chain', _trained_head,
    Candidates.SAMPLED, _CHAIN_RULES, needs_head=True, by_default=False,
  ),
  _Entry(
    'trained-head-tree', 'a head trained for the target drafts a small tree', _trained_head_tree,
    Candidates.DETERMINISTIC,
    (verifiers.coupled, verifiers.typical(), verifiers.threshold(threshold_single=0.5)),
    needs_head=True,
  ),
  _Entry(
    'static-tree', 'a fixed tree of the likeliest tokens',
    _static_tree(Candidates.DETERMINISTIC), Candidates.DETERMINISTIC,
    (verifiers.coupled, verifiers.typical(), verifiers.threshold(threshold_single=0.5)),
    by_default=False,
  ),
  _Entry(
    'sequoia-tree', 'the best fixed tree for the acceptance measured on our prompts',
    _measured_tree(_sequoia), Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'falcon-tree', 'the best fixed tree of which one node goes on after two levels',
    _measured_tree(_falcon), Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'pruned-tree', 'the nodes of a wide tree that our prompts would use most',
    _measured_tree(_pruned), Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'ppd-tree', 'trained prompt tokens behind a fixed tree draft the next one in the same call',
    _prompt_trees, Candidates.DETERMINISTIC, (verifiers.coupled, verifiers.sample_and_match),
    needs_head=True, by_default=False,
  ),
  _Entry(
    'sampled-tree', 'a fixed tree drawn without replacement (RSD-C)',
    _static_tree(Candidates.WITHOUT_REPLACEMENT), Candidates.WITHOUT_REPLACEMENT,
    (verifiers.without_replacement, verifiers.traversal, verifiers.coupled), by_default=False,
  ),
  _Entry(
    'iid-tree', 'a fixed tree of independent draws',
    _static_tree(Candidates.IID), Candidates.IID,
    (verifiers.specinfer, verifiers.kseq, verifiers.optimal()), by_default=False,
  ),
  _Entry(
    'several-drafters', 'two exits, or a draft model and an exit, draft a chain each',
    _several_drafters, Candidates.SEVERAL_DRAFTERS,
    (verifiers.specinfer_drafters, verifiers.coupled), by_default=False,
  ),
  _Entry(
    'top-and-one-tree', 'a fixed tree of the likeliest tokens and one draw a node',
    _static_tree(Candidates.TOP_AND_ONE), Candidates.TOP_AND_ONE,
    (verifiers.greedy_draft,), by_default=False,
  ),
  _Entry(
    'eagle2-tree', 'the likeliest nodes of a beam, ranked anew each round',
    _tree(lambda e: drafters.eagle2_tree(e, num_nodes=8, max_depth=3, beam_width=3)),
    Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'dyspec-tree', 'draws where acceptance is likeliest',
    _tree(lambda e: drafters.dyspec_tree(e, num_nodes=8, max_depth=3, beam_width=3)),
    Candidates.COMPETING, (verifiers.without_replacement, verifiers.coupled), by_default=False,
  ),
  _Entry(
    'beam-tree', 'a stochastic beam of whole continuations (RSD-S)',
    _tree(lambda e: drafters.stochastic_beam_tree(e, beam_width=3, max_depth=3, num_nodes=8)),
    Candidates.COMPETING, (verifiers.without_replacement, verifiers.coupled), by_default=False,
  ),
  _Entry(
    'jacobi', 'iterates on a window of guesses until they stop changing', _jacobi(),
    Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'jacobi-ngram', 'as jacobi, but guesses what followed the last tokens before',
    _jacobi(guess_fn=drafters.guesses.ngram()), Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'jacobi-early-exit', 'as jacobi, but emits guesses after three iterations, settled or not',
    _jacobi(exit_after=3), Candidates.DETERMINISTIC, (verifiers.trusting,), by_default=False,
  ),
  _Entry(
    'lookahead', 'collects n-grams in a Jacobi window and tries them in the same call', _lookahead,
    Candidates.DETERMINISTIC, (verifiers.coupled, verifiers.sample_and_match), by_default=False,
  ),
  _Entry(
    'sjd', 'Jacobi iteration on draws and their laws, draws kept where possible', _sjd('coupled'),
    Candidates.CARRIED, (verifiers.speculative, verifiers.coupled), by_default=False,
  ),
  _Entry(
    'sjd-fresh', 'Jacobi iteration on draws and their laws, drawn anew each round', _sjd('fresh'),
    Candidates.SAMPLED, (verifiers.speculative, verifiers.coupled, verifiers.block),
    by_default=False,
  ),
  _Entry(
    'lud', 'emits what the target is confident of behind padding (for a target trained to that)',
    _lexical_units, Candidates.DETERMINISTIC, (verifiers.trusting, verifiers.coupled),
    by_default=False,
  ),
  _Entry(
    'iad', 'copies the prompt on, and finds back to it after changes', _input_guided,
    Candidates.DETERMINISTIC, by_default=False,
  ),
  _Entry(
    'gad', 'a masked language model fills all drafts at once', _masked_draft, Candidates.SAMPLED,
    (verifiers.coupled, verifiers.speculative, verifiers.near_best()), needs_draft=True,
    by_default=False,
  ),
)  # fmt: skip


def _methods(entry):
  for index, verifier in enumerate(entry.verifiers):
    name = entry.name if index == 0 else f'{entry.name}/{verifier.name}'
    yield Method(
      name,
      entry.summary,
      entry.build,
      entry.candidates,
      verifier,
      needs_draft=entry.needs_draft,
      needs_head=entry.needs_head,
      by_default=entry.by_default,
      bind=entry.bind,
    )


METHODS: dict[str, Method] = {
  method.name: method for entry in _ENTRIES for method in _methods(entry)
}


def default_methods(
  temperature: float, *, has_draft: bool = False, has_head: bool = False
) -> list[str]:
  """Returns the names of the methods to run when none are named.

  Those are chains, copies and the small tree of a trained head whose weights are there, by lossless
  rules; at temperature 0 only one of each drafter, since all lossless verifiers then decide alike.
  """
  return [
    name
    for name, method in METHODS.items()
    if method.by_default
    and method.verifier.lossless
    and (has_draft or not method.needs_draft)
    and (has_head or not method.needs_head)
    and (temperature > 0 or '/' not in name)
  ]

"""The list of methods: what it promises without weights is true with them."""

import json

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import static_trees
from experiments import cli
from experiments import laws
from experiments.methods import METHODS
from experiments.methods import Setup
from experiments.methods import default_methods
from models.registry import load_model
from train.export import LoadedHead
from train.objective import get_objective


@pytest.fixture(scope='module')
def setup(tiny_model, tiny_draft):
  texts = [list(range(20, 60)), [7, 9] * 20]
  return Setup(load_model(tiny_model), load_model(tiny_draft), sample_texts=lambda: texts)


@pytest.fixture(scope='module')
def with_head(setup):
  return setup._replace(head=_untrained_head(setup.target.transformer))


@pytest.fixture(scope='module')
def with_prompts(setup):
  return setup._replace(head=_untrained_head(setup.target.transformer, 'ppd'))


def _untrained_head(target, name='eagle3', **options):
  if name == 'eagle3':
    options = {'taps': (1, 2, 3)}
  objective = get_objective(name, options)
  counts = np.zeros(target.config.vocab_size, np.int64)
  return LoadedHead(objective.init(nnx.Rngs(0), target, counts), objective, name, {})


@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_what_its_entry_says(setup, with_head, with_prompts, name):
  method = METHODS[name]
  needed = with_prompts if name.startswith('ppd') else with_head
  for given in (needed,) if method.needs_head else (setup, with_head):
    decoder = method.build(given)
    assert decoder.drafter.shape.candidates == method.candidates
    verifier = method.verifier_for(given)
    assert verifier.name == method.verifier.name and verifier.exactness == method.verifier.exactness
    decodax.make_step_fn(model=decoder.model, drafter=decoder.drafter, verifier=verifier)


@pytest.mark.parametrize('name', ['ngram', 'early-exit', 'draft-model', 'trained-head'])
def test_the_number_of_drafts_can_be_chosen(with_head, name):
  decoder = METHODS[name].build(with_head._replace(num_drafts=7))
  assert decoder.drafter.shape.max_depth == 7


def test_a_head_that_comes_along_drafts_for_methods_that_need_one_only(setup, with_head):
  shipped = setup._replace(draft=None, shipped_head=lambda: with_head.head)
  for name in ('trained-head', 'trained-head-tree'):
    assert METHODS[name].build(shipped).params.drafter != ()
  assert METHODS['static-tree'].build(shipped).params.drafter == ()  # early exit, as without


@pytest.mark.parametrize('num_heads, num_nodes', [(1, 4), (2, 6)])
def test_the_tree_of_a_head_is_no_deeper_than_the_head(setup, num_heads, num_nodes):
  head = _untrained_head(setup.target.transformer, 'medusa', num_heads=num_heads)
  shape = METHODS['trained-head-tree'].build(setup._replace(head=head)).drafter.shape
  assert (shape.max_depth, shape.num_nodes) == (num_heads, num_nodes)


def test_default_methods():
  assert default_methods(0.0) == ['plain', 'ngram', 'early-exit']
  assert 'early-exit/speculative' in default_methods(1.0)
  assert not any(METHODS[name].needs_draft for name in default_methods(1.0))
  assert 'draft-model' in default_methods(0.0, has_draft=True)
  assert 'trained-head-tree' in default_methods(0.0, has_head=True)
  assert not any(METHODS[name].needs_head for name in default_methods(1.0))


def test_exactness_depends_on_the_temperature():
  method = METHODS['early-exit/speculative']
  assert method.exactness(0.0) == 'token-identical'
  assert method.exactness(0.7) == 'law-identical'


def test_a_draft_model_of_another_vocabulary_is_refused(setup):
  config = setup.draft.transformer.config
  other = type('Draft', (), {'config': type('Config', (), {'vocab_size': config.vocab_size + 1})})
  draft = setup.draft._replace(transformer=other)
  with pytest.raises(ValueError, match='must share one'):
    METHODS['draft-model'].build(setup._replace(draft=draft))
  with pytest.raises(ValueError, match='give --draft'):
    METHODS['draft-model'].build(setup._replace(draft=None))
  for name in ('trained-head', 'trained-head-tree'):
    with pytest.raises(ValueError, match='give --head'):
      METHODS[name].build(setup._replace(head=None))


def test_the_sequoia_tree_follows_what_was_measured(setup):
  # Without a draft model the last layers draft, and the first candidate is nearly always right.
  certain = setup._replace(draft=None, exit_layer=setup.target.transformer.config.num_layers)
  shape = METHODS['sequoia-tree'].build(certain).drafter.shape
  assert (
    shape.max_depth == 3
    and shape.num_nodes == METHODS['static-tree'].build(setup).drafter.shape.num_nodes
  )
  with pytest.raises(ValueError, match='sample_texts'):
    METHODS['sequoia-tree'].build(setup._replace(sample_texts=None))


def test_hits_are_those_of_walking_the_text(setup):
  """Where the last layers draft, the first candidate is right, and a path is as deep as the text
  goes on with what is likeliest."""
  target, tree = setup.target, static_trees.kary((2, 2, 2))
  last = target.transformer.config.num_layers
  text = [5, 9, 11]
  for _ in range(4):  # the target's own continuation, so that the end of the text is followed
    late, _ = laws.read_logits(target, [text], [(0, len(text) - 1)], last)
    text.append(int(late[0].argmax()))
  sites = [(0, t) for t in range(len(text))]
  best = laws.read_logits(target, [text], sites, last)[0].argmax(-1)
  hits = laws.count_hits(tree, target, [text], exit_layer=last)
  wanted = np.zeros(tree.num_nodes, int)
  for start in range(len(text)):
    depth = 1
    while (
      depth < 3 and start + depth < len(text) and best[start + depth - 1] == text[start + depth]
    ):
      depth += 1
    for d in range(depth + 1):
      wanted[tree.paths.index((0,) * d)] += 1
  np.testing.assert_array_equal(hits, wanted)
  assert hits[tree.paths.index((0, 0, 0))] >= 2


@pytest.mark.parametrize('name', ['falcon-tree', 'pruned-tree'])
def test_measured_trees_have_the_nodes_of_the_others(setup, name):
  shape = METHODS[name].build(setup).drafter.shape
  assert shape.num_nodes == METHODS['static-tree'].build(setup).drafter.shape.num_nodes


def test_heads_that_come_along_are_small_and_say_what_they_are():
  folders = list(cli.HEADS_DIRECTORY.iterdir())
  assert folders
  for folder in folders:
    assert (folder / 'model.safetensors').stat().st_size <= 16e6
    facts = json.loads((folder / 'config.json').read_text())
    assert facts['target'] == folder.name and cli.shipped_head(folder.name) == folder
    assert cli.shipped_head(folder.name.upper()) == folder
  assert cli.shipped_head('some/folder') is None


def test_prompt_tokens_have_a_method_of_their_own(setup, with_head, with_prompts):
  for given in (setup, with_head):
    with pytest.raises(ValueError, match='needs prompt tokens trained for the target'):
      METHODS['ppd-tree'].build(given)
  with pytest.raises(ValueError, match='sample_texts'):
    METHODS['ppd-tree'].build(with_prompts._replace(sample_texts=None))
  with pytest.raises(ValueError, match='--methods ppd-tree'):
    METHODS['trained-head'].build(with_prompts)


def test_prompt_acceptance_is_that_of_reading_on(setup, with_prompts):
  """By the book: each place alone, prompt tokens in the places of the tokens to come."""
  target, prompts = setup.target, with_prompts.head.head
  text = [5, 9, 11, 40, 33]
  for _ in range(12):  # the target's own continuation, so that deep places count too
    late, _ = laws.read_logits(target, [text], [(0, len(text) - 1)], 1)
    text.append(int(late[0].argmax()))
  num_ranks = 30
  found = laws.prompt_acceptance(target, prompts, [text], num_ranks=num_ranks)
  sites = [(0, t) for t in range(len(text))]
  best = laws.read_logits(target, [text], sites, 1)[0].argmax(-1)
  reached, hits = np.zeros(3), np.zeros((3, num_ranks))
  for anchor in range(len(text) - 1):
    laws_here = _laws_behind(target.transformer, prompts, text[: anchor + 1])
    for depth in range(min(3, len(text) - 1 - anchor)):
      if depth and best[anchor + depth] != text[anchor + 1 + depth]:
        break
      reached[depth] += 1
      law = laws_here[depth]
      rank = int((law > law[best[anchor + 1 + depth]]).sum())
      if rank >= num_ranks:
        break
      hits[depth, rank] += 1
  assert (hits.sum(1) > 0).all()
  np.testing.assert_allclose(found, hits / reached[:, None])


def _laws_behind(transformer, prompts, text):
  """Returns f32[3, V], what three prompt tokens behind a text say."""
  tokens = jnp.asarray([*text, *(transformer.config.vocab_size + k for k in range(3))])[None]
  mask = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
  positions = jnp.arange(tokens.shape[1])[None]
  output, _ = transformer(tokens, positions, mask, embeddings=prompts.rows())
  return np.asarray(transformer.unembed(output.hidden[0, -3:]))

"""Acceptance beside the optimum: agreement with the theory, ordering, files, wrong options."""

import contextlib
import io
import json

from flax import nnx
import jax
import numpy as np
import pytest

from decodax import theory
from experiments import acceptance
from experiments import laws as laws_lib
from experiments import verification_gap as gap
from models.adapter import as_model
from models.registry import load_model
from tests.experiments.conftest import save_tiny_model

MAX_DRAFTS, VOCAB, LAWS = 3, 16, 3
ROUNDING = 1e-5  # of the quadrature
SIZE = ['--synthetic-vocab', str(VOCAB), '--num-laws', str(LAWS), '--max-drafts', str(MAX_DRAFTS)]


def run(*argv):
  """Returns (exit code, stdout) of a small run."""
  with contextlib.redirect_stdout(io.StringIO()) as stdout:
    code = gap.main([*SIZE, '--num-samples', '4', *map(str, argv)])
  return code, stdout.getvalue()


@pytest.fixture(scope='module')
def laws():
  p, q = np.random.default_rng(3).dirichlet(np.full(VOCAB, 0.4), (2, LAWS))
  return p, q


@pytest.fixture(scope='module')
def curves(laws):
  return acceptance.acceptance_curves(laws[0], laws[1], MAX_DRAFTS, num_samples=4)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A synthetic run: (exit code, what it printed, its folder)."""
  out = tmp_path_factory.mktemp('gap') / 'out'
  return *run('--families', 'zipf,dirichlet', '--out', out), out


# --- Acceptance --------------------------------------------------------------------------------


def test_one_pass_gives_the_optima_of_the_theory(laws, curves):
  with jax.enable_x64(True):
    for k in range(1, MAX_DRAFTS + 1):
      expected = theory.optimal_acceptance_without_replacement(laws[0], laws[1], k)
      found = curves.acceptance['optimum, distinct'][:, k - 1]
      np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize('name', ['match_distinct', 'recursive_rejection'])
def test_sampled_rules_are_unbiased(name, laws):
  p, q = laws
  draw, expected = getattr(acceptance, f'_{name}'), globals()[f'_{name}']
  with jax.enable_x64(True):
    key = jax.random.key(1)
    mean, error = map(
      np.asarray, acceptance._sampled(draw, key, p, q, MAX_DRAFTS, num_samples=1000)
    )
  assert (error[:, 0] < 1e-12).all() and (error[:, 1:] > 0).all()
  for row in range(LAWS):
    exact = [expected(p[row], q[row], k + 1) for k in range(MAX_DRAFTS)]
    # 12 such comparisons at 5 standard errors: a false alarm in about 150,000 seeds.
    assert (np.abs(mean[row] - exact) <= 5 * error[row] + 1e-9).all()


def _recursive_rejection(p, q, num_drafts):
  with jax.enable_x64(True):
    return float(theory.recursive_rejection_acceptance(p, q, num_drafts))


def _match_distinct(p, q, num_drafts):
  """The mass of p among drafts without replacement, by enumeration of their sequences."""
  if num_drafts == 0:
    return 0.0
  total = 0.0
  for token, chance in enumerate(q):
    rest = np.delete(q, token)
    rest = rest / rest.sum()
    total += chance * (p[token] + _match_distinct(np.delete(p, token), rest, num_drafts - 1))
  return total


def test_no_rule_is_above_the_optimum_for_its_drafts(curves):
  optima = {
    rule.drafts: curves.acceptance[rule.name] for rule in acceptance.RULES if rule.is_optimum
  }
  for rule in acceptance.RULES:
    values = curves.acceptance[rule.name]
    assert (values >= 0).all() and (values <= 1 + ROUNDING).all(), rule.name
    if rule.drafts in optima:
      slack = ROUNDING + 6 * curves.error.get(rule.name, 0.0)
      assert (values <= optima[rule.drafts][:, : values.shape[1]] + slack).all(), rule.name
  assert (optima[acceptance.IID] <= optima[acceptance.DISTINCT] + ROUNDING).all()


def test_one_draft_is_accepted_as_often_as_the_laws_overlap(laws, curves):
  overlap = np.minimum(*laws).sum(axis=-1)
  equal = ('vanilla', 'SpecInfer', 'k-SEQ', 'optimum', 'recursive rejection', 'optimum, distinct')
  for name in (*equal, 'greedy draft'):
    found = curves.acceptance[name][:, 0]
    np.testing.assert_allclose(found, overlap, atol=ROUNDING, rtol=0, err_msg=name)
  below = ('coupled', 'sample-and-match', 'sample-and-match, distinct', 'top k')
  for name in below:
    assert (curves.acceptance[name][:, 0] < overlap).all(), name


def test_more_drafts_are_never_worse(curves):
  for rule in acceptance.RULES:
    assert (np.diff(curves.acceptance[rule.name], axis=-1) >= -ROUNDING).all(), rule.name


def test_laws_on_the_edge():
  """Equal laws, disjoint ones, and a draft with fewer tokens than there are drafts."""
  one_hot, half = np.eye(VOCAB)[:2], np.full(VOCAB, 2 / VOCAB)
  half[VOCAB // 2 :] = 0
  p = np.stack([half, half, one_hot[0]])
  q = np.stack([half, half[::-1], one_hot[1]])
  found = acceptance.acceptance_curves(p, q, MAX_DRAFTS, num_samples=4).acceptance
  for rule in acceptance.RULES:
    assert np.isfinite(found[rule.name]).all(), rule.name
  for name in ('SpecInfer', 'k-SEQ', 'optimum', 'recursive rejection', 'optimum, distinct'):
    np.testing.assert_allclose(found[name], [[1] * 3, [0] * 3, [0] * 3], atol=ROUNDING)


def test_laws_are_worked_on_in_chunks(laws, curves, monkeypatch):
  monkeypatch.setattr(acceptance, '_CHUNK_NUMBERS', LAWS * VOCAB)
  p, q = (np.concatenate([law, law[:1]]) for law in laws)  # the second chunk is padded
  chunked = acceptance.acceptance_curves(p, q, MAX_DRAFTS, num_samples=4).acceptance
  for rule in acceptance.RULES:
    assert len(chunked[rule.name]) == LAWS + 1
    if not rule.sampled:
      expected = np.concatenate([curves.acceptance[rule.name], curves.acceptance[rule.name][:1]])
      np.testing.assert_allclose(chunked[rule.name], expected, atol=1e-12)


# --- The whole run -----------------------------------------------------------------------------


def test_files_and_tables(finished):
  code, text, out = finished
  assert code == 0
  assert sorted(path.name for path in out.iterdir()) == [
    'verification_gap.json', 'verification_gap.md', 'verification_gap.png',
  ]  # fmt: skip
  results = json.loads((out / 'verification_gap.json').read_text())
  assert [family['name'] for family in results['families']] == ['zipf', 'dirichlet']
  assert results['command'].startswith('python -m experiments.verification_gap')
  assert results['config']['model'] is None
  for family in results['families']:
    _check_family(family)
    assert all(sentence in text for sentence in family['findings'])
  assert (out / 'verification_gap.png').read_bytes().startswith(b'\x89PNG')


def _check_family(family):
  assert (family['num_laws'], family['vocab_size']) == (LAWS, VOCAB)
  assert [rule['name'] for rule in family['rules']] == [rule.name for rule in acceptance.RULES]
  for rule, expected in zip(family['rules'], acceptance.RULES, strict=True):
    width = 1 if expected.one_draft_only else MAX_DRAFTS
    assert len(rule['acceptance']) == len(rule['acceptance_ci']) == width
    assert (rule['sampling_error'] is not None) == expected.sampled
    for mean, (low, high) in zip(rule['acceptance'], rule['acceptance_ci'], strict=True):
      assert low - 1e-9 <= mean <= high + 1e-9
  assert [sentence.split(':')[0] for sentence in family['findings']] == [
    'Drafts with replacement', 'Drafts without replacement', 'Drafts chosen by probability',
  ]  # fmt: skip


def test_markdown_tables_are_whole(finished):
  lines = (finished[2] / 'verification_gap.md').read_text().splitlines()
  rows = [line for line in lines if line.startswith('|')]
  assert len(rows) == 2 * (len(acceptance.RULES) + 2)
  assert {row.count('|') for row in rows} == {MAX_DRAFTS + 3}


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
  assert run('--families', 'zipf,dirichlet', '--out', tmp_path)[0] == 0
  again = json.loads((tmp_path / 'verification_gap.json').read_text())
  assert again['families'] == json.loads((finished[2] / 'verification_gap.json').read_text())[
    'families'
  ]  # fmt: skip


def test_laws_of_a_model(tiny_model, tiny_draft, prompts_file, tmp_path):
  argv = ['--model', tiny_model, '--draft', tiny_draft, '--prompts', prompts_file]
  code, _ = run(*argv, '--families', 'early-exit,warmer,draft', '--out', tmp_path)
  assert code == 0
  families = json.loads((tmp_path / 'verification_gap.json').read_text())['families']
  assert [family['name'] for family in families] == ['early-exit', 'warmer', 'draft']
  assert 'its first 3 of 4 layers draft' in families[0]['title']
  vanilla = [family['rules'][0]['acceptance'][0] for family in families]
  assert all(0 < acceptance < 1 for acceptance in vanilla)


def test_every_layer_drafts_what_the_target_says(tiny_model, prompts_file, tmp_path):
  argv = ['--model', tiny_model, '--prompts', prompts_file, '--families', 'early-exit']
  assert run(*argv, '--exit-layer', 4, '--out', tmp_path)[0] == 0
  (family,) = json.loads((tmp_path / 'verification_gap.json').read_text())['families']
  assert family['rules'][0]['acceptance'][0] == pytest.approx(1, abs=1e-5)


def test_laws_are_those_of_the_model_and_of_its_first_layers(tiny_model):
  loaded = load_model(tiny_model)
  text, positions = list(range(20, 60)), [0, 17]
  found = laws_lib.read_logits(loaded, [text], [(0, position) for position in positions], 3)
  for logits, exit_layer in zip(found, (None, 3), strict=True):
    model = as_model(loaded.transformer, exit_layer=exit_layer)
    expected = _logits(model, nnx.state(loaded.transformer), text)[positions]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def _logits(model, params, text):
  """f[T, V], by way of the adapter."""
  length = len(text)

  @jax.jit
  def read(params, tokens):
    mask = np.tril(np.ones((1, length, length), bool))
    cache = model.init_cache(params, 1, length)
    output, _ = model.extend(params, cache, tokens, np.arange(length)[None], mask)
    return model.unembed(params, output.hidden)[0]

  return np.asarray(read(params, np.asarray(text)[None]))


def test_sites_are_behind_the_common_beginning():
  texts = [[1, 2, 3, 4], [1, 2, 5, 6, 7]]
  sites = laws_lib.choose_sites(texts, 100, np.random.default_rng(0))
  assert sites == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)]
  assert len(set(laws_lib.choose_sites(texts, 3, np.random.default_rng(0)))) == 3


def test_the_acceptance_of_ranks_is_counted(tiny_model):
  loaded, texts = load_model(tiny_model), [list(range(20, 60)), list(range(20, 24)) + [7] * 30]
  found = laws_lib.acceptance_by_rank(loaded, texts, exit_layer=3, num_ranks=4)
  sites = laws_lib.choose_sites(texts, 10**6, np.random.default_rng(0))
  late, early = laws_lib.read_logits(loaded, texts, sites, 3)
  rank = (early > np.take_along_axis(early, late.argmax(-1)[:, None], axis=-1)).sum(-1)
  np.testing.assert_allclose(found, [np.mean(rank == r) for r in range(4)])
  assert 0 < found.sum() <= 1
  layers = loaded.transformer.config.num_layers
  np.testing.assert_array_equal(
    laws_lib.acceptance_by_rank(loaded, texts, exit_layer=layers, num_ranks=2), [1, 0]
  )


# --- Wrong options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argv', 'expected'),
  [
    (['--families', 'zpf'], "unknown family 'zpf'; nearest: zipf"),
    (['--families', ','], 'no family named'),
    (['--families', 'draft'], 'give --draft'),
    (['--max-drafts', '17'], 'from 1 to 16'),
    (['--num-laws', '1'], 'of at least 2'),
    (['--temperature', '0'], 'of at least 0.01'),
    (['--num-samples', '1'], 'of at least 2'),
    (['--synthetic-vocab', '8'], 'of at least 16'),
    (['--famlies', 'zipf'], 'nearest: --families'),
    (['--model', './no/such.gguf'], 'no such model file'),
  ],
)
def test_wrong_options(argv, expected, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert expected in _refusal(argv, capsys)
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_options_that_the_model_refuses(tiny_model, prompts_file, tmp_path, capsys):
  argv = [
    '--model',
    str(tiny_model),
    '--prompts',
    str(prompts_file),
    '--out',
    str(tmp_path / 'out'),
  ]
  assert 'above the 4 layers' in _refusal([*argv, '--exit-layer', '5'], capsys)
  save_tiny_model(tmp_path / 'broken', broken=True)
  argv[1] = str(tmp_path / 'broken')
  assert 'not finite' in _refusal(argv, capsys)
  assert not (tmp_path / 'out').exists()


def _refusal(argv, capsys):
  assert gap.main(argv) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1
  return lines[0]

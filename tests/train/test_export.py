"""Exports: what is written is what is read, and what does not fit is named."""

import json

from flax import nnx
import jax
import numpy as np
import pytest

from models.heads.checkpoints import load_published
from models.registry import load_model
from train import export
from train import publish
from train.objective import get_objective


@pytest.fixture(scope='module')
def loaded(target_folder):
  return load_model(target_folder)


@pytest.fixture(scope='module')
def head_folder(loaded, target_folder, tmp_path_factory):
  """An untrained head as a run exports it."""
  options = {'num_heads': 2}
  objective = get_objective('medusa', options)
  counts = np.ones(loaded.transformer.config.vocab_size, np.int64)
  head = objective.init(nnx.Rngs(0), loaded.transformer, counts)
  folder = tmp_path_factory.mktemp('heads') / 'medusa'
  export.save_head(
    folder, head, objective='medusa', options=options, facts={'target': str(target_folder)}
  )
  return folder


def test_a_head_comes_back_as_it_was(loaded, head_folder):
  found = export.load_head(head_folder, loaded.transformer)
  assert found.name == 'medusa' and found.facts['options'] == {'num_heads': 2}
  again = head_folder.parent / 'again'
  export.save_head(again, found.head, objective='medusa', options={'num_heads': 2}, facts={})
  same = export.load_head(again, loaded.transformer).head
  jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(found.head))


def test_half_precision_halves_the_file(loaded, head_folder):
  found = export.load_head(head_folder, loaded.transformer)
  half = head_folder.parent / 'half'
  export.save_head(
    half, found.head, objective='medusa', options={'num_heads': 2}, facts={}, dtype=np.float16
  )
  sizes = [(f / 'model.safetensors').stat().st_size for f in (half, head_folder)]
  assert sizes[0] < 0.6 * sizes[1]
  back = export.load_head(half, loaded.transformer).head
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
    nnx.state(back),
    nnx.state(found.head),
  )


def test_a_head_is_published(loaded, head_folder, tmp_path):
  arguments = ['--head', str(head_folder), '--layout', 'medusa', '--out', str(tmp_path / 'out')]
  assert publish.main(arguments) == 0
  head = export.load_head(head_folder, loaded.transformer).head
  back = load_published(tmp_path / 'out', loaded.transformer)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(head))


def test_a_head_is_written_anew_in_half_the_space(loaded, head_folder, tmp_path, capsys):
  arguments = ['--head', str(head_folder), '--out', str(tmp_path / 'out'), '--dtype', 'bfloat16']
  assert publish.main([*arguments, '--layout', 'decodax']) == 0
  sizes = [(f / 'model.safetensors').stat().st_size for f in (tmp_path / 'out', head_folder)]
  assert sizes[0] < 0.6 * sizes[1]
  back, head = (
    export.load_head(folder, loaded.transformer) for folder in (tmp_path / 'out', head_folder)
  )
  assert back.facts == head.facts
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1 / 256),
    nnx.state(back.head),
    nnx.state(head.head),
  )
  assert publish.main([*arguments, '--layout', 'medusa']) == 2
  assert "--dtype is for layout 'decodax'" in capsys.readouterr().err


def test_what_does_not_fit_is_named(loaded, head_folder, tmp_path, capsys):
  with pytest.raises(FileNotFoundError, match='is it the folder of a head'):
    export.load_head(tmp_path, loaded.transformer)
  (tmp_path / 'config.json').write_text(json.dumps({'architectures': ['LlamaForCausalLM']}))
  with pytest.raises(ValueError, match='holds no head in the format'):
    export.load_head(tmp_path, loaded.transformer)
  config = json.loads((head_folder / 'config.json').read_text())
  config['options'] = {'num_heads': 3}
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'config.json').write_text(json.dumps(config))
  (other / 'model.safetensors').write_bytes((head_folder / 'model.safetensors').read_bytes())
  with pytest.raises(ValueError, match='this target needs'):
    export.load_head(other, loaded.transformer)
  arguments = ['--head', str(tmp_path / 'no'), '--layout', 'medusa', '--out', str(tmp_path / 'o')]
  assert publish.main(arguments) == 2
  assert 'publish:' in capsys.readouterr().err


def test_a_language_model_comes_back_as_it_was(loaded, target_folder, tmp_path):
  export.save_language_model(
    tmp_path / 'model', loaded.transformer, tokenizer_directory=target_folder, facts={}
  )
  again = load_model(tmp_path / 'model')
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(again.transformer), nnx.state(loaded.transformer)
  )
  assert again.eos_ids == loaded.eos_ids

"""Published layouts of heads: written, read back to the same laws, and damaged on purpose.

The reading side is also fed tensors that are made here by name, so that the names are not only what
the writer says they are.
"""

import dataclasses
import json
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models.heads.checkpoints import load_published
from models.heads.checkpoints import save_published
from models.heads.eagle3 import Eagle3
from models.heads.eagle3 import Eagle3Config
from models.heads.hydra import Hydra
from models.heads.hydra import HydraConfig
from models.heads.medusa import Medusa
from models.heads.medusa import MedusaConfig
from models.heads.vocabulary import make_vocabulary
from tests.models.heads import zoo

H, V, F = zoo.WIDTH, zoo.VOCAB_SIZE, zoo.CONFIG.intermediate_size
HEADS, KV = (
  zoo.CONFIG.num_heads * zoo.CONFIG.head_dim,
  zoo.CONFIG.num_kv_heads * zoo.CONFIG.head_dim,
)
SPECULATORS = dict(verifier='some/model', speculative_tokens=3)


def _more_heads():
  target, rngs = zoo.target(), nnx.Rngs(3)
  size: dict[str, Any] = dict(hidden_size=H, vocab_size=V, num_heads=3)
  few = make_vocabulary(zoo.COUNTS, 16)
  return {
    'medusa-tied': Medusa(MedusaConfig(**size, num_layers=2, tie_blocks=True), target),
    'medusa-few': Medusa(MedusaConfig(**size, draft_vocab_size=16), target, vocabulary=few),
    'hydra++': Hydra(
      HydraConfig(**size, num_layers=4, tie_blocks=True, prefix=zoo.LAYER), target, rngs=rngs
    ),
    'eagle3-options': Eagle3(
      dataclasses.replace(
        Eagle3Config(zoo.LAYER, (0, 1, 3), H), norm_before_fuse=True, norm_taps=True,
        norm_before_residual=True, feed_normed=True, own_embedding=True,
      ),
      target, rngs=rngs,
    ),
  }  # fmt: skip


CASES = {
  'eagle': ('eagle', 'eagle', {}),
  'eagle3': ('eagle3', 'eagle3', {}),
  'speculators': ('eagle3', 'speculators', SPECULATORS),
  'speculators-options': ('+eagle3-options', 'speculators', SPECULATORS),
  'medusa': ('+medusa-tied', 'medusa', {}),
  'medusa-vllm': ('medusa', 'medusa-vllm', {}),
  'medusa-vllm-few': ('+medusa-few', 'medusa-vllm', {}),
  'medusa-vllm-shared': ('medusa-shared', 'medusa-vllm', {}),
  'hydra': ('hydra', 'hydra', {}),
  'hydra++': ('+hydra++', 'hydra', {}),
  'kangaroo': ('kangaroo', 'kangaroo', {}),
}


def _head(name):
  if not name.startswith('+'):
    return zoo.heads()[name]
  return zoo.shake(_more_heads()[name[1:]], 11)


@pytest.mark.parametrize('case', sorted(CASES))
def test_a_head_is_read_back_as_it_was(tmp_path, case):
  name, layout, facts = CASES[case]
  head = _head(name)
  save_published(tmp_path, head, zoo.target(), layout=layout, **facts)
  loaded = load_published(tmp_path, zoo.target())
  assert loaded.config == head.config
  flat, expected = (dict(nnx.to_flat_state(nnx.state(h))) for h in (loaded, head))
  assert set(flat) == set(expected)
  for path, variable in expected.items():
    np.testing.assert_array_equal(flat[path].get_value(), variable.get_value(), err_msg=str(path))


def _rng(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _layer(prefix, width=H):
  return {
    f'{prefix}self_attn.q_proj.weight': _rng(HEADS, width, seed=1),
    f'{prefix}self_attn.k_proj.weight': _rng(KV, width, seed=2),
    f'{prefix}self_attn.v_proj.weight': _rng(KV, width, seed=3),
    f'{prefix}self_attn.o_proj.weight': _rng(H, HEADS, seed=4),
    f'{prefix}mlp.gate_proj.weight': _rng(F, H, seed=5),
    f'{prefix}mlp.up_proj.weight': _rng(F, H, seed=6),
    f'{prefix}mlp.down_proj.weight': _rng(H, F, seed=7),
    f'{prefix}post_attention_layernorm.weight': _rng(H, seed=8),
  }


LLAMA = {
  'hidden_size': H,
  'intermediate_size': F,
  'num_attention_heads': zoo.CONFIG.num_heads,
  'num_key_value_heads': zoo.CONFIG.num_kv_heads,
  'num_hidden_layers': 1,
  'rms_norm_eps': 1e-5,
  'vocab_size': V,
}


def _eagle3_tensors():
  ids = np.array([0, 3, 4, 9, 20, 23])
  return ids, {
    'fc.weight': _rng(H, 3 * H),
    'midlayer.hidden_norm.weight': _rng(H, seed=21),
    'midlayer.input_layernorm.weight': _rng(H, seed=22),
    **_layer('midlayer.', 2 * H),
    'norm.weight': _rng(H, seed=23),
    'lm_head.weight': _rng(6, H, seed=24),
    'd2t': ids - np.arange(6),
    't2d': np.isin(np.arange(V), ids),
  }


def _put(directory, config, tensors, name='model.safetensors'):
  directory.mkdir(exist_ok=True)
  tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
  safetensors.numpy.save_file(tensors, directory / name)
  (directory / 'config.json').write_text(json.dumps(config))
  return directory


def test_eagle3_by_name(tmp_path):
  ids, tensors = _eagle3_tensors()
  config = {**LLAMA, 'draft_vocab_size': 6, 'architectures': ['LlamaForCausalLM']}
  head = load_published(_put(tmp_path, config, tensors), zoo.target())
  assert head.config.taps == (1, 1, 3)  # of a target of three layers
  assert not head.config.norm_before_residual and not head.config.own_embedding
  np.testing.assert_array_equal(head.vocabulary.ids[...], ids)
  np.testing.assert_array_equal(head.fuse[...], tensors['fc.weight'].T)
  np.testing.assert_array_equal(head.head[...], tensors['lm_head.weight'].T)
  np.testing.assert_array_equal(head.state_norm.scale[...], tensors['midlayer.hidden_norm.weight'])
  np.testing.assert_array_equal(
    head.embedding_norm.scale[...], tensors['midlayer.input_layernorm.weight']
  )
  # The value that the first key head makes of an input.
  x = _rng(2 * H, seed=40)
  value = (x @ np.asarray(head.attention.qkv[...][:, 0, -1])).reshape(-1)
  expected = (tensors['midlayer.self_attn.v_proj.weight'] @ x)[: zoo.CONFIG.head_dim]
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  config['eagle_config'] = {'eagle_aux_hidden_state_layer_ids': [0, 1, 2]}
  head = load_published(_put(tmp_path, config, tensors), zoo.target())
  assert head.config.taps == (0, 1, 2)


def test_eagle_by_name(tmp_path):
  target = zoo.target()
  tensors = {
    'fc.weight': _rng(H, 2 * H),
    'fc.bias': _rng(H, seed=9),
    **_layer('layers.0.'),
    'embed_tokens.weight': np.asarray(target.embedding[...], np.float16),
  }
  head = load_published(_put(tmp_path, LLAMA, tensors), target)
  assert head.config.bias  # absent means that there is one
  np.testing.assert_array_equal(head.fuse_bias[...], tensors['fc.bias'])
  assert head.layer_config.rope_theta == target.config.rope_theta
  tensors['embed_tokens.weight'] = _rng(V, H)
  with pytest.raises(ValueError, match="embed_tokens are not the target's"):
    load_published(_put(tmp_path, LLAMA, tensors), target)


def test_medusa_by_name(tmp_path):
  tensors = {}
  for i in range(2):
    tensors[f'{i}.0.linear.weight'] = _rng(H, H, seed=i)
    tensors[f'{i}.0.linear.bias'] = _rng(H, seed=10 + i)
    tensors[f'{i}.1.weight'] = _rng(V, H, seed=20 + i)
  config = {'medusa_num_heads': 2, 'medusa_num_layers': 1, 'version': '2'}
  folder = _put(tmp_path, config, tensors, 'medusa_lm_head.safetensors')
  head = load_published(folder, zoo.target())
  hidden = jnp.asarray(_rng(1, 1, H, seed=30))
  vectors = head.vectors(hidden)
  y = tensors['1.0.linear.weight'] @ hidden[0, 0] + tensors['1.0.linear.bias']
  np.testing.assert_allclose(vectors[0, 0, 1], hidden[0, 0] + y / (1 + np.exp(-y)), rtol=1e-4)
  logits = head.project(zoo.target(), vectors[:, :, 1], 1)[0, 0]
  np.testing.assert_allclose(logits, tensors['1.1.weight'] @ vectors[0, 0, 1], rtol=2e-4)


DAMAGE = {
  'd2t missing': (lambda c, t: t.pop('d2t'), 'd2t is missing'),
  'd2t holds ids': (lambda c, t: t.update(d2t=np.array([0, 3, 4, 9, 20, 23])), 'd2t .* is damaged'),
  'd2t falls': (lambda c, t: t.update(d2t=np.array([3, 0, 2, 6, 16, 18])), 'must rise strictly'),
  't2d differs': (lambda c, t: t.update(t2d=np.ones(V, bool)), 't2d and d2t disagree'),
  'size': (lambda c, t: c.update(draft_vocab_size=7), 'lm_head.weight has 6 rows'),
  'head missing': (lambda c, t: t.pop('lm_head.weight'), 'lm_head.weight is missing'),
  'norm missing': (lambda c, t: t.pop('norm.weight'), r"missing \['norm.weight'\]"),
  'left over': (lambda c, t: t.update(other=np.zeros(2)), r"of no use \['other'\]"),
  'shape': (
    lambda c, t: t.update({'fc.weight': _rng(H, 2 * H)}),
    r'fc.weight has shape \(32, 64\)',
  ),
  'vocabulary': (lambda c, t: c.update(vocab_size=99), 'for a vocabulary of 99 tokens'),
  'layers': (lambda c, t: c.update(num_hidden_layers=2), 'a head of one layer is supported'),
  'no norm': (lambda c, t: c.update(norm_output=False), 'norm_output false'),
  'width': (lambda c, t: c.update(target_hidden_size=64), 'for a target 64 wide'),
}


@pytest.mark.parametrize('damage', sorted(DAMAGE))
def test_damage_is_named(tmp_path, damage):
  change, message = DAMAGE[damage]
  _, tensors = _eagle3_tensors()
  config = {**LLAMA, 'draft_vocab_size': 6}
  change(config, tensors)
  with pytest.raises(ValueError, match=message):
    load_published(_put(tmp_path, config, tensors), zoo.target())


def test_what_speculators_leaves_open_must_be_chosen(tmp_path):
  save_published(tmp_path, zoo.heads()['eagle3'], zoo.target(), layout='speculators', **SPECULATORS)
  config = json.loads((tmp_path / 'config.json').read_text())
  method = config['speculators_config']['proposal_methods'][0]
  assert method['speculative_tokens'] == 3 and config['norm_before_residual'] is False
  assert config['speculators_config']['verifier']['name_or_path'] == 'some/model'
  assert config['transformer_layer_config']['vocab_size'] == V  # the target's
  del config['norm_before_residual']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='give norm_before_residual=True or False'):
    load_published(tmp_path, zoo.target())
  head = load_published(tmp_path, zoo.target(), norm_before_residual=True)
  assert head.config.norm_before_residual


def test_kangaroo_must_say_where_it_reads(tmp_path):
  save_published(tmp_path, zoo.heads()['kangaroo'], zoo.target(), layout='kangaroo')
  config = json.loads((tmp_path / 'config.json').read_text())
  del config['exit_layer']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='give exit_layer'):
    load_published(tmp_path, zoo.target())
  assert load_published(tmp_path, zoo.target(), exit_layer=1).config.exit_layer == 1


@pytest.mark.parametrize(
  ('name', 'layout', 'message'),
  [
    ('eagle3', 'medusa', 'holds a Medusa, not a Eagle3'),
    ('medusa-shared', 'medusa', 'no draft vocabulary'),
    ('medusa', 'medusa', 'ties the blocks'),
    ('+eagle3-options', 'eagle3', 'no norm_before_fuse or feed_normed'),
    ('hydra++', 'hydra', 'a whole projection for each head'),
    ('eagle', 'onnx', "unknown layout 'onnx'"),
  ],
)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, name, layout, message):
  with pytest.raises(ValueError, match=message):
    save_published(tmp_path, _head(name), zoo.target(), layout=layout)


def test_pickles_and_empty_folders(tmp_path):
  with pytest.raises(FileNotFoundError, match='no config.json'):
    load_published(tmp_path, zoo.target())
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(FileNotFoundError, match='has none of'):
    load_published(tmp_path, zoo.target())
  (tmp_path / 'hydra_lm_head.pt').write_bytes(b'')
  with pytest.raises(ValueError, match='pickled weights only'):
    load_published(tmp_path, zoo.target())
  _put(tmp_path, {}, {'x': np.zeros(1)})
  with pytest.raises(ValueError, match='no known layout'):
    load_published(tmp_path, zoo.target())

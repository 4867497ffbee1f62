"""LLaDA and Dream from Hugging Face directories: logits, traces, and what is refused."""

import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import decodax
from decodax import diffusion
from decodax.diffusion import policies
from models.config import TransformerConfig
from models.diffusion import as_masked_model
from models.diffusion import load_diffusion
from models.hf import config_from_hf
from models.transformer import Transformer
from tests.models import reference_diffusion as reference

_TOKENIZER = pathlib.Path(__file__).parent / 'golden' / 'tokenizer'
FAMILIES = {
  'llada': (reference.LLADA, reference.llada_logits, False),
  'dream': (reference.DREAM, reference.dream_logits, True),
}
PROMPT, CANVAS = 6, 8


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  """Returns name -> (directory, tensors) of tiny random checkpoints."""
  found = {}
  for name, (config, _, _) in FAMILIES.items():
    directory = tmp_path_factory.mktemp(name)
    shutil.copytree(_TOKENIZER, directory, dirs_exist_ok=True)
    (directory / 'config.json').write_text(json.dumps(config))
    tensors = reference.random_tensors(config)
    save_file(tensors, directory / 'model.safetensors')
    found[name] = directory, tensors
  return found


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_are_those_of_the_reference(name, checkpoints):
  directory, tensors = checkpoints[name]
  config, reference_logits, shifted = FAMILIES[name]
  loaded = load_diffusion(directory, dtype=jnp.float32)
  net, model = loaded.net, loaded.net.model
  assert (net.mask_id, net.shifted, net.block_size) == (95, shifted, None)
  tokens = np.random.default_rng(0).integers(3, 96, (2, 14))

  @jax.jit
  def run(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(14)[None], tokens.shape)
    cache = model.init_cache(params, 2, 1)
    output, _ = model.extend(params, cache, tokens, positions, jnp.ones((2, 14, 14), bool))
    return model.unembed(params, output.hidden)

  logits = run(loaded.params, jnp.asarray(tokens, jnp.int32))
  expected = reference_logits(tensors, tokens, config)
  assert expected.std() > 0.5
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def static_trace(logits_fn, tokens, prompt, size, num_steps, score, mask_id):
  """Returns (tokens i64[L], step i64[L]) of a published sampler on one row, as a plain loop.

  LLaDA fills its table's share; Dream floors the share of its time grid.
  """
  tokens, when = tokens.copy(), np.full(len(tokens), -1)
  slots = np.arange(prompt, prompt + size)
  tokens[slots] = mask_id
  times = np.linspace(1, 1e-3, num_steps + 1)
  for step in range(num_steps):
    logits = logits_fn(tokens)
    logits[:, mask_id] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    best, ordered = p.argmax(-1), np.sort(p, -1)
    masked = [s for s in slots if tokens[s] == mask_id]
    if score == 'llada':
      value, count = ordered[:, -1], size // num_steps + (step < size % num_steps)
    else:
      share = 1 - times[step + 1] / times[step]
      count = len(masked) if step == num_steps - 1 else int(len(masked) * share)
      entropy = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
      value = {
        'entropy': entropy, 'margin': ordered[:, -1] - ordered[:, -2], 'confidence': ordered[:, -1],
      }[score]  # fmt: skip
    for slot in sorted(masked, key=lambda s: -value[s])[:count]:
      tokens[slot], when[slot] = best[slot], step
  return tokens, when


TRACES = {
  'llada': [('llada', 8), ('llada', 3), ('entropy', 5)],
  'dream': [('entropy', 8), ('margin', 5), ('confidence', 4), ('llada', 4)],
}
_SLOW = [('llada', 'entropy', 5), ('dream', 'confidence', 4), ('dream', 'llada', 4)]


@pytest.mark.parametrize(
  ('name', 'score', 'num_steps'),
  [
    pytest.param(name, *case, marks=pytest.mark.slow if (name, *case) in _SLOW else ())
    for name, cases in TRACES.items()
    for case in cases
  ],
)
def test_static_samplers_fill_the_published_slots_at_the_published_steps(
  name, score, num_steps, checkpoints
):
  directory, tensors = checkpoints[name]
  config, reference_logits, shifted = FAMILIES[name]
  loaded = load_diffusion(directory, dtype=jnp.float32)
  prompts = np.random.default_rng(1).integers(3, 95, (3, PROMPT))
  request = decodax.make_request(
    prompts, max_new_tokens=CANVAS, vocab_size=96, capacity=PROMPT + CANVAS
  )
  policy = policies.llada(num_steps) if score == 'llada' else policies.dream(num_steps, score)
  run = jax.jit(
    lambda p, r: diffusion.denoise(
      p, r, net=loaded.net, policy=policy, blocks=diffusion.fixed_blocks(CANVAS)
    ),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  result = run(diffusion.Params(loaded.params), request)

  def logits_fn(tokens):
    logits = reference_logits(tensors, tokens[None], config)[0]
    return np.concatenate([logits[:1], logits[:-1]]) if shifted else logits

  for row in range(3):
    start = np.concatenate([prompts[row], np.zeros(CANVAS, int)])
    tokens, when = static_trace(logits_fn, start, PROMPT, CANVAS, num_steps, score, 95)
    np.testing.assert_array_equal(result.tokens[row], tokens)
    np.testing.assert_array_equal(result.committed_at[row], when)


def test_a_block_causal_model_is_one_by_its_configuration():
  qwen3 = dict(reference.DREAM, model_type='sdar', head_dim=8, block_size=4)
  assert not config_from_hf(qwen3).bidirectional
  assert config_from_hf(qwen3).qk_norm
  assert config_from_hf(reference.DREAM).bidirectional


def test_an_unsupported_llada_is_refused():
  for key, value in dict(
    layer_norm_type='default', alibi=True, include_bias=True, block_type='sequential'
  ).items():
    with pytest.raises(ValueError, match=key):
      config_from_hf({**reference.LLADA, key: value})


def test_a_checkpoint_without_a_mask_token_is_refused(checkpoints, tmp_path):
  directory, _ = checkpoints['dream']
  shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
  config = {k: v for k, v in reference.DREAM.items() if k != 'mask_token_id'}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='mask_id'):
    load_diffusion(tmp_path)
  assert load_diffusion(tmp_path, mask_id=7, dtype=jnp.float32).net.mask_id == 7
  (tmp_path / 'config.json').write_text(json.dumps({**config, 'model_type': 'qwen2'}))
  with pytest.raises(ValueError, match='shifted'):
    load_diffusion(tmp_path, mask_id=7)


def test_a_mask_outside_the_vocabulary_is_refused():
  config = TransformerConfig(8, 8, 1, 1, 1, 8, 8)
  with pytest.raises(ValueError, match='mask_id'):
    as_masked_model(Transformer(config, rngs=nnx.Rngs(0)), 8)

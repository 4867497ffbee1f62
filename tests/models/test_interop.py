"""Golden values recomputed by an installed transformers, and compared with decodax live."""

# pyright: reportMissingImports=false

import jax.numpy as jnp
import numpy as np
import pytest

from models.gguf_loader import load_gguf
from models.hf import load_hf
from models.registry import load_model
from models.tokenizer import tokenizer_from_directory
from tests.models import make_golden
from tests.models.make_golden import CHECKPOINTS
from tests.models.make_golden import GOLDEN
from tests.models.make_golden import PROMPT_LENGTH
from tests.models.make_golden import TOKENIZER
from tests.models.test_hf import chunked_logits
from tests.models.test_hf import full_logits
from tests.models.test_hf import golden
from tests.models.test_real import continue_greedily

pytestmark = [
  pytest.mark.interop,
  # Whatever torch and transformers warn of is theirs to mend.
  pytest.mark.filterwarnings('default'),
]


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_tiny_checkpoints(name):
  _, tokens, expected = golden(name)
  model = make_golden.load_reference(GOLDEN / name)
  found, logits = make_golden.reference(model, tokens[:, :PROMPT_LENGTH].astype(np.int64))
  np.testing.assert_array_equal(found, tokens)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)

  fresh = np.random.default_rng(7).integers(3, 96, (3, 40))
  _, logits = make_golden.reference(model, fresh, new_tokens=0)
  transformer = load_hf(GOLDEN / name, dtype=jnp.float32).transformer
  ours = full_logits(transformer, fresh.astype(np.int32))
  np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)
  ours = chunked_logits(transformer, fresh.astype(np.int32), chunk=8)
  np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)


def test_tokenizer_on_shipped_prompts():
  import transformers

  reference = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
  found = tokenizer_from_directory(TOKENIZER)
  for turns in make_golden.real_prompts():
    messages = [{'role': 'user', 'content': turns[0]}]
    assert found.encode(turns[0]) == reference.encode(turns[0])
    assert found.apply_chat_template(messages) == reference.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=True
    )


def test_smollm2_on_shipped_prompts():
  """Greedy tokens equal transformers' on every prompt that the project ships."""
  path = make_golden.real_weights()
  model, tokenizer = make_golden.load_real_reference(path)
  loaded = load_model(path, dtype=jnp.float32)
  prompts = [
    tokenizer.encode_chat([{'role': 'user', 'content': turns[0]}])
    for turns in make_golden.real_prompts()
  ]
  expected = [make_golden.greedy(model, ids, 32) for ids in prompts]
  assert continue_greedily(loaded.transformer, prompts, 32) == expected


def test_smollm2_tokenizer_on_shipped_prompts():
  import transformers

  path = make_golden.real_weights()
  reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  found = load_gguf(path).tokenizer
  for turns in make_golden.real_prompts():
    messages = [{'role': 'user', 'content': turns[0]}]
    assert found.encode(turns[0]) == reference.encode(turns[0], add_special_tokens=False)
    assert found.apply_chat_template(messages) == reference.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=True
    )


def test_scaled_embedding_rounds_as_transformers_does_in_bfloat16():
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    GOLDEN / 'gemma3', dtype=torch.bfloat16, attn_implementation='eager'
  ).eval()
  transformer = load_hf(GOLDEN / 'gemma3', dtype=jnp.bfloat16).transformer
  tokens = np.arange(3, 90)[None]
  with torch.no_grad():
    expected = model.model.embed_tokens(torch.tensor(tokens)).float().numpy()
  found = np.asarray(transformer.embed(jnp.asarray(tokens)), np.float32)
  np.testing.assert_array_equal(found, expected)

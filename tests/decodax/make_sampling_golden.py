"""Makes the golden file of the sampling rules from transformers (`make interop` installs it).

  python -m tests.decodax.make_sampling_golden

Every case is one row of logits f32[V] and the tokens before it; `warped` is what the processors of
transformers make of them, in the order in which its `generate` applies them.
"""

# pyright: reportMissingImports=false

import itertools
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'sampling.npz'
VOCAB_SIZE, NUM_SEEN = 50, 12
OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
VALUES = dict(
  repetition_penalty=(1.3, 0.7),
  temperature=(0.6, 1.7),
  top_k=(5, 1, 60),
  top_p=(0.8, 0.3, 0.99),
  min_p=(0.1, 0.5),
)


def cases() -> list[dict]:
  """Returns sampling values: every rule alone, every pair and triple, and all together."""
  chosen = [{}]
  for name, values in VALUES.items():
    chosen += [{name: value} for value in values]
  for count in (2, 3, 5):
    for names in itertools.combinations(VALUES, count):
      chosen += [{name: VALUES[name][index] for name in names} for index in (0, 1)]
  return [{**OFF, **case} for case in chosen]


def inputs() -> tuple[np.ndarray, np.ndarray]:
  """Returns (logits f32[C, V], tokens i64[C, n]), other ones for each case."""
  rng = np.random.default_rng(0)
  count = len(cases())
  logits = 2.5 * rng.standard_normal((count, VOCAB_SIZE)).astype(np.float32)
  logits[::7, 3:6] = -np.inf  # impossible from the start
  return logits, rng.integers(0, VOCAB_SIZE, (count, NUM_SEEN))


def warp_with_transformers() -> np.ndarray:
  """Returns f32[C, V], the cases' logits after the processors of transformers."""
  import torch
  import transformers

  logits, tokens = inputs()
  warped = np.empty_like(logits)
  for row, case in enumerate(cases()):
    processors = transformers.LogitsProcessorList()
    if case['repetition_penalty'] != 1:
      processors.append(
        transformers.RepetitionPenaltyLogitsProcessor(penalty=case['repetition_penalty'])
      )
    if case['temperature'] != 1:
      processors.append(transformers.TemperatureLogitsWarper(case['temperature']))
    if case['top_k'] > 0:
      processors.append(transformers.TopKLogitsWarper(top_k=case['top_k']))
    if case['top_p'] < 1:
      processors.append(transformers.TopPLogitsWarper(top_p=case['top_p']))
    if case['min_p'] > 0:
      processors.append(transformers.MinPLogitsWarper(min_p=case['min_p']))
    ids, scores = torch.from_numpy(tokens[row : row + 1]), torch.from_numpy(logits[row : row + 1])
    warped[row] = processors(ids, scores.clone())[0].numpy()
  return warped


if __name__ == '__main__':
  GOLDEN.parent.mkdir(exist_ok=True)
  logits, tokens = inputs()
  np.savez_compressed(GOLDEN, logits=logits, tokens=tokens, warped=warp_with_transformers())
  print(f'{GOLDEN}: {len(cases())} cases, {GOLDEN.stat().st_size} bytes')

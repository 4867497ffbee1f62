"""Jacobi decoding and its relatives, one row at a time in plain Python.

Each function returns (the tokens emitted, the number of target calls). A target is given by
`best(text)`, the likeliest token after a text.
"""

from collections.abc import Callable, Sequence

Best = Callable[[Sequence[int]], int]


def plain(best: Best, prompt: Sequence[int], num_new: int) -> list[int]:
  text = list(prompt)
  while len(text) < len(prompt) + num_new:
    text.append(best(text))
  return text[len(prompt) :]


def jacobi(
  best: Best, prompt: Sequence[int], num_new: int, *, num_drafts: int, guess: int, exit_after: int
) -> tuple[list[int], int]:
  text, drafts, ages, calls = list(prompt), [guess] * num_drafts, [0] * num_drafts, 0
  while len(text) < len(prompt) + num_new:
    calls += 1
    answers = [best(text + drafts[:i]) for i in range(num_drafts + 1)]
    kept = 0
    while kept < num_drafts and (drafts[kept] == answers[kept] or ages[kept] >= exit_after):
      kept += 1
    text += drafts[:kept] + [answers[kept]]
    left = answers[kept + 1 :]
    ages = [age + 1 for age in (*ages, 0)[kept + 1 :]]
    drafts = left + [guess] * (num_drafts - len(left))
    ages = ages + [0] * (num_drafts - len(ages))
  return text[len(prompt) : len(prompt) + num_new], calls


def lookahead(
  best: Best,
  prompt: Sequence[int],
  num_new: int,
  *,
  window: list[list[int]],
  num_ngrams: int,
  from_text: bool,
) -> tuple[list[int], int, dict[int, list[tuple[int, ...]]]]:
  """`window` holds the levels; also returns the pool, newest first."""
  levels, width = len(window), len(window[0])
  pool: dict[int, list[tuple[int, ...]]] = {}

  def insert(gram):
    key, value = gram[0], tuple(gram[1:])
    found = [value, *(other for other in pool.get(key, []) if other != value)]
    pool[key] = found[:num_ngrams]

  def insert_text(text, start):
    for end in range(max(start, levels), len(text)):
      if from_text:
        insert(text[end - levels : end + 1])

  text, calls = list(prompt), 0
  insert_text(text, 0)
  while len(text) < len(prompt) + num_new:
    calls += 1
    start, candidates = len(text), list(pool.get(text[-1], []))
    window[0][0] = text[-1]
    columns = [[window[level][column] for level in range(levels)] for column in range(width)]
    answers = [best(text[:-1] + window[0][:column] + columns[column]) for column in range(width)]
    longest: list[int] = []
    for candidate in candidates:
      kept = 0
      while kept < levels and candidate[kept] == best(text + list(candidate[:kept])):
        kept += 1
      longest = max(longest, list(candidate[:kept]), key=len)
    text += longest
    text.append(best(text))
    for column in range(width):
      insert([*columns[column], answers[column]])
    insert_text(text, start)
    window = [*[list(level) for level in window[1:]], answers]
  return text[len(prompt) : len(prompt) + num_new], calls, pool


def lexical_units(
  best: Best,
  likelihood: Callable[[Sequence[int]], float],
  prompt: Sequence[int],
  num_new: int,
  *,
  pad: int,
  num_drafts: int,
  confidence: float,
) -> tuple[list[int], int]:
  """As published: every call emits a token and the confident ones behind it."""
  text, calls = list(prompt), 0
  while len(text) < len(prompt) + num_new:
    calls += 1
    unit = [best(text)]
    for count in range(1, num_drafts + 1):
      asked = text + [pad] * count
      if likelihood(asked) < confidence:
        break
      unit.append(best(asked))
    text += unit
  return text[len(prompt) : len(prompt) + num_new], calls


def input_guided(
  output: Sequence[int],
  prompt: Sequence[int],
  source: Sequence[int] | None,
  *,
  num_drafts: int,
  max_ngram: int,
  stop: int | None,
) -> int:
  """Returns the calls that it takes to emit `output`. Without a source it is the prompt."""
  pointer = None if source is None else 0
  source = list(prompt if source is None else source)
  done, calls = 0, 0
  while done < len(output):
    calls += 1
    drafts: list[int] = []
    if pointer is not None:
      drafts = (source + ([] if stop is None else [stop]))[pointer : pointer + num_drafts]
    drafts = drafts[: len(output) - done - 1]
    kept = 0
    while kept < len(drafts) and drafts[kept] == output[done + kept]:
      kept += 1
    emitted = list(output[done : done + kept + 1])
    done += kept + 1
    if pointer is not None and source[pointer : pointer + len(emitted)] == emitted:
      pointer += len(emitted)
      continue
    pointer = None
    for size in range(1, min(max_ngram, done) + 1):
      suffix = list(output[done - size : done])
      ends = [i for i in range(size, len(source) + 1) if source[i - size : i] == suffix]
      if len(ends) == 1:
        pointer = ends[0] if ends[0] < len(source) else None
        break
  return calls

"""Documents from files: plain text, JSON lines, Parquet, and the corpora on every machine.

A *document* is a text, a conversation, or token ids with their mask. What a line of JSON or a row
of Parquet is, its fields say:

  {"text": ...}                                        a text
  {"prompt": ..., "response": ...}                     a conversation of two turns
  {"messages": [{"role": ..., "content": ...}, ...]}   OpenAI
  {"conversations": [{"from": ..., "value": ...}]}     ShareGPT
  {"token_ids": [...], "loss_mask": [...]}             what `train.regenerate` writes
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import hashlib
import json
import pathlib
import pydoc_data.topics
import sysconfig
from typing import Any, NamedTuple

from train import list_tasks

_TEXT_SUFFIXES = ('.txt', '.md', '.rst', '.py')
_FIELDS = 'text; prompt and response; messages; conversations; token_ids and loss_mask'
_ROLES = {
  'human': 'user', 'user': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'bing': 'assistant',
  'bard': 'assistant', 'assistant': 'assistant', 'model': 'assistant', 'system': 'system',
  'tool': 'tool', 'function': 'tool',
}  # fmt: skip
# Parts of the standard library that are data or tests.
_NOT_SOURCE = ('site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'encodings',
               'pydoc_data', '__pycache__', 'turtledemo')  # fmt: skip


class Document(NamedTuple):
  """One document; exactly one of the three is set."""

  where: str  # file and line, for messages to a person
  text: str | None = None
  messages: tuple[Mapping[str, str], ...] | None = None
  token_ids: tuple[int, ...] | None = None
  loss_mask: tuple[bool, ...] | None = None  # with token_ids


def read_sources(sources: Sequence[str]) -> Iterator[Document]:
  """Yields the documents of files, folders and named corpora, in an order that never changes.

  Raises:
    ValueError: if a source is empty, unknown or malformed; it says where.
    FileNotFoundError: if there is no such file.
  """
  for source in sources:
    empty = True
    for document in CORPORA[source]() if source in CORPORA else _read_path(pathlib.Path(source)):
      empty = False
      yield document
    if empty:
      raise ValueError(f'{source} holds no documents')


def fingerprint(sources: Sequence[str]) -> str:
  """Returns a hash of what the sources hold: of bytes, not of dates."""
  digest = hashlib.sha256()
  for document in read_sources(sources):
    digest.update(json.dumps(document[1:]).encode())
  return digest.hexdigest()


def _read_path(path):
  path = path.expanduser()
  if path.is_dir():
    for file in sorted(each for each in path.rglob('*') if each.suffix in _READERS):
      yield from _READERS[file.suffix](file)
  elif not path.is_file():
    named = ', '.join(CORPORA)
    raise FileNotFoundError(f'no such file or folder: {path}. Corpora known by name: {named}.')
  elif path.suffix in _READERS:
    yield from _READERS[path.suffix](path)
  else:
    raise ValueError(f'{path} is of no kind that is read: {", ".join(_READERS)}')


def _read_text(path):
  try:
    text = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error}') from error
  if text.strip():
    yield Document(str(path), text=text)


def _read_jsonl(path):
  with open(path, encoding='utf-8-sig') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      where = f'{path}, line {number}'
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ValueError(f'{where}: not valid JSON ({error})') from error
      yield parse_record(record, where)


def _read_parquet(path):
  try:
    import pyarrow.parquet  # an extra: only where Parquet is read
  except ImportError as error:
    raise ValueError(f"{path} needs pyarrow: pip install 'decodax[parquet]'") from error
  table = pyarrow.parquet.ParquetFile(path)
  known = {'text', 'prompt', 'response', 'messages', 'conversations', 'token_ids', 'loss_mask'}
  columns = [name for name in table.schema_arrow.names if name in known]
  if not columns:
    raise ValueError(
      f'{path} has the columns {", ".join(table.schema_arrow.names)}; need {_FIELDS}'
    )
  row = 0
  for batch in table.iter_batches(columns=columns):
    for record in batch.to_pylist():
      row += 1
      yield parse_record(record, f'{path}, row {row}')


_READERS: dict[str, Callable[[pathlib.Path], Iterator[Document]]] = {
  **dict.fromkeys(_TEXT_SUFFIXES, _read_text),
  '.jsonl': _read_jsonl,
  '.parquet': _read_parquet,
}


def parse_record(record: Any, where: str) -> Document:
  """Returns the document that a line or row holds.

  Raises:
    ValueError: if it is none of the known kinds, or a turn is malformed.
  """
  if not isinstance(record, Mapping):
    raise ValueError(f'{where}: expected an object with one of: {_FIELDS}')
  if record.get('token_ids') is not None:
    return _parse_ids(record, where)
  if record.get('messages') is not None:
    return Document(where, messages=_parse_turns(record['messages'], 'role', 'content', where))
  if record.get('conversations') is not None:
    return Document(where, messages=_parse_turns(record['conversations'], 'from', 'value', where))
  if isinstance(record.get('prompt'), str) and isinstance(record.get('response'), str):
    pair = ({'role': 'user', 'content': record['prompt']},
            {'role': 'assistant', 'content': record['response']})  # fmt: skip
    return Document(where, messages=pair)
  if isinstance(record.get('text'), str):
    return Document(where, text=record['text'])
  raise ValueError(f'{where}: has {", ".join(map(str, record)) or "no fields"}; need {_FIELDS}')


def _parse_turns(turns, role_key, content_key, where):
  if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
    raise ValueError(f'{where}: a conversation must be a list of turns')
  parsed = []
  for index, turn in enumerate(turns):
    role = turn.get(role_key) if isinstance(turn, Mapping) else None
    content = turn.get(content_key) if isinstance(turn, Mapping) else None
    if role not in _ROLES or not isinstance(content, str):
      raise ValueError(
        f'{where}: turn {index} needs {role_key!r}, one of {", ".join(sorted(_ROLES))}, and '
        f'{content_key!r}, a text; it is {str(turn)[:120]}'
      )
    parsed.append({'role': _ROLES[role], 'content': content})
  return tuple(parsed)


def _parse_ids(record, where):
  ids, mask = record['token_ids'], record.get('loss_mask')
  if mask is None:
    mask = [True] * len(ids)
  whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids)
  if not ids or not whole or len(mask) != len(ids):
    raise ValueError(f'{where}: token_ids must be ids, and loss_mask as long: {len(ids)=}')
  return Document(where, token_ids=tuple(ids), loss_mask=tuple(bool(each) for each in mask))


# --- Corpora that need no download ---------------------------------------------------------------


def _standard_library() -> Iterator[Document]:
  """Yields the sources of the standard library, without its tests and tables."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  for path in sorted(root.rglob('*.py')):
    if any(part in _NOT_SOURCE for part in path.relative_to(root).parts):
      continue
    text = path.read_text(encoding='utf-8', errors='replace')
    if text.strip():
      yield Document(str(path.relative_to(root)), text=text)


def _language_reference() -> Iterator[Document]:
  """Yields the topics of `help()`: the prose of Python's language reference."""
  for name, text in sorted(pydoc_data.topics.topics.items()):
    yield Document(f'pydoc topic {name}', text=text)


def _list_tasks() -> Iterator[Document]:
  """Yields questions about lists with their answers, as token ids of `train.list_tasks`."""
  for index, example in enumerate(list_tasks.examples(list_tasks.NUM_DOCUMENTS, seed=0)):
    prompt, canvas = list_tasks.to_ids(example.prompt), list_tasks.canvas_of(example)
    mask = (False,) * len(prompt) + (True,) * len(canvas)
    yield Document(f'list task {index}', token_ids=(*prompt, *canvas), loss_mask=mask)


CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
  'stdlib': _standard_library,
  'pydoc': _language_reference,
  'list_tasks': _list_tasks,
}

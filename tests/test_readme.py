"""What README shows works as it stands there."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from tests.table_model import random_table
from tests.table_model import table_model

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TEXT = (_ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_library_example_runs():
  (code,) = re.findall(r'```python\n(.*?)```', _TEXT, flags=re.DOTALL)
  names = {
    'my_model': table_model(5),
    'my_params': jnp.asarray(random_table(0, 5), jnp.float32),
    'prompts': [[1, 2, 1, 2], [3]],
  }
  exec(compile(code, 'README.md', 'exec'), names)
  result = names['result']
  assert np.all(result.length > result.prompt_length)
  assert np.all(np.asarray(result.stats.num_emitted) == result.length - result.prompt_length)


def test_links_lead_somewhere():
  for name in (
    'README.md',
    'CONTRIBUTING.md',
    *(f'docs/{p.name}' for p in _ROOT.glob('docs/*.md')),
  ):
    page = _ROOT / name
    for link in re.findall(r'\]\(([^)#]+)[^)]*\)', page.read_text(encoding='utf-8')):
      if not link.startswith('http'):
        assert (page.parent / link).exists(), f'{name} links to {link}, which is not there'

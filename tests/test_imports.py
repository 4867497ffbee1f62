"""Who may import whom, and what the pure packages never do. Read from the source, not run."""

import ast
from collections.abc import Iterator
import pathlib
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# The project's packages, and which of the others each may import.
_ALLOWED = {
  'pallas_kernels': set(),
  'decodax': {'pallas_kernels'},
  'models': {'decodax', 'pallas_kernels'},
  'train': {'decodax', 'pallas_kernels', 'models'},
  'experiments': {'decodax', 'pallas_kernels', 'models', 'train'},
}
# The installed packages get by with few others; the rest are free.
_ALLOWED_EXTERNAL = {
  'pallas_kernels': {'jax', 'jaxlib', 'numpy'},
  'decodax': {'jax', 'jaxlib', 'numpy', 'chex'},
}
# decodax is pure: nothing is read or written, nothing jits itself, nothing calls back to the host.
_FORBIDDEN_BUILTINS = {'print', 'open', 'breakpoint'}
_FORBIDDEN_IN_JAX = {
  'jax.jit',
  'jax.pmap',
  'jax.debug',
  'jax.pure_callback',
  'jax.experimental.io_callback',
}


def _imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
  """Yields (line, dotted name) of each import; `from a import b` gives `a.b`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      module = node.module or ''
      if node.level:
        parents = package.split('.')
        parents = parents[: len(parents) - (node.level - 1)]
        module = '.'.join([*parents, module]).strip('.')
      for alias in node.names:
        yield node.lineno, f'{module}.{alias.name}'
    elif isinstance(node, ast.Call) and node.args:
      name = ast.unparse(node.func).split('.')[-1]
      target = node.args[0]
      if name in ('import_module', '__import__') and isinstance(target, ast.Constant):
        yield node.lineno, str(target.value)


def _python_files(root: pathlib.Path, package: str) -> Iterator[tuple[pathlib.Path, ast.AST, str]]:
  """Yields (path relative to root, tree, dotted package) of each Python file of a package."""
  for path in sorted((root / package).rglob('*.py')):
    relative = path.relative_to(root)
    tree = ast.parse(path.read_text(encoding='utf-8'), filename=str(path))
    yield relative, tree, '.'.join(relative.parent.parts)


def upward_imports(root: pathlib.Path) -> list[str]:
  """Imports that go the wrong way, as `path:line: name`."""
  found = []
  for package, allowed in _ALLOWED.items():
    external = _ALLOWED_EXTERNAL.get(package)
    for path, tree, parent in _python_files(root, package):
      for line, name in _imported_modules(tree, parent):
        top = name.split('.')[0]
        if top == package or top in sys.stdlib_module_names:
          continue
        if top in _ALLOWED or top == 'tests':
          wrong = top not in allowed
        else:
          wrong = external is not None and top not in external
        if wrong:
          found.append(f'{path}:{line}: {name}')
  return found


def impurities(root: pathlib.Path, package: str) -> list[str]:
  """Uses of what a pure package leaves to its callers, as `path:line: name`."""
  found = []
  for path, tree, parent in _python_files(root, package):
    for node in ast.walk(tree):
      if isinstance(node, ast.Name) and node.id in _FORBIDDEN_BUILTINS:
        found.append(f'{path}:{node.lineno}: {node.id}')
      elif isinstance(node, ast.Attribute) and ast.unparse(node) in _FORBIDDEN_IN_JAX:
        found.append(f'{path}:{node.lineno}: {ast.unparse(node)}')
    for line, name in _imported_modules(tree, parent):
      if any(name == bad or name.startswith(f'{bad}.') for bad in _FORBIDDEN_IN_JAX):
        found.append(f'{path}:{line}: {name}')
  return found


def test_imports_go_one_way():
  assert upward_imports(_ROOT) == []


def test_decodax_is_pure():
  assert impurities(_ROOT, 'decodax') == []


def test_every_folder_is_a_package():
  # A folder without __init__.py loses to any installed package of the same name.
  folders = {path.parent for package in _ALLOWED for path in (_ROOT / package).rglob('*.py')}
  bare = [folder for folder in folders if not (folder / '__init__.py').is_file()]
  assert sorted(str(folder.relative_to(_ROOT)) for folder in bare) == []


def _write(root: pathlib.Path, path: str, source: str) -> None:
  (root / path).parent.mkdir(parents=True, exist_ok=True)
  (root / path).write_text(source)


@pytest.mark.parametrize(
  ('path', 'source', 'name'),
  [
    ('decodax/a.py', 'import models', 'models'),
    ('decodax/a.py', 'def f():\n  from models import loaders', 'models.loaders'),
    ('decodax/sub/a.py', 'import flax.nnx as nnx', 'flax.nnx'),
    ('decodax/a.py', "import importlib\nimportlib.import_module('optax')", 'optax'),
    ('pallas_kernels/op/gpu.py', 'from decodax import records', 'decodax.records'),
    ('pallas_kernels/op/gpu.py', 'import chex', 'chex'),
    ('models/a.py', 'from train import step', 'train.step'),
    ('models/a.py', 'from ..train import step', 'train.step'),
    ('train/a.py', 'import experiments.compare', 'experiments.compare'),
    ('experiments/a.py', 'from tests import helpers', 'tests.helpers'),
  ],
)
def test_an_upward_import_is_found(tmp_path, path, source, name):
  _write(tmp_path, path, source)
  (found,) = upward_imports(tmp_path)
  assert found.startswith(f'{path}:') and found.endswith(f': {name}')


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('decodax/a.py', 'import functools\nimport jax.numpy as jnp\nimport pallas_kernels.op'),
    ('decodax/sub/a.py', 'from . import b\nfrom .. import c\nfrom ..d import e\nimport chex'),
    ('models/a.py', 'import decodax\nfrom flax import nnx'),
    ('train/a.py', 'import models, decodax, optax'),
    ('experiments/a.py', 'import train, models, decodax, rich'),
  ],
)
def test_a_downward_import_passes(tmp_path, path, source):
  _write(tmp_path, path, source)
  assert upward_imports(tmp_path) == []


@pytest.mark.parametrize(
  'source',
  [
    "print('x')",
    "with open('x') as f: pass",
    'import jax\n@jax.jit\ndef f(x): return x',
    'import functools, jax\nf = functools.partial(jax.jit, static_argnums=0)',
    'from jax import jit',
    "import jax\njax.debug.print('x')",
    'from jax.experimental import io_callback',
  ],
)
def test_an_impurity_is_found(tmp_path, source):
  _write(tmp_path, 'decodax/a.py', source)
  assert len(impurities(tmp_path, 'decodax')) == 1

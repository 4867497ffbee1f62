"""Which implementation runs: named, by default, or the best that works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_problems import Attention
from experiments.kernel_problems import attention
from experiments.kernel_problems import commit_path
from experiments.kernel_problems import fill
from experiments.kernel_problems import unmask_block
from experiments.kernel_problems import verify_nodes
from pallas_kernels import default_implementation
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Kernel

_SMALL = {
  'attention': attention(
    Attention(
      batch=2, num_queries=3, prefix=256, num_heads=4, num_kv_heads=2, head_dim=64,
      dtype=jnp.float32,
    )
  ),
  'commit': commit_path(batch=2, num_layers=1, num_slots=1024, path=3, nodes=4),
  'verify': verify_nodes(batch=2, nodes=2, vocab_size=500, filtered=True),
  'unmask': unmask_block(batch=1, length=3, vocab_size=500, dtype=jnp.float32),
}  # fmt: skip


def _load(reasons):
  def load(name):
    reason = reasons.get(name)
    if isinstance(reason, Exception):
      raise reason
    return Kernel(lambda x: f'{name} {x}', reason)

  return load


def _run(implementation=None, kernels=('tpu', 'gpu', 'interpret'), **reasons):
  return dispatch.dispatch(
    'thing', implementation, ('x',), xla=lambda x: f'xla {x}', load=_load(reasons), kernels=kernels
  )


def test_a_name_is_obeyed():
  for name in dispatch.IMPLEMENTATIONS:
    assert _run(name, kernels=dispatch.IMPLEMENTATIONS[1:]) == f'{name} x'


def test_a_default_that_an_operation_lacks_does_not_count():
  with default_implementation('interpret'):
    assert _run(kernels=('tpu',)) == 'xla x'
  with pytest.raises(NotImplementedError, match="thing has no 'interpret' implementation"):
    _run('interpret', kernels=('tpu',))


def test_an_operation_with_a_kernel_for_cpus_uses_it_on_cpus():
  def run(reason):
    def load(name):
      return Kernel(lambda x: f(name, x), reason)

    def f(name, x):
      assert name == 'cpu'
      return x + 1

    x = jnp.zeros(())
    return dispatch.dispatch('thing', None, (x,), xla=lambda x: x, load=load, kernels=('cpu',))

  assert run(None) == 1
  assert run('too large') == 0


def test_on_cpu_the_best_is_xla_and_no_kernel_is_loaded():
  assert _run(tpu=RuntimeError(), gpu=RuntimeError(), interpret=RuntimeError()) == 'xla x'


def test_what_was_named_works_or_says_why_not():
  with pytest.raises(NotImplementedError, match="thing with implementation='tpu': too large"):
    _run('tpu', tpu='too large')
  with pytest.raises(NotImplementedError, match="thing has no 'sundial' implementation"):
    _run('sundial')
  with pytest.raises(NotImplementedError, match='Pallas cannot be imported: no absl'):
    _run('gpu', gpu=ImportError('no absl'))


def test_the_default_can_be_set_and_comes_back():
  with default_implementation('interpret'):
    assert _run() == 'interpret x'
    assert _run('xla') == 'xla x'
    with default_implementation(None):
      assert _run() == 'xla x'
    assert _run() == 'interpret x'
  assert _run() == 'xla x'
  with pytest.raises(ValueError, match="no such implementation: 'sundial'"):
    with default_implementation('sundial'):
      pass


@pytest.mark.parametrize('backend', ['tpu', 'gpu'])
def test_a_device_gets_its_kernel_unless_the_kernel_cannot(monkeypatch, backend):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(dispatch, '_is_hopper', lambda: True)
  taken = {}
  monkeypatch.setattr(
    dispatch.lax, 'platform_dependent', lambda *_, default, **branches: taken.update(branches)
  )
  _run()
  assert list(taken) == [{'tpu': 'tpu', 'gpu': 'cuda'}[backend]]
  assert _run(**{backend: 'too large'}) == 'xla x'
  assert _run(**{backend: ImportError('no absl')}) == 'xla x'
  monkeypatch.setattr(dispatch, '_is_partitioned', lambda: True)
  assert _run() == 'xla x'


def test_another_gpu_than_hopper_gets_xla(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert _run() == 'xla x'  # this machine's device has no compute capability


@pytest.mark.parametrize('name', ['attention', 'commit', 'verify', 'unmask'])
def test_the_automatic_choice_is_made_for_the_platform_that_runs(monkeypatch, name):
  """Where a TPU is the default, what is compiled for another platform still gets the XLA form."""
  problem = _SMALL[name]
  args = fill(problem)
  expected = jax.tree.leaves(problem.run(*args))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  traced = jax.jit(problem.run).trace(*args)
  assert 'pallas_call' in str(traced.jaxpr)
  monkeypatch.undo()
  found = jax.tree.leaves(traced.lower().compile()(*args))
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

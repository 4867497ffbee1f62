"""Every kernel lowers for TPU and for CUDA on a machine that has neither.

Lowering finds bad block shapes and operations that a backend lacks. What does not fit into a
device's memories is found by compiling for it: `make aot`.
"""

import jax
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import use_abstract_mesh
import pytest

from experiments.kernel_problems import compiled_problems
from pallas_kernels.dispatch import device_kind

_PROBLEMS = {problem.name: problem for problem in compiled_problems()}
_DEVICES = {
  'tpu': ('tpu', AbstractDevice('TPU v5 lite', 1, 'tpu')),
  'gpu': ('cuda', AbstractDevice('NVIDIA H200', None, 'gpu')),
}
_QUICK = [
  'attention B=8 T=64 S=8192 H=32/8 Dh=128 bfloat16',
  'attention B=8 T=64 S=8192 H=32/8 Dh=128 bfloat16 paged window',
  'attention B=8 T=64 S=8192 H=32/8 Dh=128 bfloat16 cache int8',
  'attention B=8 T=1 S=8192 H=32/8 Dh=128 float32',
  'commit B=8 L=32 S=8192 K=6 paged',
  'verify B=8 N=64 V=128256 top-k/top-p',
  'unmask B=8 T=32 V=126464 head D=4096 bfloat16',
]


def _lower(problem, name):
  platform, device = _DEVICES[name]
  with use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device)):
    assert device_kind() == device.device_kind
    traced = jax.jit(lambda *args: problem.run(*args, implementation=name)).trace(*problem.args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def _check(name, problem):
  target = {'tpu': 'tpu_custom_call', 'gpu': ('mosaic_gpu', 'triton')}[name]
  text = _lower(problem, name)
  assert any(word in text for word in ([target] if isinstance(target, str) else target))


@pytest.mark.parametrize('name', _DEVICES)
@pytest.mark.parametrize('problem', _QUICK)
def test_it_lowers(problem, name):
  _check(name, _PROBLEMS[problem])


@pytest.mark.slow
@pytest.mark.parametrize('name', _DEVICES)
@pytest.mark.parametrize('problem', sorted(set(_PROBLEMS) - set(_QUICK)))
def test_every_other_problem_lowers(problem, name):
  _check(name, _PROBLEMS[problem])

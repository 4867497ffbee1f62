"""How sure a masked-diffusion model is of each position, in one pass over the vocabulary."""

import jax

from pallas_kernels.dispatch import Kernel
from pallas_kernels.dispatch import dispatch
from pallas_kernels.unmask.reference import Certainty as Certainty
from pallas_kernels.unmask.reference import check_arguments
from pallas_kernels.unmask.reference import unmask_reference

__all__ = ['Certainty', 'unmask']


def unmask(
  logits: jax.Array,
  head: jax.Array | None = None,
  *,
  transposed: bool = False,
  implementation: str | None = None,
) -> Certainty:
  """Returns best token, confidence, runner-up, margin, entropy, log-normaliser; each [B, T].

  With a head the logits are `logits @ head`: they are made block by block and never reach memory.

  Args:
    logits: f[B, T, V]; with a head, hidden f[B, T, D] after the final norm. A logit may be -inf.
    head: f[D, V], or f[V, D] if `transposed`, as a tied embedding is.
    transposed: which of the two.
    implementation: None (the best that works on the device), 'xla', 'tpu', 'gpu' or 'interpret'
      (the TPU kernel on any device, slowly).

  Raises:
    ValueError: if shapes disagree.
    NotImplementedError: if the named implementation cannot do this problem.
  """
  check_arguments(logits, head, transposed)

  def bind(function, **options):
    return lambda logits, head: function(logits, head, transposed=transposed, **options)

  def load(name):
    if name == 'gpu':
      from pallas_kernels.unmask import gpu

      return Kernel(bind(gpu.unmask_gpu), gpu.why_not(logits, head))
    from pallas_kernels.unmask import tpu

    return Kernel(bind(tpu.unmask_tpu, interpret=name == 'interpret'), tpu.why_not(logits, head))

  xla = bind(unmask_reference)
  return dispatch('unmask', implementation, (logits, head), xla=xla, load=load)

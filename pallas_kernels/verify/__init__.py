"""What verifiers decide by, from one read of the logits of all nodes."""

import jax

from pallas_kernels.dispatch import Kernel
from pallas_kernels.dispatch import dispatch
from pallas_kernels.verify.reference import Ingredients as Ingredients
from pallas_kernels.verify.reference import check_arguments
from pallas_kernels.verify.reference import verify_reference

__all__ = ['Ingredients', 'verify', 'why_not']


def verify(
  logits: jax.Array,
  tokens: jax.Array,
  *,
  temperature: jax.Array,
  top_k: jax.Array | None = None,
  top_p: jax.Array | None = None,
  min_p: jax.Array | None = None,
  laws: jax.Array | None = None,
  residual: jax.Array | None = None,
  keys: jax.Array | None = None,
  implementation: str | None = None,
) -> Ingredients:
  """Returns argmax, threshold, log-normaliser, log-probabilities and samples of every node.

  No law is written to memory: p is the softmax of logits / temperature without the tokens below the
  threshold of top-k, top-p and min-p, in that order; ties with the last token kept are kept. At
  temperature 0 it is a 1 at the argmax.

  Args:
    logits: f[B, N, V], the target's, as the model made them; an entry may be -inf.
    tokens: i32[B, N, K], whose log-probabilities after each node are wanted; drafts, usually.
    temperature: f32[B], 0 is greedy.
    top_k: i32[B], 0 is off. None switches it off when compiling.
    top_p: f32[B], 1 is off, or None.
    min_p: f32[B], 0 is off, or None.
    laws: f[B, N, V], logits of the law q that the children of each node were drawn from.
    residual: bool[B, N], nodes to sample from max(p - q, 0), normalised, instead of from p. Without
      `laws` q is a 1 at `tokens[..., 0]`.
    keys: key[B, N] of threefry: a token is sampled at every node, `argmax(log law + g)` with the
      noise g of `jax.random.gumbel(key, (V,))`. None: no sample.
    implementation: None (the best that works on the device), 'xla', 'tpu', 'gpu' or 'interpret'
      (the TPU kernel on any device, slowly).

  Raises:
    ValueError: if shapes disagree.
    NotImplementedError: if the named implementation cannot do this problem.

  Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, equation for
  the residual law; Gumbel-max as in A* Sampling, arXiv:1411.0030.
  """
  check_arguments(logits, tokens, temperature, top_k, top_p, min_p, laws, residual, keys)

  def bind(function, **options):
    def run(logits, tokens, temperature, top_k, top_p, min_p, laws, residual, keys):
      return function(
        logits, tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        laws=laws, residual=residual, keys=keys, **options,
      )  # fmt: skip

    return run

  def load(name):
    reason = why_not(name, logits, laws, keys)
    if name == 'gpu':
      from pallas_kernels.verify import gpu

      return Kernel(bind(gpu.verify_gpu), reason)
    from pallas_kernels.verify import tpu

    return Kernel(bind(tpu.verify_tpu, interpret=name == 'interpret'), reason)

  arrays = (logits, tokens, temperature, top_k, top_p, min_p, laws, residual, keys)
  return dispatch('verify', implementation, arrays, xla=bind(verify_reference), load=load)


def why_not(
  name: str, logits: jax.Array, laws: jax.Array | None = None, keys: jax.Array | None = None
) -> str | None:
  """Returns what keeps the kernel 'tpu', 'gpu' or 'interpret' from a problem, or None."""
  if name == 'gpu':
    from pallas_kernels.verify import gpu as kernel
  else:
    from pallas_kernels.verify import tpu as kernel
  return kernel.why_not(logits, laws, keys)

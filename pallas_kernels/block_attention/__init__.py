"""Attention of a block of new tokens over a cached prefix and over itself under any mask."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention.reference import Prefix as Prefix
from pallas_kernels.block_attention.reference import block_attention_reference
from pallas_kernels.block_attention.reference import check_arguments
from pallas_kernels.dispatch import Kernel
from pallas_kernels.dispatch import dispatch

__all__ = ['Prefix', 'block_attention']


def block_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  prefix: Prefix | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
  window: jax.Array | None = None,
  query_positions: jax.Array | None = None,
  key_positions: jax.Array | None = None,
  prefix_block_size: int = 128,
  implementation: str | None = None,
) -> jax.Array:
  """Returns f[B, T, H, Dh], softmax attention over the prefix and the block.

  One kernel for plain decoding (T = 1), chains, trees, lookahead, Jacobi windows and diffusion
  blocks: they differ in the mask. Slots beyond a row's length weigh exactly nothing, whatever they
  hold. A query that sees nothing at all gets finite numbers without meaning.

  Args:
    queries: f[B, T, H, Dh].
    keys: f[B, Hkv, N, Dh], the block's own keys.
    values: f[B, Hkv, N, Dh].
    mask: bool[B, T, N], what each query may see of the block; or i32[B, T, ceil(N / 32)], the same
      as bits, see `pallas_kernels.masks.pack_mask`.
    prefix: the committed cache, or None if there is none. Every query sees all of it, up to
      `prefix.length` and the window.
    scale: factor on the scores.
    soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
    window: i32[], a query sees positions greater than its own minus this. None: no limit.
    query_positions: i32[B, T], needed with `window`.
    key_positions: i32[B, N], needed with `window`.
    prefix_block_size: slots the XLA form reads at a time; must divide S.
    implementation: None (the best that works on the device), 'xla', 'tpu', 'gpu' (Hopper) or
      'interpret' (the TPU kernel on any device, slowly).

  Raises:
    ValueError: if shapes disagree, or `window` comes without positions.
    NotImplementedError: if the named implementation cannot do this problem.
  """
  check_arguments(queries, keys, values, mask, prefix, window, query_positions, key_positions)
  arrays = (queries, keys, values, mask, prefix, window, query_positions, key_positions)
  options = dict(scale=scale, soft_cap=soft_cap)

  def bind(function, **more):
    def run(queries, keys, values, mask, prefix, window, query_positions, key_positions):
      return function(
        queries, keys, values, mask, prefix,
        window=window, query_positions=query_positions, key_positions=key_positions,
        **options, **more,
      )  # fmt: skip

    return run

  def load(name):
    if name == 'gpu' and queries.dtype == jnp.float32:
      from pallas_kernels.block_attention import gpu_float32

      run = bind(gpu_float32.block_attention_float32)
      return Kernel(run, gpu_float32.why_not(queries, keys, prefix))
    if name == 'gpu':
      from pallas_kernels.block_attention import gpu

      return Kernel(bind(gpu.block_attention_gpu), gpu.why_not(queries, keys, prefix))
    from pallas_kernels.block_attention import tpu

    run = bind(tpu.block_attention_tpu, interpret=name == 'interpret')
    return Kernel(run, tpu.why_not(queries, keys, prefix))

  xla = bind(block_attention_reference, prefix_block_size=prefix_block_size)
  return dispatch('block_attention', implementation, arrays, xla=xla, load=load)

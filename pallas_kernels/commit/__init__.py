"""Appending the accepted nodes of a block to a cache, all layers in place."""

import jax

from pallas_kernels.commit.reference import append as append
from pallas_kernels.commit.reference import check_arguments
from pallas_kernels.commit.reference import commit_reference
from pallas_kernels.dispatch import Kernel
from pallas_kernels.dispatch import dispatch

__all__ = ['append', 'commit']


def commit(
  slots: jax.Array,
  nodes: jax.Array,
  path: jax.Array,
  length: jax.Array,
  count: jax.Array,
  *,
  page_table: jax.Array | None = None,
  scale: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Returns the slots, f[L, B, Hkv, S, Dh] or paged, with each row's path appended at its length.

  Call it for keys and for values. The first `count` slots from `length` on hold the path; further
  ones, up to K, may hold anything; all before are as they were. A contiguous row needs
  `length + K <= S`.

  Args:
    slots: f[L, B, Hkv, S, Dh], or f[L, P, Hkv, page, Dh] with a page table. Donated or carried in a
      loop it is written in place.
    nodes: f[L, B, Hkv, N, Dh], of the block.
    path: i32[B, K], indices of nodes.
    length: i32[B], slots of each row that are valid.
    count: i32[B], how many nodes of the path are kept, 0..K.
    page_table: i32[B, S / page], as in `block_attention.Prefix`; the pages that the path falls
      into must be the row's own.
    scale: f32[L, Hkv], for a cache of 8-bit numbers: a node over its head's scale is stored,
      rounded to nearest and cut to what the dtype holds.
    implementation: None (the best that works on the device), 'xla', 'tpu', 'gpu' or 'interpret'
      (the TPU kernel on any device, slowly).

  Raises:
    ValueError: if shapes disagree.
    NotImplementedError: if the named implementation cannot do this problem.
  """
  check_arguments(slots, nodes, path, length, count, page_table, scale)

  def bind(function, **options):
    def run(slots, nodes, path, length, count, page_table, scale):
      more = dict(page_table=page_table, scale=scale, **options)
      return function(slots, nodes, path, length, count, **more)

    return run

  def load(name):
    if name == 'gpu':
      from pallas_kernels.commit import gpu

      return Kernel(bind(gpu.commit_gpu), gpu.why_not(slots, nodes, page_table))
    from pallas_kernels.commit import tpu

    run = bind(tpu.commit_tpu, interpret=name == 'interpret')
    return Kernel(run, tpu.why_not(slots, nodes, path, page_table))

  arrays = (slots, nodes, path, length, count, page_table, scale)
  return dispatch('commit', implementation, arrays, xla=bind(commit_reference), load=load)

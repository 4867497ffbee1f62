"""Attention of a block of new tokens over a cached prefix and over itself under any mask."""

from pallas_kernels.block_attention.reference import Prefix as Prefix
from pallas_kernels.block_attention.reference import block_attention_reference

__all__ = ['Prefix', 'block_attention']


def block_attention(*args, implementation: str | None = None, **kwargs):
  """Returns f[B, T, H, Dh]; see `block_attention_reference` for arguments and errors.

  `implementation` is None (the best that works on the default device) or 'xla'. Anything else
  raises `NotImplementedError`.
  """
  if implementation not in (None, 'xla'):
    raise NotImplementedError(
      f"block_attention has no {implementation!r} implementation; use None or 'xla'"
    )
  return block_attention_reference(*args, **kwargs)

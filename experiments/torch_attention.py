"""The same attention in PyTorch on a GPU, to compare with; needs torch with CUDA.

Axes: `B` batch, `T` block tokens, `S` slots, `H` query heads, `Hkv` key/value heads, `Dh`
head size.
"""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]


def measure(
  query_shape: tuple[int, int, int, int], num_kv_heads: int, num_slots: int, mask: np.ndarray
) -> dict[str, float | str]:
  """Returns seconds a call by implementation, or why there are none.

  Args:
    query_shape: (B, T, H, Dh).
    num_kv_heads: Hkv.
    num_slots: S, all full.
    mask: bool[B, T, T], what each token sees of the block; it sees all slots.
  """
  batch, num_queries, num_heads, head_dim = query_shape
  long = num_slots + num_queries

  def random(heads, length):
    size = (batch, heads, length, head_dim)
    return torch.randn(size, device='cuda', dtype=torch.bfloat16)

  queries = random(num_heads, num_queries)
  keys, values = random(num_kv_heads, long), random(num_kv_heads, long)
  block = torch.from_numpy(np.array(mask)).cuda()
  seen = torch.ones((batch, num_queries, num_slots), dtype=torch.bool, device='cuda')
  dense = torch.cat([seen, block], dim=2)[:, None]

  def sdpa():
    return functional.scaled_dot_product_attention(
      queries, keys, values, attn_mask=dense, enable_gqa=True
    )

  def make_flex():
    def visible(b, h, q, k):
      del h
      return (k < num_slots) | block[b, q, torch.clamp(k - num_slots, min=0)]

    tree = flex.create_block_mask(visible, batch, None, num_queries, long, device='cuda')
    compiled = torch.compile(flex.flex_attention)
    return lambda: compiled(queries, keys, values, block_mask=tree, enable_gqa=True)

  found: dict[str, float | str] = {}
  makers: dict[str, Callable] = {'torch SDPA, dense mask': lambda: sdpa, 'FlexAttention': make_flex}
  for name, make in makers.items():
    try:
      found[name] = _seconds(make())
    except Exception as error:  # a peer that cannot is a line in the table
      found[name] = ' '.join(str(error).split())[:300]
  return found


def _seconds(call, count=20, repeats=5):
  for _ in range(3):
    call()
  best = float('inf')
  for _ in range(repeats):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
      call()
    end.record()
    torch.cuda.synchronize()
    best = min(best, start.elapsed_time(end) / 1e3 / count)
  return best

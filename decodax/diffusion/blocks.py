"""Where a block ends: semi-autoregressive decoding fills the canvas one block after the other.

Axes: `B` batch, `W` window slots.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from decodax.diffusion.types import BlockRule
from decodax.diffusion.types import View
from decodax.verifiers.laws import check_knob
from decodax.verifiers.laws import per_row


def fixed_blocks(size: int) -> BlockRule:
  """Returns blocks of `size` slots; the last one of a row may be shorter.

  With a size of at least the canvas there is one block; with size 1 decoding goes left to right.

  Raises:
    ValueError: if size < 1.

  Source: LLaDA, arXiv:2502.09992, section 2.4.
  """
  if size < 1:
    raise ValueError(f'a block needs at least one slot: {size=}')
  return BlockRule(width=size, size=size)


def adaptive_blocks(
  size: int,
  delimiter_ids: Sequence[int],
  threshold: float | jax.Array = 0.3,
  *,
  window: int | None = None,
) -> BlockRule:
  """Returns blocks that end where the text does: at a line's end, say.

  On a block's first forward the most probable tokens of the next `window` slots are looked at. If
  the delimiter with the largest probability has at least `threshold`, the block ends with it; else
  it has `size` slots. With an infinite threshold these are `fixed_blocks`.

  Args:
    size: of a block in which no delimiter is expected.
    delimiter_ids: tokens that end a block.
    threshold: f[] or f[B], a probability; may be traced.
    window: slots to look ahead; default `size`.

  Raises:
    ValueError: if size or window < 1, or there are no delimiters.

  Source: AdaBlock-dLLM, arXiv:2509.26432, algorithm 1.
  """
  window = size if window is None else window
  if size < 1 or window < 1:
    raise ValueError(f'a block needs at least one slot: {size=}, {window=}')
  if not len(delimiter_ids):
    raise ValueError('adaptive_blocks needs at least one delimiter id')
  check_knob('threshold', threshold, 0, float('inf'))
  delimiters = jnp.asarray(delimiter_ids, jnp.int32)

  def end(view: View, room: jax.Array) -> jax.Array:
    slot = jnp.arange(view.tokens.shape[1])[None]
    best = jnp.where(view.tokens == view.mask_id, view.summary.best, view.tokens)
    ends = jnp.any(best[:, :, None] == delimiters[None, None], axis=-1)
    ends = ends & (slot < jnp.minimum(room, window)[:, None])
    chance = jnp.where(ends, view.summary.top, -1)
    found = jnp.max(chance, axis=1) >= per_row(threshold, chance)[:, 0]
    length = jnp.where(found, jnp.argmax(chance, axis=1) + 1, size)
    return jnp.clip(length, 1, room).astype(jnp.int32)

  return BlockRule(width=max(size, window), size=size, end=end)

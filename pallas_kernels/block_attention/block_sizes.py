"""Sizes of the blocks that block attention reads: by device where measured, else what fits.

Axes: `R` rows of a matmul, `N` block tokens, `S` slots, `Hkv` key/value heads, `Dh` head size.
"""

from typing import NamedTuple

VMEM_LIMIT = 32 * 2**20  # bytes a TPU kernel may ask for; v5e, v5p, v6e and 7x all have more
_VMEM_BUDGET = 24 * 2**20  # what the arrays below may take of it
_LANES = 128


class Problem(NamedTuple):
  """What block sizes depend on."""

  num_rows: int  # R, padded
  num_tokens: int  # N, padded
  num_kv_heads: int
  head_dim: int
  itemsize: int  # bytes of a query element
  cache_itemsize: int
  num_slots: int  # S, 0 without a prefix
  page_size: int | None = None


class TpuBlockSizes(NamedTuple):
  """How much of the cache one step of the TPU kernel reads."""

  block_kv: int  # slots
  heads: int  # key heads
  num_splits: int = 1  # parts of a prefix that cores work on apart


# device kind -> (slots, splits) to start from; `python -m experiments.tune_kernels` makes it.
TPU_TABLE: dict[str, tuple[int, int]] = {}
_SAFE = (512, 1)
# Chips whose cores are one device: the kernel must leave them something to share out.
_CORES = {'TPU v4': 2, 'TPU v5': 2, 'TPU v5p': 2}


def tpu_block_sizes(kind: str, problem: Problem) -> TpuBlockSizes | None:
  """Returns block sizes for a device kind, or None if not even the smallest fits into memory.

  The table says how many slots to read at a time. Of the pairs (slots, heads) that fit, the one
  that reads most at a time is taken, since a step has a fixed cost of a third of a microsecond.
  Where two cores are one device they get groups of heads, or splits if there are no groups.
  """
  slots, num_splits = TPU_TABLE.get(kind, _SAFE)
  cores = _CORES.get(kind, 1)
  heads_left = [h for h in range(problem.num_kv_heads, 0, -1) if problem.num_kv_heads % h == 0]
  shared = [h for h in heads_left if problem.num_kv_heads // h % cores == 0]
  heads_left, num_splits = (shared, num_splits) if shared else (heads_left, max(num_splits, cores))
  best, best_read = None, 0
  for block_kv in _block_sizes(slots, problem):
    for heads in heads_left:
      if vmem_bytes(problem, block_kv, heads) <= _VMEM_BUDGET:
        if block_kv * heads > best_read:
          best, best_read = TpuBlockSizes(block_kv, heads, num_splits), block_kv * heads
        break
  return best


def vmem_bytes(problem: Problem, block_kv: int, heads: int) -> int:
  """Returns the bytes of vector memory that a step needs, two buffers for all that is fetched."""
  head_dim = _round_up(problem.head_dim, _LANES)
  rows, tokens = problem.num_rows, problem.num_tokens
  fetched = 2 * block_kv * heads * head_dim * problem.cache_itemsize
  fetched += 2 * tokens * heads * head_dim * problem.itemsize
  fetched += 2 * rows * heads * head_dim * problem.itemsize  # queries and output
  fetched += 2 * rows * _LANES * 4  # bits and positions
  state = heads * rows * (head_dim + 2 * _LANES) * 4
  scores = 3 * rows * max(_round_up(block_kv, _LANES), _round_up(tokens, _LANES)) * 4
  widened = 2 * block_kv * head_dim * problem.itemsize * (problem.cache_itemsize == 1)
  return 2 * fetched + state + scores + widened


def _block_sizes(slots, problem):
  """Yields numbers of slots from the wanted one down: whole pages, or multiples of a tile."""
  if problem.page_size is not None:
    pages = max(slots // problem.page_size, 1)
    while pages:
      # A positions block is whole tiles of lanes, unless it is all there is.
      if pages == 1 or (pages * problem.page_size) % _LANES == 0:
        yield pages * problem.page_size
      pages //= 2
    return
  total = max(problem.num_slots, _LANES)
  while slots >= _LANES:
    yield min(slots, total)
    slots //= 2


def _round_up(value, multiple):
  return -(-value // multiple) * multiple


class GpuBlockSizes(NamedTuple):
  """How the GPU kernel cuts up the cache."""

  block_kv: int  # slots of a tile
  stages: int  # tiles on their way
  num_splits: int  # thread blocks that share a row's prefix
  narrow_stages: int = 2  # of an 8-bit cache: its tiles on their way; `stages` are then widened


_SHARED_MEMORY = 200 * 2**10  # bytes of a Hopper thread block's 227 KiB
_MULTIPROCESSORS = 132
_LEAST_SPLIT = 512  # slots that are worth a thread block

# device kind -> thread blocks wanted for each multiprocessor; `experiments.tune_kernels` makes it.
GPU_TABLE: dict[str, int] = {}
_SAFE_WAVES = 1
_FULL = 0.85  # of a wave of thread blocks
_SHORT = 4096  # slots; with fewer, padding the block itself to a large tile would show


def gpu_block_sizes(
  kind: str,
  head_dim: int,
  num_blocks: int,
  num_slots: int,
  page_size: int | None,
  narrow: bool = False,
) -> GpuBlockSizes:
  """Returns sizes for a device kind: full shared memory, and splits enough to fill the device.

  Args:
    kind: as in `jax.Device.device_kind`.
    head_dim: Dh.
    num_blocks: thread blocks without splits: rows, key heads and tiles of queries.
    num_slots: S.
    page_size: of a paged cache.
    narrow: whether the cache holds 8-bit numbers.
  """
  block_kv = 128 if head_dim <= 128 and num_slots > _SHORT and not narrow else 64
  for size in (page_size, num_slots):
    if size and size % block_kv:
      block_kv = 64
  tile = 2 * block_kv * head_dim * 2  # keys and values
  queries = 2 * 64 * head_dim * 2
  splits = _num_splits(num_blocks, num_slots, GPU_TABLE.get(kind, _SAFE_WAVES))
  if narrow:
    left = _SHARED_MEMORY - queries
    stages = 2 if 2 * tile + tile // 2 <= left else 1
    return GpuBlockSizes(block_kv, stages, splits, min(4, 2 * (left - stages * tile) // tile))
  stages = max(2, min(4, (_SHARED_MEMORY - queries) // tile))
  return GpuBlockSizes(block_kv, stages, splits)


class Float32BlockSizes(NamedTuple):
  """How the GPU kernel for float32 cuts up its work."""

  rows: int  # of queries
  block_kv: int  # slots of a tile
  num_splits: int  # thread blocks that share a row's prefix
  num_warps: int
  stages: int = 2  # tiles on their way


def float32_block_sizes(
  kind: str, head_dim: int, num_rows: int, num_pairs: int, num_slots: int
) -> Float32BlockSizes:
  """Returns sizes for a device kind: tiles that registers hold, and splits that fill the device.

  Args:
    kind: as in `jax.Device.device_kind`.
    head_dim: Dh.
    num_rows: rows of queries of one key head.
    num_pairs: rows of the batch times key heads.
    num_slots: S.
  """
  rows = 16 if num_rows <= 16 or head_dim > 128 else 32
  waves = 2 * GPU_TABLE.get(kind, _SAFE_WAVES)  # they are small
  splits = _num_splits(num_pairs * -(-num_rows // rows), num_slots, waves)
  return Float32BlockSizes(rows, 32, splits, rows // 4)


def _num_splits(num_blocks, num_slots, waves):
  """Returns the fewest splits that make so many waves of thread blocks, the last nearly full."""
  fullest, best = 0.0, 1
  for splits in range(1, max(num_slots // _LEAST_SPLIT, 1) + 1):
    total = num_blocks * splits
    needed = max(-(-total // _MULTIPROCESSORS), waves)
    full = total / (needed * _MULTIPROCESSORS)
    if full >= _FULL:
      return splits
    if full > fullest:
      fullest, best = full, splits
  return best

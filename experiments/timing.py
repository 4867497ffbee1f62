"""How long a call takes on a device, and what the device can do at most. Needs jax alone."""

from collections.abc import Callable
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LEAST_SECONDS = 0.05  # of a measurement: so many calls are queued that their start does not count


class Ceilings(NamedTuple):
  """What was measured of a device."""

  device: str
  copy_bytes_per_second: float  # read and written, of x + 1
  flops_per_second: float  # of a square matrix product


def seconds_per_call(call: Callable, carry, *, repeats: int = 5) -> float:
  """Returns the shortest mean time of a call, of `repeats` queues of calls.

  Args:
    call: carry -> carry, compiled; calls follow each other without waiting for the host.
    carry: what the first call gets.
    repeats: queues that are measured.
  """
  carry = jax.block_until_ready(call(carry))
  start = time.perf_counter()
  carry = jax.block_until_ready(call(carry))
  once = max(time.perf_counter() - start, 1e-7)
  count = max(1, min(1000, round(_LEAST_SECONDS / once)))
  best = float('inf')
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(count):
      carry = call(carry)
    carry = jax.block_until_ready(carry)
    best = min(best, (time.perf_counter() - start) / count)
  return best


def measure_ceilings() -> Ceilings:
  """Returns what the default device copies and multiplies at most."""
  on_cpu = jax.default_backend() == 'cpu'
  size = 2**26 if on_cpu else 2**30
  dtype, width = (jnp.float32, 2048) if on_cpu else (jnp.bfloat16, 8192)
  copied = jnp.zeros((size // 4,), jnp.float32)
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: fresh memory is dear on a CPU
  square = jnp.full((width, width), 1 / width, dtype)
  multiply = jax.jit(lambda x: (x @ square).astype(dtype))
  return Ceilings(
    device=str(jax.devices()[0].device_kind),
    copy_bytes_per_second=2 * size / seconds_per_call(copy, copied),
    flops_per_second=2 * width**3 / seconds_per_call(multiply, square),
  )

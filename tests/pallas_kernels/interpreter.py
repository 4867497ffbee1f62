"""The interpreter of TPU kernels with all its checks on, and programs compiled in a hurry."""

from collections.abc import Callable

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


def strict() -> pltpu.InterpretParams:
  """Returns the interpreter that looks for races, stray reads and what was never written."""
  return pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise'
  )


def assert_no_races() -> None:
  """Asserts that the kernel interpreted last had none."""
  races = interpret_pallas_call.races
  assert races is not None and not races.races_found


def compiled(function: Callable) -> Callable:
  """Returns the function jitted without optimisation: it runs once, and compiling takes longer."""
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})

"""What every test runs under: strict numerics, and compiled programs kept between runs."""

from importlib import metadata
import os
import pathlib

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Before jax starts, and in the environment, so that the subprocesses of a test inherit it.
# Without NPROC, collectives among more virtual devices than cores can deadlock.
os.environ['NPROC'] = '8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_ROOT / '.cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

# Most of the time would go into compiling small programs well. They are compiled quickly instead;
# with XLA_FLAGS set, be it to nothing, as users compile them. XLA ends the process at a flag that
# it does not know, so the second one, a matter of XLA's inside, is for versions that have it.
_QUICKLY = ['--xla_backend_optimization_level=0']
if metadata.version('jaxlib').startswith('0.10.'):
  _QUICKLY.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(_QUICKLY))

# Parallel workers inherit a width that readline has set; tables are as wide as they need.
for name in ('COLUMNS', 'LINES'):
  os.environ.pop(name, None)

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')

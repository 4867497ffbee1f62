"""Masked diffusion: one denoising loop, policies, block rules and caches to put into it."""

from decodax.diffusion import automata
from decodax.diffusion import grammars
from decodax.diffusion import limits
from decodax.diffusion import policies
from decodax.diffusion.blocks import adaptive_blocks
from decodax.diffusion.blocks import fixed_blocks
from decodax.diffusion.caches import Deviation
from decodax.diffusion.caches import audited
from decodax.diffusion.caches import block_causal_cache
from decodax.diffusion.caches import delayed_cache
from decodax.diffusion.caches import dual_cache
from decodax.diffusion.caches import no_cache
from decodax.diffusion.caches import prefix_cache
from decodax.diffusion.constraints import constrained
from decodax.diffusion.free_draft import free_draft
from decodax.diffusion.loop import Setup
from decodax.diffusion.loop import denoise
from decodax.diffusion.loop import denoise_step
from decodax.diffusion.types import BlockRule
from decodax.diffusion.types import CacheRule
from decodax.diffusion.types import DenoiseResult
from decodax.diffusion.types import DenoiseState
from decodax.diffusion.types import DenoiseStats
from decodax.diffusion.types import MaskedModel
from decodax.diffusion.types import Params
from decodax.diffusion.types import Policy
from decodax.diffusion.types import Selection
from decodax.diffusion.types import View

__all__ = [
  'BlockRule',
  'CacheRule',
  'DenoiseResult',
  'DenoiseState',
  'DenoiseStats',
  'Deviation',
  'MaskedModel',
  'Params',
  'Policy',
  'Selection',
  'Setup',
  'View',
  'adaptive_blocks',
  'audited',
  'automata',
  'block_causal_cache',
  'constrained',
  'delayed_cache',
  'denoise',
  'denoise_step',
  'dual_cache',
  'fixed_blocks',
  'free_draft',
  'grammars',
  'limits',
  'no_cache',
  'policies',
  'prefix_cache',
]

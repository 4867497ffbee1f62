"""decodax: decoding faster than one token per forward pass, as pure functions in JAX."""

from decodax import controllers
from decodax import diffusion
from decodax import drafters
from decodax import kv_cache
from decodax import noise
from decodax import sampling
from decodax import static_trees
from decodax import theory
from decodax import trees
from decodax import verifiers
from decodax.decode import check_compatible
from decodax.decode import decode
from decodax.decode import finish
from decodax.decode import generate
from decodax.decode import init_state
from decodax.decode import make_step_fn
from decodax.decode import prefill
from decodax.decode import python_while_loop
from decodax.decode import speculative_step
from decodax.request import make_request
from decodax.types import Candidates
from decodax.types import DecodeResult
from decodax.types import DecodeState
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Model
from decodax.types import ModelOutput
from decodax.types import Observation
from decodax.types import Params
from decodax.types import Proposal
from decodax.types import Request
from decodax.types import Result
from decodax.types import RoundInfo
from decodax.types import Sampling
from decodax.types import Stats
from decodax.types import Verdict
from decodax.types import Verifier

__version__ = '0.1.0'

__all__ = [
  'Candidates',
  'DecodeResult',
  'DecodeState',
  'DraftShape',
  'Drafter',
  'Model',
  'ModelOutput',
  'Observation',
  'Params',
  'Proposal',
  'Request',
  'Result',
  'RoundInfo',
  'Sampling',
  'Stats',
  'Verdict',
  'Verifier',
  'check_compatible',
  'controllers',
  'decode',
  'diffusion',
  'drafters',
  'finish',
  'generate',
  'init_state',
  'kv_cache',
  'make_request',
  'make_step_fn',
  'noise',
  'prefill',
  'python_while_loop',
  'sampling',
  'speculative_step',
  'static_trees',
  'theory',
  'trees',
  'verifiers',
]

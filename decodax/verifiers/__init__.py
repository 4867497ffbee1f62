"""Rules that accept drafted tokens. One file a rule; `BY_NAME` lists them."""

from decodax.types import Verifier
from decodax.verifiers.coupled import coupled
from decodax.verifiers.greedy import greedy
from decodax.verifiers.speculative import speculative

BY_NAME: dict[str, Verifier] = {rule.name: rule for rule in (greedy, coupled, speculative)}

__all__ = ['BY_NAME', 'coupled', 'greedy', 'speculative']

"""Rules that accept drafted tokens. One file a rule; `BY_NAME` lists them."""

from decodax.types import Verifier
from decodax.verifiers.block import block
from decodax.verifiers.coupled import coupled
from decodax.verifiers.divergence import fuzzy
from decodax.verifiers.enriched import enriched
from decodax.verifiers.greedy import greedy
from decodax.verifiers.greedy_draft import greedy_draft
from decodax.verifiers.judge import divergence_judge
from decodax.verifiers.judge import judge
from decodax.verifiers.kseq import kseq
from decodax.verifiers.lenient import lenient
from decodax.verifiers.mentored import mentored
from decodax.verifiers.near_best import near_best
from decodax.verifiers.optimal import optimal
from decodax.verifiers.reflective import reflective
from decodax.verifiers.sample_and_match import sample_and_match
from decodax.verifiers.specinfer import specinfer
from decodax.verifiers.specinfer import specinfer_drafters
from decodax.verifiers.speculative import speculative
from decodax.verifiers.threshold import threshold
from decodax.verifiers.traversal import traversal
from decodax.verifiers.trusting import trusting
from decodax.verifiers.typical import typical
from decodax.verifiers.without_replacement import without_replacement

_LOSSLESS = (
  greedy,
  coupled,
  sample_and_match,
  speculative,
  block,
  specinfer,
  specinfer_drafters,
  without_replacement,
  kseq,
  optimal(),
  greedy_draft,
  traversal,
)
_LOSSY = (  # with their default knobs; `reflective` needs a rule and a prompt
  lenient(),
  typical(),
  fuzzy(),
  mentored(),
  enriched(),
  judge(),
  divergence_judge(),
  threshold(),
  near_best(),
  trusting,
)

BY_NAME: dict[str, Verifier] = {rule.name: rule for rule in (*_LOSSLESS, *_LOSSY)}

__all__ = [
  'BY_NAME',
  'block',
  'coupled',
  'divergence_judge',
  'enriched',
  'fuzzy',
  'greedy',
  'greedy_draft',
  'judge',
  'kseq',
  'lenient',
  'mentored',
  'near_best',
  'optimal',
  'reflective',
  'sample_and_match',
  'specinfer',
  'specinfer_drafters',
  'speculative',
  'threshold',
  'traversal',
  'trusting',
  'typical',
  'without_replacement',
]

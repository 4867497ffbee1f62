"""What decoding faster than one token per forward pass can gain: closed forms, bounds and fits.

Axes: `B` any leading axes, `G` draft positions, `N` tree nodes, `V` vocabulary, `K` drafts of one
node, `M` measured points, `F` factors of a fit.

p is always the target's law, q the draft's, and here a law is a probability vector. Every function
is pure and vectorised over its leading axes, and computes in the dtype of its inputs, though never
in less than float32. *Acceptance* is the probability, in [0, 1], that at least one draft of a node
is kept. *Tokens per call* are emitted tokens per forward pass of the target: the accepted drafts
and the one token that every pass yields anyway. Times are milliseconds.
"""

from decodax.theory.fits import InformationSurplus
from decodax.theory.fits import LogLinearFit
from decodax.theory.fits import combine_loglinear
from decodax.theory.fits import fit_loglinear
from decodax.theory.fits import information_surplus
from decodax.theory.one_draft import LenientOutput
from decodax.theory.one_draft import coupled_acceptance
from decodax.theory.one_draft import lenient_output
from decodax.theory.one_draft import overlap
from decodax.theory.one_draft import total_variation
from decodax.theory.several_drafts import greedy_draft_acceptance
from decodax.theory.several_drafts import kseq_acceptance
from decodax.theory.several_drafts import kseq_factor
from decodax.theory.several_drafts import multi_step_acceptance
from decodax.theory.several_drafts import optimal_acceptance_with_replacement
from decodax.theory.several_drafts import optimal_acceptance_without_replacement
from decodax.theory.several_drafts import recursive_rejection_acceptance
from decodax.theory.several_drafts import recursive_rejection_acceptance_sampled
from decodax.theory.several_drafts import specinfer_acceptance
from decodax.theory.speed import CostCurve
from decodax.theory.speed import call_time_ms
from decodax.theory.speed import expected_tokens
from decodax.theory.speed import expected_tokens_by_depth
from decodax.theory.speed import expected_tokens_controlled
from decodax.theory.speed import expected_tokens_tree
from decodax.theory.speed import markov_tree_value
from decodax.theory.speed import ops_factor
from decodax.theory.speed import optimal_draft_length
from decodax.theory.speed import path_probabilities
from decodax.theory.speed import stationary_law
from decodax.theory.speed import walltime_general
from decodax.theory.speed import walltime_speedup
from decodax.theory.speed import worth_it

__all__ = [
  'CostCurve',
  'InformationSurplus',
  'LenientOutput',
  'LogLinearFit',
  'call_time_ms',
  'combine_loglinear',
  'coupled_acceptance',
  'expected_tokens',
  'expected_tokens_by_depth',
  'expected_tokens_controlled',
  'expected_tokens_tree',
  'fit_loglinear',
  'greedy_draft_acceptance',
  'information_surplus',
  'kseq_acceptance',
  'kseq_factor',
  'lenient_output',
  'markov_tree_value',
  'multi_step_acceptance',
  'ops_factor',
  'optimal_acceptance_with_replacement',
  'optimal_acceptance_without_replacement',
  'optimal_draft_length',
  'overlap',
  'path_probabilities',
  'recursive_rejection_acceptance',
  'recursive_rejection_acceptance_sampled',
  'specinfer_acceptance',
  'stationary_law',
  'total_variation',
  'walltime_general',
  'walltime_speedup',
  'worth_it',
]

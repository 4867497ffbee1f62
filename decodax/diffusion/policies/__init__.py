"""Unmasking policies: which slots to fill in a step. One small file each."""

from decodax.diffusion.policies.credit import credit
from decodax.diffusion.policies.dimple import dimple
from decodax.diffusion.policies.dream import ancestral
from decodax.diffusion.policies.dream import dream
from decodax.diffusion.policies.dream import first_hitting
from decodax.diffusion.policies.editing import editing
from decodax.diffusion.policies.entropy_bound import entropy_bound
from decodax.diffusion.policies.factor import factor
from decodax.diffusion.policies.hierarchy import hierarchy
from decodax.diffusion.policies.klass import klass
from decodax.diffusion.policies.learned_filter import Filter
from decodax.diffusion.policies.learned_filter import Observed
from decodax.diffusion.policies.learned_filter import filter_logits
from decodax.diffusion.policies.learned_filter import init_filter
from decodax.diffusion.policies.learned_filter import learned_filter
from decodax.diffusion.policies.learned_filter import oracle
from decodax.diffusion.policies.llada import llada
from decodax.diffusion.policies.local_leap import local_leap
from decodax.diffusion.policies.maskgit import maskgit
from decodax.diffusion.policies.pair_filter import NUM_PAIR_FACTS
from decodax.diffusion.policies.pair_filter import NUM_SLOT_FACTS
from decodax.diffusion.policies.pair_filter import Evidence
from decodax.diffusion.policies.pair_filter import PairFilter
from decodax.diffusion.policies.pair_filter import gather_evidence
from decodax.diffusion.policies.pair_filter import init_pair_filter
from decodax.diffusion.policies.pair_filter import pair_filter_logits
from decodax.diffusion.policies.pipelined import pipelined
from decodax.diffusion.policies.remdm import remdm
from decodax.diffusion.policies.threshold import entropy_threshold
from decodax.diffusion.policies.threshold import threshold
from decodax.diffusion.policies.wino import wino

__all__ = [
  'NUM_PAIR_FACTS',
  'NUM_SLOT_FACTS',
  'Evidence',
  'Filter',
  'Observed',
  'PairFilter',
  'ancestral',
  'credit',
  'dimple',
  'dream',
  'editing',
  'entropy_bound',
  'entropy_threshold',
  'factor',
  'filter_logits',
  'first_hitting',
  'gather_evidence',
  'hierarchy',
  'init_filter',
  'init_pair_filter',
  'klass',
  'learned_filter',
  'llada',
  'local_leap',
  'maskgit',
  'oracle',
  'pair_filter_logits',
  'pipelined',
  'remdm',
  'threshold',
  'wino',
]

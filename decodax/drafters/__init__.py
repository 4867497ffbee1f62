"""Drafters: one file each. A drafter is a function that returns a `Drafter`.

To add one, copy `ngram.py` (deterministic, no model) or `early_exit.py` (a model drafts).
"""

from decodax.drafters.draft_model import draft_model
from decodax.drafters.early_exit import early_exit
from decodax.drafters.ngram import ngram
from decodax.drafters.plain import plain

__all__ = ['draft_model', 'early_exit', 'ngram', 'plain']

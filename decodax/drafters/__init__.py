"""Drafters: a drafter is a function that returns a `Drafter`, in a file of its own.

To add one, copy `ngram.py` (deterministic, no model). A model that can read the nodes of a growing
tree needs an `Expander` only (`expander.py`): chains and trees of every kind work with it.
"""

from decodax.drafters import guesses
from decodax.drafters.chain import chain_drafter
from decodax.drafters.draft_model import draft_model
from decodax.drafters.dynamic_tree import dyspec_tree
from decodax.drafters.dynamic_tree import eagle2_tree
from decodax.drafters.dynamic_tree import stochastic_beam_tree
from decodax.drafters.early_exit import early_exit
from decodax.drafters.expander import exit_expander
from decodax.drafters.expander import model_expander
from decodax.drafters.input_guided import input_guided
from decodax.drafters.jacobi import jacobi
from decodax.drafters.lexical_units import lexical_units
from decodax.drafters.lookahead import lookahead
from decodax.drafters.masked_draft import masked_draft
from decodax.drafters.ngram import ngram
from decodax.drafters.plain import plain
from decodax.drafters.prompt_tokens import prompt_tokens
from decodax.drafters.several import several_chains
from decodax.drafters.sjd import sjd
from decodax.drafters.static_tree import static_tree

__all__ = [
  'chain_drafter',
  'draft_model',
  'dyspec_tree',
  'eagle2_tree',
  'early_exit',
  'exit_expander',
  'guesses',
  'input_guided',
  'jacobi',
  'lexical_units',
  'lookahead',
  'masked_draft',
  'model_expander',
  'ngram',
  'plain',
  'prompt_tokens',
  'sjd',
  'several_chains',
  'static_tree',
  'stochastic_beam_tree',
]

"""No drafting: a round is one target call and one token."""

from decodax.decode import root_tokens
from decodax.trees import root_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape


def plain() -> Drafter:
  """Returns the drafter that proposes nothing, which makes the loop plain decoding."""
  return Drafter(
    shape=DraftShape(num_nodes=1, max_depth=0, candidates=Candidates.NONE),
    init=stateless_init,
    prefill=stateless_prefill,
    propose=lambda params, state, **_: (root_proposal(root_tokens(state)), ()),
    observe=stateless_observe,
  )


def stateless_init(params, request, capacity):
  """Returns (), the state of a drafter that keeps none."""
  del params, request, capacity
  return ()


def stateless_prefill(params, drafter_state, tokens, positions, count, output):
  """Returns the state as it is: nothing to learn from the prompt."""
  del params, tokens, positions, count, output
  return drafter_state


def stateless_observe(params, drafter_state, observation, state):
  """Returns the state as it is: nothing to learn from a round."""
  del params, observation, state
  return drafter_state

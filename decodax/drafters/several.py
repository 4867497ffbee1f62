"""Several models draft a chain each, side by side: the trunks of one tree.

Axes: `B` batch, `D` drafts of a chain, `N = 1 + chains * D` nodes, `V` vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decodax.decode import root_tokens
from decodax.drafters.chain import chain_drafter
from decodax.drafters.expander import Expander
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Proposal

_NEXT_CHAIN = 1 << 20  # between the node numbers of two chains, for their noise


def several_chains(expanders: Sequence[Expander], *, num_drafts: int) -> Drafter:
  """Returns a drafter that proposes one chain of each model; all of them start at the root.

  Node order is the order of the models, and that is the order in which a rule tries the first
  tokens: give the best model first. Under coupled verification chains that agree are tried once.

  `Params.drafter` is a tuple with the parameters of each model, () for an early exit.

  Args:
    expanders: the models that draft, at least two, over one vocabulary.
    num_drafts: D, tokens of each chain.

  Raises:
    ValueError: if there are fewer than two, their vocabularies differ, or num_drafts < 1.

  Source: SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based
  Speculative Inference and Verification, arXiv:2305.09781, merge-based tree construction.
  """
  if len(expanders) < 2:
    raise ValueError(f'several_chains takes at least two models, got {len(expanders)}')
  sizes = [expander.vocab_size for expander in expanders]
  if len(set(sizes)) > 1:
    raise ValueError(f'all models must draft over one vocabulary, got sizes {sizes}')
  chains = [chain_drafter(expander, num_drafts=num_drafts, may_lag=True) for expander in expanders]
  # For each chain, its nodes in the tree: the root, then its own.
  nodes = [
    np.concatenate([[0], 1 + num_drafts * i + np.arange(num_drafts)]) for i in range(len(chains))
  ]
  parents = np.concatenate([[-1], *(own[:-1] for own in nodes)]).astype(np.int32)
  shape = DraftShape(
    num_nodes=len(parents),
    max_depth=num_drafts,
    candidates=Candidates.SEVERAL_DRAFTERS,
    parents=parents,
    vocab_size=sizes[0],
  )

  def init(params, request, capacity):
    return tuple(
      chain.init(own, request, capacity)
      for chain, own in zip(chains, _each(params, chains), strict=True)
    )

  def prefill(params, drafter_state, *chunk):
    return tuple(
      chain.prefill(own, its_state, *chunk)
      for chain, own, its_state in zip(chains, _each(params, chains), drafter_state, strict=True)
    )

  def propose(params, state, *, noise_fn, with_laws):
    proposals, states = [], []
    for index, (chain, own) in enumerate(zip(chains, _each(params, chains), strict=True)):

      def noise(keys, vocab_size, depth, node=0, first=index * _NEXT_CHAIN):
        return noise_fn(keys, vocab_size, depth, first + node)

      its_state = state._replace(drafter=state.drafter[index])
      proposal, after = chain.propose(own, its_state, noise_fn=noise, with_laws=with_laws)
      proposals.append(proposal)
      states.append(after)
    return _merge(root_tokens(state), proposals, parents), tuple(states)

  def observe(params, drafter_state, observation, state):
    return tuple(
      chain.observe(own, its_state, _seen_by(observation, its_nodes), state)
      for chain, own, its_state, its_nodes in zip(
        chains, _each(params, chains), drafter_state, nodes, strict=True
      )
    )

  return Drafter(shape=shape, init=init, prefill=prefill, propose=propose, observe=observe)


def _each(params, chains):
  """Returns the parameters as each chain is to see them."""
  if not isinstance(params.drafter, tuple) or len(params.drafter) != len(chains):
    raise ValueError(
      f'Params.drafter must be a tuple with the parameters of each of the {len(chains)} models '
      f'that draft, () for an early exit; got {type(params.drafter).__name__}'
    )
  return [params._replace(drafter=own) for own in params.drafter]


def _merge(root, proposals, parents) -> Proposal:
  """Returns the tree of all chains, with the law that each node was itself drawn from."""
  laws = None
  if proposals[0].laws is not None:
    own = [proposal.laws[:, :-1] for proposal in proposals]  # the last node has no children
    laws = jnp.concatenate([jnp.zeros_like(own[0][:, :1]), *own], axis=1)
  tokens = jnp.concatenate([root[:, None], *(p.tokens[:, 1:] for p in proposals)], axis=1)
  return Proposal(
    tokens=tokens,
    parents=jnp.broadcast_to(jnp.asarray(parents)[None], tokens.shape),
    valid=jnp.ones(tokens.shape, bool),
    laws=laws,
  )


def _seen_by(observation, nodes):
  """Returns what a round shows the drafter of the chain with these nodes i32[D + 1].

  A chain that was not taken had nothing accepted; its model will read what was emitted instead.
  """
  verdict = observation.verdict
  took_it = (verdict.num_accepted > 0) & (verdict.path[:, 1] == nodes[1])
  depth = jnp.arange(len(nodes), dtype=jnp.int32)

  def own(array):
    return array[:, nodes]

  return observation._replace(
    proposal=jax.tree.map(own, observation.proposal)._replace(
      parents=jnp.broadcast_to(depth[None] - 1, (verdict.path.shape[0], len(nodes)))
    ),
    verdict=verdict._replace(
      path=jnp.broadcast_to(depth[None], verdict.path.shape),
      num_accepted=jnp.where(took_it, verdict.num_accepted, 0),
    ),
    output=jax.tree.map(own, observation.output),
    logits=None if observation.logits is None else own(observation.logits),
  )

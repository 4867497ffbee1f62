"""Self-speculation by early exit: the target's first layers draft for all of them.

Axes: `B` batch, `D` drafts.
"""

import jax.numpy as jnp

from decodax.decode import root_tokens
from decodax.drafters.chain import draw
from decodax.drafters.chain import extend_chain
from decodax.drafters.plain import stateless_init
from decodax.drafters.plain import stateless_observe
from decodax.drafters.plain import stateless_prefill
from decodax.trees import chain_proposal
from decodax.types import Candidates
from decodax.types import Drafter
from decodax.types import DraftShape
from decodax.types import Model


def early_exit(exit_model: Model, *, num_drafts: int = 3) -> Drafter:
  """Returns a drafter that runs a truncated target on the target's own parameters and cache.

  Args:
    exit_model: the target cut short: its `extend` reads the target's cache and parameters and runs
      only the first layers. With `models`: `as_model(transformer, exit_layer=...)`.
    num_drafts: D, tokens drafted a round.

  Raises:
    ValueError: if num_drafts < 1, or the model has no scratch blocks.

  Source: Draft & Verify, arXiv:2309.08168; LayerSkip, arXiv:2404.16710.
  """
  if num_drafts < 1:
    raise ValueError(f'num_drafts must be at least 1: {num_drafts=}')
  init_scratch = exit_model.init_scratch
  if init_scratch is None:
    raise ValueError('early_exit needs a model with init_scratch, to draft without committing')

  def propose(params, state, *, noise_fn, with_laws):
    target = params.target
    root = root_tokens(state)
    batch_size = root.shape[0]
    scratch = init_scratch(target, batch_size, num_drafts)
    mask = jnp.broadcast_to(jnp.arange(num_drafts) == 0, (batch_size, 1, num_drafts))
    output, scratch = exit_model.extend(
      target, state.cache, root[:, None], state.length[:, None] - 1, mask,
      scratch=scratch, offset=0,
    )  # fmt: skip
    logits = exit_model.unembed(target, output.hidden)[:, 0]
    options = dict(noise_fn=noise_fn, with_laws=with_laws)
    first = draw(state, logits, state.seen, jnp.int32(1), **options)
    drafts, laws, _ = extend_chain(
      target, state, first, scratch,
      model=exit_model, cache=state.cache, num_drafts=num_drafts, num_nodes=num_drafts,
      offset=1, **options,
    )  # fmt: skip
    return chain_proposal(root, drafts, jnp.full_like(root, num_drafts), laws), state.drafter

  return Drafter(
    shape=DraftShape(num_nodes=num_drafts + 1, max_depth=num_drafts, candidates=Candidates.SAMPLED),
    init=stateless_init,
    prefill=stateless_prefill,
    propose=propose,
    observe=stateless_observe,
  )

"""An independent draft model: trained on text, or made to agree with the target.

The recipe of FastDraft is this objective three times: on text, on text of the domain, and on what
the target has written (`train.regenerate`), each starting from the one before (`init_from`).
DistillSpec is the last of them with a divergence in place of the text, and with the draft's own
text mixed in. Its named variants:

  SeqKD          data the target has written, divergence='labels'
  supervised KD  divergence='forward_kl'
  ImitKD         divergence='forward_kl', on_policy=0.5
  f-distill      divergence='total_variation', on_policy=0.5
  on-policy GKD  divergence='reverse_kl' or 'jensen_shannon', on_policy=1.0

Which is best depends on the text and on the temperature of decoding: choose by real tokens/call.

Source: FastDraft, arXiv:2411.11055; DistillSpec, arXiv:2310.08461.
"""

from flax import nnx
import jax
import jax.numpy as jnp

import decodax
from decodax import drafters
from decodax import verifiers
from models.config import TransformerConfig
from models.draft_lm import DraftLM
from models.draft_lm import draft_lm_expander
from models.draft_lm import draft_lm_model
from models.heads.vocabulary import make_vocabulary
from train.objective import Loss
from train.objective import Objective
from train.objectives import _heads
from train.tape import Batch


def make_objective(
  *,
  hidden_size: int = 64,
  num_layers: int = 2,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  intermediate_size: int = 128,
  draft_vocab_size: int | None = None,
  divergence: str = 'labels',
  on_policy: float = 0.0,
  prompt_length: int = 32,
  temperature: float = 1.0,
  num_drafts: int = 4,
  tree_nodes: int = 0,
  beam: int = 4,
) -> Objective:
  """Returns the loss of a draft model's law of the next token.

  Args:
    hidden_size: D of the draft model.
    num_layers: L.
    num_heads: query heads; D must be a multiple.
    num_kv_heads: key/value heads.
    intermediate_size: of the MLP.
    draft_vocab_size: tokens that are read and drafted; None is all.
    divergence: 'labels' learns the text; else a name of `losses.DIVERGENCES`, against the target.
    on_policy: the fraction of rows that the draft model writes itself; 1 is on-policy distillation.
    prompt_length: tokens of the text that it goes on from.
    temperature: at which it writes.
    num_drafts: depth of drafts.
    tree_nodes: nodes verified a round when decoding; 0 is a chain.
    beam: nodes of a tree read at a time.

  Raises:
    ValueError: if `on_policy` is no fraction, or text the draft model wrote were to be learnt as it
      stands.
  """
  loss_between = _heads.divergence_of(divergence)
  if not 0 <= on_policy <= 1:
    raise ValueError(f'on_policy must be 0 to 1: {on_policy=}')
  if on_policy and loss_between is None:
    raise ValueError('with on_policy text a divergence is needed: its own text teaches nothing')

  def init(rngs, target, token_counts):
    config = TransformerConfig(
      vocab_size=target.config.vocab_size,
      hidden_size=hidden_size,
      num_layers=num_layers,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=hidden_size // num_heads,
      intermediate_size=intermediate_size,
      max_position=target.config.max_position,
      tie_embeddings=True,
    )
    vocabulary = make_vocabulary(token_counts, draft_vocab_size)
    return DraftLM(config, rngs=rngs, vocabulary=vocabulary, dtype=target.dtype)

  def loss(head, target, tape, rng_key, step) -> Loss:
    del rng_key, step
    hidden = head(tape.tokens, tape.positions, tape.mask()).hidden
    teacher = _heads.teach(tape, target, head.vocabulary)
    depth = _heads.compare_at(tape, teacher, head.draft_logits, hidden, 1, loss_between)
    return _heads.total_loss([depth], [1.0])

  def rewrite(head, target, batch, rng_key, step) -> Batch:
    del target, step
    own = write(head, batch, rng_key, prompt_length=prompt_length, temperature=temperature)
    rows = jax.random.bernoulli(jax.random.fold_in(rng_key, 1), on_policy, batch.tokens.shape[:1])
    return jax.tree.map(lambda a, b: jnp.where(rows[:, None], a, b), own, batch)

  def make_drafter(head, target):
    del target
    return _heads.make_drafter(
      draft_lm_expander(head), num_drafts=num_drafts, tree_nodes=tree_nodes, beam=beam
    )

  return Objective(
    init, loss, make_drafter, _heads.verifier_for(tree_nodes),
    rewrite=rewrite if on_policy else None,
  )  # fmt: skip


def write(
  draft: DraftLM, batch: Batch, rng_key: jax.Array, *, prompt_length: int, temperature: float
) -> Batch:
  """Returns a batch whose rows are the start of their first document and the draft's own text.

  Args:
    draft: the draft model.
    batch: rows [B, T].
    rng_key: for the sampling.
    prompt_length: tokens kept of the document, fewer if it is shorter.
    temperature: 0 is greedy.
  """
  batch_size, length = batch.tokens.shape
  kept = jnp.sum((batch.segments == 1) & (jnp.arange(length)[None] < prompt_length), axis=1)
  kept = jnp.maximum(kept, 1).astype(jnp.int32)
  request = decodax.Request(
    tokens=batch.tokens,
    prompt_length=kept,
    rng_keys=jax.random.split(rng_key, batch_size),
    sampling=decodax.Sampling(jnp.full((batch_size,), temperature, jnp.float32)),
    max_new_tokens=length - kept,
    eos_ids=jnp.full((batch_size, 1), -1, jnp.int32),
  )
  params = decodax.Params(jax.lax.stop_gradient(nnx.state(draft)))
  result = decodax.decode(
    params,
    request,
    model=draft_lm_model(draft),
    drafter=drafters.plain(),
    verifier=verifiers.coupled,
  )
  index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], batch.tokens.shape)
  return Batch(
    tokens=result.tokens,
    positions=index,
    segments=jnp.ones_like(index),
    loss_mask=index >= kept[:, None],
  )

"""Hand-made views, to test what a policy selects without a loop around it."""

import jax
import jax.numpy as jnp
import numpy as np

from decodax.diffusion.keys import StepKeys
from decodax.diffusion.scores import probability_of
from decodax.diffusion.scores import summarize
from decodax.diffusion.types import View

ROWS, SLOTS, TOKENS = 4, 9, 7


def make_view(seed: int, *, step: int = 0, sharpness: float = 3.0, tokens=None) -> View:
  """Returns a random view; row 0 is all masks, row 1 has one mask left."""
  rng = np.random.default_rng(seed)
  logits = jnp.asarray(sharpness * rng.standard_normal((ROWS, SLOTS, TOKENS)), jnp.float32)
  mask_id = TOKENS
  if tokens is None:
    tokens = np.where(
      rng.random((ROWS, SLOTS)) < 0.6, mask_id, rng.integers(0, TOKENS, (ROWS, SLOTS))
    )
    tokens[0], tokens[1] = mask_id, 2
    tokens[1, 4] = mask_id
  inside = np.arange(SLOTS)[None] < np.array([9, 9, 7, 8])[:, None]
  eligible, editable = (tokens == mask_id) & inside, (tokens != mask_id) & inside
  summary = summarize(logits)
  return View(
    tokens=jnp.asarray(tokens, jnp.int32),
    eligible=jnp.asarray(eligible),
    editable=jnp.asarray(editable),
    positions=jnp.broadcast_to(10 + jnp.arange(SLOTS)[None], tokens.shape),
    candidates=summary.best,
    confidence=probability_of(logits, summary, summary.best),
    summary=summary,
    logits=logits,
    laws=logits,
    step=jnp.full((ROWS,), step, jnp.int32),
    num_masks=jnp.asarray([9, 9, 7, 8], jnp.int32),
    greedy=jnp.ones((ROWS,), bool),
    sequence=jnp.asarray(tokens, jnp.int32),
    canvas_start=jnp.full((ROWS,), 10, jnp.int32),
    canvas_end=jnp.full((ROWS,), 10 + SLOTS, jnp.int32),
    mask_id=mask_id,
    keys=StepKeys(jax.random.split(jax.random.key(seed), ROWS), jnp.full((ROWS,), step)),
    shadow=jnp.asarray(2 * rng.standard_normal((ROWS, SLOTS, TOKENS)), jnp.float32),
  )


def laws_of(logits) -> np.ndarray:
  """Returns f64[..., V], the softmax."""
  logits = np.asarray(logits, np.float64)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)

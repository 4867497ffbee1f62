"""Laws fitted to measurements, and the information that a draft has to offer.

Axes: `M` measured points, `F` factors of a fit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from decodax.theory.common import promote


class LogLinearFit(NamedTuple):
  """A fitted law y = slope * log10(x) + intercept. Errors are standard errors."""

  slope: jax.Array  # f[B] change of y for ten times x
  intercept: jax.Array  # f[B]
  slope_interval: jax.Array  # f[B, 2]
  intercept_interval: jax.Array  # f[B, 2]
  slope_error: jax.Array  # f[B]
  residual_error: jax.Array  # f[B] standard deviation of y around the line


def fit_loglinear(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> LogLinearFit:
  """Returns the least-squares fit of y = a log10(x) + b, with confidence intervals.

  Suits acceptance, tokens per call or speed against the drafter's training tokens, its capacity,
  or the batch size. Intervals are Student's; with two points nothing is left to estimate the
  error from, and they are infinite.

  Args:
    x: f[B, M], positive.
    y: f[B, M].
    confidence: coverage of the intervals, in (0, 1).

  Raises:
    ValueError: the shapes differ, M is less than 2, or `confidence` is out of range.

  Source: Scaling Laws for Speculative Decoding, 2505.07858, the log-linear laws.
  """
  x, y = promote(x, y)
  num_points = x.shape[-1] if x.ndim else 0
  if x.shape != y.shape or num_points < 2:
    raise ValueError(
      f'x and y must have the same shape [..., M] with M at least 2: got {x.shape=} and {y.shape=}.'
    )
  if not 0 < confidence < 1:
    raise ValueError(f'confidence must lie strictly between 0 and 1, got {confidence=}.')
  log_x = jnp.log10(x)
  mean_x = jnp.mean(log_x, axis=-1)
  mean_y = jnp.mean(y, axis=-1)
  dx = log_x - mean_x[..., None]
  spread = jnp.sum(dx**2, axis=-1)
  slope = jnp.sum(dx * (y - mean_y[..., None]), axis=-1) / spread
  intercept = mean_y - slope * mean_x
  residuals = y - slope[..., None] * log_x - intercept[..., None]
  freedom = num_points - 2
  variance = jnp.sum(residuals**2, axis=-1) / freedom if freedom else jnp.full_like(slope, jnp.inf)
  slope_error = jnp.sqrt(variance / spread)
  intercept_error = jnp.sqrt(variance * (1 / num_points + mean_x**2 / spread))
  quantile = _student_quantile(confidence, freedom, slope.dtype) if freedom else 1.0
  return LogLinearFit(
    slope=slope,
    intercept=intercept,
    slope_interval=_interval(slope, quantile * slope_error),
    intercept_interval=_interval(intercept, quantile * intercept_error),
    slope_error=slope_error,
    residual_error=jnp.sqrt(variance),
  )


def combine_loglinear(
  fits: Sequence[LogLinearFit],
  x: ArrayLike,
  *,
  reference_x: ArrayLike,
  reference_y: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
  """Returns f[B] and f[B]: y predicted from F factors at once, and its standard error.

  Each fit varied one factor and held the others; their contributions relative to one measured
  reference point are added. The error counts the slopes' errors, as independent, and neither the
  error of the reference nor what an additive law misses.

  Args:
    fits: one fit per factor, each with scalar (f[]) entries.
    x: f[B, F], the factors to predict at.
    reference_x: f[F], the factors of the reference point.
    reference_y: f[], y measured there.

  Raises:
    ValueError: the number of factors disagrees.

  Source: Scaling Laws for Speculative Decoding, 2505.07858, where the factors are joined.
  """
  x, reference_x, reference_y = promote(x, reference_x, reference_y)
  if not len(fits) == x.shape[-1] == reference_x.shape[-1]:
    raise ValueError(
      f'There must be one fit per factor: got {len(fits)} fits, {x.shape=} and '
      f'{reference_x.shape=}.'
    )
  slopes = jnp.stack([fit.slope for fit in fits])
  errors = jnp.stack([fit.slope_error for fit in fits])
  decades = jnp.log10(x) - jnp.broadcast_to(jnp.log10(reference_x), x.shape)
  error = jnp.sqrt(decades**2 @ errors**2)
  return reference_y + decades @ slopes, error


class InformationSurplus(NamedTuple):
  """What a hidden state tells about later tokens beyond what the next token tells. All in nats."""

  surplus: jax.Array  # f[B]
  standard_error: jax.Array  # f[B]
  cross_entropy_without: jax.Array  # f[B] of the predictor that sees the next token only
  cross_entropy_with: jax.Array  # f[B] of the one that sees the hidden state too


def information_surplus(
  log_probs_without: ArrayLike, log_probs_with: ArrayLike
) -> InformationSurplus:
  """Returns an estimate, from held-out text, of I(hidden; later tokens | next token), in nats.

  This is what drafters of several tokens live on. It is the gain in held-out log-likelihood of
  the later tokens when a predictor is shown the hidden state. If the predictor without it is as
  good as can be, the estimate is, up to sampling error, a lower bound; a poor one inflates it, so
  look at both cross-entropies.

  Args:
    log_probs_without: f[B, M], natural log-probability of the later tokens of each of M held-out
      positions, predicted from the next token alone.
    log_probs_with: f[B, M], the same positions, predicted from the hidden state too.

  Raises:
    ValueError: the shapes differ, or M is less than 2.

  Source: A Markov Categorical Framework for Language Modeling, 2507.19247, the information
  surplus; the estimator is our own.
  """
  without, with_hidden = promote(log_probs_without, log_probs_with)
  if without.shape != with_hidden.shape or not without.ndim or without.shape[-1] < 2:
    raise ValueError(
      'Both predictors must be judged on the same positions, at least 2 of them: got '
      f'{without.shape=} and {with_hidden.shape=}.'
    )
  gain = with_hidden - without
  return InformationSurplus(
    surplus=jnp.mean(gain, axis=-1),
    standard_error=jnp.std(gain, axis=-1, ddof=1) / gain.shape[-1] ** 0.5,
    cross_entropy_without=-jnp.mean(without, axis=-1),
    cross_entropy_with=-jnp.mean(with_hidden, axis=-1),
  )


def _student_quantile(confidence: float, freedom: int, dtype) -> jax.Array:
  """f[], the t that |T| exceeds with probability 1 - confidence; T Student's with `freedom`."""
  half = jnp.asarray(freedom / 2, dtype)

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2  # t = sqrt(freedom) tan(middle)
    beyond = jax.scipy.special.betainc(half, jnp.asarray(0.5, dtype), jnp.cos(middle) ** 2)
    too_small = beyond > 1 - confidence
    return jnp.where(too_small, middle, low), jnp.where(too_small, high, middle)

  bracket = jnp.zeros((), dtype), jnp.asarray(jnp.pi / 2, dtype)
  low, high = lax.fori_loop(0, 60, halve, bracket)
  return freedom**0.5 * jnp.tan((low + high) / 2)


def _interval(centre: jax.Array, radius: jax.Array) -> jax.Array:
  return jnp.stack([centre - radius, centre + radius], axis=-1)

"""Which tokens are left out because the trainer and the sampler disagree about them: 1 where kept, 0 where not.

What is left out keeps its share of the denominator (AReaL, IcePop), so the rest is not silently weighted up.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError
from jaxrl.rl import order, sequences
from jaxrl.rl.tokens import MAX_LOG_RATIO, Tokens


def keep_all(tokens: Tokens) -> jax.Array:
    """1 at every sampled token."""
    return tokens.mask


def band(
    tokens: Tokens,
    *,
    span: Literal["token", "geometric", "product", "largest"] = "token",
    low: float = 0.5,
    high: float = 2.0,
) -> jax.Array:
    """Keeps low <= k <= high, over the token or over the whole sequence.

    verl's rejection by k1 states the bounds of 1 / k, so that an asymmetric band is mirrored there: its
    "0.5_5.0" is low = 0.2, high = 2 here.

    Args:
        tokens: see ``Tokens``.
        span: over what the ratio is taken, see ``tokens.Span``, or the largest of the sequence; "geometric" with 0.999
            and 1.001 is a preset of verl.
        low: smallest ratio that is kept, inclusive.
        high: largest ratio that is kept, inclusive.

    Raises:
        ConfigError: bounds in the wrong order.
    """
    if not 0 <= low <= high:
        raise ConfigError(f"band: low={low} and high={high} must rise and not be negative")
    if span == "largest":
        log = sequences.largest(jnp.where(tokens.mask > 0, tokens.mismatch, -MAX_LOG_RATIO), tokens.segment_ids)
    else:
        log = tokens.spanned(tokens.mismatch, span)
    return tokens.mask * ((jnp.exp(log) >= low) & (jnp.exp(log) <= high))


def divergence(
    tokens: Tokens,
    *,
    estimator: Literal["k2", "k3", "k3_mirrored"] = "k3",
    over: Literal["token", "sum", "mean", "largest"] = "token",
    most: float = 0.01,
) -> jax.Array:
    """Keeps what an estimate of the KL puts at ``most``, token by token or by its sequence's sum, mean or largest.

    With d = ln k: k2 = d^2 / 2, k3 = exp(d) - 1 - d (verl), k3_mirrored = exp(-d) - 1 + d (AReaL's code for its
    "kl_k3"; its docstring has the other).

    Args:
        tokens: see ``Tokens``.
        estimator: of the KL between behaviour and proximal policy.
        over: what is judged; a sequence is kept or left out as a whole.
        most: nats, inclusive.
    """
    log = tokens.mismatch
    estimate = {
        "k2": 0.5 * log**2,
        "k3": jnp.expm1(log) - log,
        "k3_mirrored": jnp.expm1(-log) + log,
    }[estimator] * tokens.mask
    if over == "largest":
        estimate = sequences.largest(estimate, tokens.segment_ids)
    elif over != "token":
        estimate = (tokens.over_sequence if over == "sum" else tokens.mean_over_sequence)(estimate)
    return tokens.mask * (estimate <= most)


def off_policy_negatives(tokens: Tokens, *, most: float = 1e-4) -> jax.Array:
    """Leaves out what has A < 0 in sequences where mean(behaviour logprob - logprob) is above ``most``.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): learning from mistakes that the policy would no
    longer make does harm. It looks at the present policy, not at the proximal one.

    Args:
        tokens: see ``Tokens``.
        most: nats; 1e-4 in slime, off unless set in TRL.
    """
    present = jax.lax.stop_gradient(tokens.logprobs)
    drift = tokens.mean_over_sequence(tokens.behaviour_logprobs - present)
    return tokens.mask * ((tokens.advantages >= 0) | (drift <= most))


def second_moment(tokens: Tokens, *, most: float = 0.04) -> jax.Array:
    """Leaves out the tokens of largest (ln k)^2 until its mean over those kept is at most ``most``.

    M2PO (arXiv 2510.01161): few tokens are lost however old the data, since few carry the variance. The mean is that
    of the micro-batch.

    Args:
        tokens: see ``Tokens``.
        most: mean of the squared log-ratio, nats squared.
    """
    here = tokens.mask > 0
    squared = tokens.mismatch**2
    rising = order.ascending(squared, here)
    places = jnp.arange(1, rising.size + 1)
    there = places <= here.sum()
    means = jnp.cumsum(jnp.where(there, rising, 0.0)) / places
    return tokens.mask * order.lowest(squared, here, ((means <= most) & there).sum())

"""Per-token estimates of the KL to a reference policy."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.rl.tokens import bounded

Estimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]

MAX_K3 = 10.0


def kl(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array, estimator: Estimator) -> jax.Array:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled.

    Source: J. Schulman, "Approximating KL Divergence" (2020). With d = logprob - reference:
    k1 = d; k2 = d^2 / 2; k3 = exp(-d) + d - 1. All three estimate the KL; abs = |d| does not. Their gradients differ:
    in expectation that of k2 is the gradient of KL(policy || reference), that of k3 the gradient of
    KL(reference || policy), and that of k1 is zero, so k1 is for rewards and for reporting. With a "+" the value stays
    and the gradient is that of k2, so "k1+" and "k3+" are unbiased in both. As in verl, the exponent of k3 is clipped
    to ±20 and its value to ±10, where its gradient ends; TRL clips neither.

    Args:
        logprobs: [B, T] under the policy; gradients flow into these only.
        reference_logprobs: [B, T] under the reference.
        mask: [B, T], non-zero where the policy sampled the token.
        estimator: which of them.

    Returns:
        [B, T], 0 where the mask is.
    """
    difference = _difference(logprobs, reference_logprobs, mask > 0)
    value = _value(difference, estimator.removesuffix("+"))
    if not estimator.endswith("+"):
        return value
    unbiased = _value(difference, "k2")
    return unbiased + jax.lax.stop_gradient(value - unbiased)


def _value(difference: jax.Array, estimator: str) -> jax.Array:
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference * jnp.sign(difference)  # the derivative of jnp.abs at 0 is 1
    if estimator == "k2":
        return 0.5 * difference**2
    exponent = bounded(-difference)
    return jnp.clip(jnp.expm1(exponent) - exponent, -MAX_K3, MAX_K3)


def _difference(logprobs: jax.Array, other: jax.Array, sampled: jax.Array) -> jax.Array:
    """logprobs - other where sampled, else 0 with no gradient, even from NaN. No gradient flows into ``other``."""
    return jnp.where(sampled, logprobs, 0.0) - jax.lax.stop_gradient(jnp.where(sampled, other, 0.0))


def adapted(coefficient: float, divergence: float, *, target: float, horizon: int, count: int) -> float:
    """The weight of the KL after an update that found this one: up where it is above ``target``, down where below.

    coefficient (1 + clip(divergence / target - 1, ±0.2) count / horizon) (Ziegler et al., arXiv 1909.08593, section
    2.2; verl's ``AdaptiveKLController``).

    Args:
        coefficient: the weight so far.
        divergence: the KL to the reference that was found, nats.
        target: the KL that is aimed at.
        horizon: after so many trajectories at twice the target, or none of it, the weight has moved by a fifth.
        count: trajectories of the update.
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return coefficient * max(1 + error * count / horizon, 0.0)

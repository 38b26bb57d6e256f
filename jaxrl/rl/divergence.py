"""Per-token estimates of the KL to a reference policy."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.rl.tokens import MAX_LOG_RATIO

MAX_K3 = 10.0


def kl(
    logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array, estimator: Literal["k1", "k2", "k3"]
) -> jax.Array:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled.

    Source: J. Schulman, "Approximating KL Divergence" (2020). With d = logprob - reference:
    k1 = d; k2 = d^2 / 2; k3 = exp(-d) + d - 1. All three estimate the KL. Their gradients differ: in
    expectation that of k2 is the gradient of KL(policy || reference), that of k3 the gradient of
    KL(reference || policy), and that of k1 is zero, so k1 is for reporting. As in verl, the exponent of k3
    is clipped to ±20 and its value to ±10, where its gradient ends.

    Args:
        logprobs: [B, T] under the policy; gradients flow into these only.
        reference_logprobs: [B, T] under the reference.
        mask: [B, T], non-zero where the policy sampled the token.
        estimator: which of the three.

    Returns:
        [B, T], 0 where the mask is.
    """
    difference = _difference(logprobs, reference_logprobs, mask > 0)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    exponent = jnp.clip(-difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.clip(jnp.exp(exponent) - exponent - 1, -MAX_K3, MAX_K3)


def _difference(logprobs: jax.Array, other: jax.Array, sampled: jax.Array) -> jax.Array:
    """logprobs - other where sampled, else 0 with no gradient, even from NaN. No gradient flows into ``other``."""
    return jnp.where(sampled, logprobs, 0.0) - jax.lax.stop_gradient(jnp.where(sampled, other, 0.0))

"""Per-token losses, and the weights that turn them into one number.

The loss of an update is ``sum(weights * per_token)`` over all its micro-batches. ``aggregation_weights``
makes the weights on the host, once, from the masks of all its trajectories: the denominators are global, so
the loss and its gradient do not depend on how rows were packed or cut into micro-batches.

A masked token contributes exactly zero to value and gradient, whatever stands in it, NaN included: inputs
are replaced before any arithmetic, because a zero weight times NaN is NaN.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_LOG_RATIO = 20.0  # keeps exp finite; beyond it the gradient of a token is zero
MAX_K3 = 10.0


class PolicyLoss(NamedTuple):
    """Per-token results, all [B, T], all 0 where the mask is."""

    loss: jax.Array
    clipped: jax.Array  # 1.0 where clipping of the ratio changed the loss
    dual_clipped: jax.Array  # 1.0 where the dual clip bounded it


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> PolicyLoss:
    """Clipped policy gradient, per token: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logprob - old).

    PPO (arXiv 1707.06347, equation 7) with separate bounds (DAPO, arXiv 2503.14476, equation 10) and, where
    A < 0, bounded above by -A dual_clip (arXiv 1912.09729, equation 5).

    Args:
        logprobs: [B, T] under the policy being trained; gradients flow into these only.
        old_logprobs: [B, T] under the policy the ratio is taken against.
        advantages: [B, T].
        mask: [B, T], non-zero where the policy sampled the token.
        clip_low: how far below 1 the ratio counts.
        clip_high: how far above 1 the ratio counts.
        dual_clip: largest ratio that counts for a negative advantage; 0 = no bound, otherwise more than 1.
    """
    sampled = mask > 0
    advantages = jax.lax.stop_gradient(jnp.where(sampled, advantages, 0.0))
    ratio = jnp.exp(jnp.clip(_difference(logprobs, old_logprobs, sampled), -MAX_LOG_RATIO, MAX_LOG_RATIO))
    unclipped = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    clipped = bounded > unclipped
    loss = jnp.where(clipped, bounded, unclipped)
    dual_clipped = jnp.zeros_like(clipped)
    if dual_clip:
        ceiling = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = jnp.where(dual_clipped, ceiling, loss)
    return PolicyLoss(loss, clipped.astype(loss.dtype), dual_clipped.astype(loss.dtype))


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


def aggregation_weights(
    masks: Sequence[np.ndarray], mode: Literal["token", "sequence", "constant"], constant_length: int = 0
) -> list[np.ndarray]:
    """Weight of every token such that the loss of an update is ``sum(weights * per_token)``.

    With n trajectories that have sampled tokens, m_i of them in trajectory i:

    * ``token``: 1 / sum(m). Every token counts the same (DAPO; rStar2-Agent, equation 6).
    * ``sequence``: 1 / (n m_i). Every trajectory counts the same (GRPO).
    * ``constant``: 1 / (n constant_length). A length-free denominator (Dr. GRPO, arXiv 2503.20783).

    Args:
        masks: [T_i] of each trajectory of one optimizer update, all of them: the denominators are global.
        mode: which of the three.
        constant_length: tokens; only for ``constant``, usually the longest response allowed.

    Returns:
        [T_i] float32 for each trajectory, 0 where its mask is. Trajectories without a sampled token weigh nothing
        and are not counted.

    Raises:
        ValueError: ``constant`` without a positive length.
    """
    if mode == "constant" and constant_length < 1:
        raise ValueError(f"constant_length={constant_length} must be at least 1 token for constant aggregation")
    sampled = [np.asarray(mask) > 0 for mask in masks]
    lengths = np.array([mask.sum() for mask in sampled], np.int64)
    tokens, sequences = lengths.sum(), np.count_nonzero(lengths)
    weights = []
    for mask, length in zip(sampled, lengths, strict=True):
        denominator = {"token": tokens, "sequence": sequences * length, "constant": sequences * constant_length}[mode]
        weights.append((mask / max(denominator, 1)).astype(np.float32))
    return weights


def _difference(logprobs: jax.Array, other: jax.Array, sampled: jax.Array) -> jax.Array:
    """logprobs - other where sampled, else 0 with no gradient, even from NaN. No gradient flows into ``other``."""
    return jnp.where(sampled, logprobs, 0.0) - jax.lax.stop_gradient(jnp.where(sampled, other, 0.0))

"""How far the trainer's log-probabilities lie from those the sampler recorded.

On the first update after a rollout the two come from the same weights, so what is left is numerics; on
later updates, and on tokens of older weights, it is drift as well.
"""

import jax
import jax.numpy as jnp

from jaxrl.rl.tokens import MAX_LOG_RATIO

GAP_METRICS = ("logprob_gap", "logprob_gap_max", "sampler_kl", "ratio")


def gap(logprobs: jax.Array, behaviour_logprobs: jax.Array, mask: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Statistics of d = logprob - behaviour logprob over the sampled tokens, as (sum, count).

    Sums and counts of micro-batches add up, of ``logprob_gap_max`` the maximum is taken.

    Args:
        logprobs: [B, T] under the policy being trained.
        behaviour_logprobs: [B, T] as the sampler recorded them.
        mask: [B, T], non-zero where the policy sampled the token.

    Returns:
        ``logprob_gap`` |d|; ``logprob_gap_max``; ``sampler_kl`` exp(d) - d - 1, the k3 estimate of
        KL(sampler || trainer); ``ratio`` exp(d). The exponent is clipped to ±20. No gradient flows.
    """
    sampled = mask > 0
    difference = jax.lax.stop_gradient(jnp.where(sampled, logprobs, 0.0) - jnp.where(sampled, behaviour_logprobs, 0.0))
    clipped = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(clipped)
    count = sampled.sum().astype(difference.dtype)
    size = jnp.abs(difference)
    return {
        "logprob_gap": (size.sum(), count),
        "logprob_gap_max": (size.max(), sampled.any().astype(difference.dtype)),
        "sampler_kl": ((ratio - clipped - 1).sum(), count),
        "ratio": (jnp.where(sampled, ratio, 0.0).sum(), count),
    }

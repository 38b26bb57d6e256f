"""How far the trainer's log-probabilities lie from those the sampler recorded.

On the first update after a rollout the two come from the same weights, so what is left is numerics; on
later updates, and on tokens of older weights, it is drift as well.
"""

import jax
import jax.numpy as jnp

from jaxrl.rl import order
from jaxrl.rl.tokens import Tokens, bounded

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
    clipped = bounded(difference)
    count = sampled.sum().astype(difference.dtype)
    size = jnp.abs(difference)
    return {
        "logprob_gap": (size.sum(), count),
        "logprob_gap_max": (size.max(), sampled.any().astype(difference.dtype)),
        "sampler_kl": ((jnp.expm1(clipped) - clipped).sum(), count),
        "ratio": (jnp.where(sampled, jnp.exp(clipped), 0.0).sum(), count),
    }


def correction_metrics(tokens: Tokens, weights: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What a correction leaves, and the ratio it judged, as (sum, count).

    Percentiles do not add up over micro-batches: what is logged is the mean of those of the micro-batches, each
    counted by its sampled tokens. It is exact for one micro-batch and close for several that are alike.

    Args:
        tokens: as the correction saw them.
        weights: [B, T] what the loss is multiplied by.

    Returns:
        ``mismatch_kept``, the share of sampled tokens whose weight is not 0; ``mismatch_weight``, the mean weight;
        ``mismatch_p1``, ``_p50``, ``_p99`` percentiles of k = exp(proximal logprob - behaviour logprob).
    """
    here, count = tokens.mask > 0, tokens.mask.sum()
    percentiles = order.quantiles(tokens.mismatch, here, (0.01, 0.5, 0.99))
    named = zip(("mismatch_p1", "mismatch_p50", "mismatch_p99"), percentiles, strict=True)
    return {
        "mismatch_kept": ((here & (weights != 0)).sum().astype(weights.dtype), count),
        "mismatch_weight": ((weights * tokens.mask).sum(), count),
        **{name: (jnp.exp(value) * count, count) for name, value in named},
    }

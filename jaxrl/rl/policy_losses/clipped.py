"""Losses that clip the ratio to the proximal policy, of a token or of its whole sequence."""

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError
from jaxrl.rl.methods import not_negative
from jaxrl.rl.tokens import Span, TokenLoss, Tokens, bounded


def ppo_clip(
    tokens: Tokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 3.0,
    ratio_cap: float = 0.0,
    span: Span = "token",
) -> TokenLoss:
    """Clipped policy gradient: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    PPO (arXiv 1707.06347, equation 7) with separate bounds (DAPO, arXiv 2503.14476, equation 10) and, where
    A < 0, bounded above by -A dual_clip (arXiv 1912.09729, equation 5).

    Args:
        tokens: see ``Tokens``.
        clip_low: how far below 1 the ratio counts.
        clip_high: how far above 1 the ratio counts. TRL's ``epsilon_high`` unset is its ``epsilon``, 0.2.
        dual_clip: largest ratio that counts for a negative advantage; 0 = no bound, otherwise more than 1. verl's
            ``clip_ratio_c``, 3 unless set, 10 in DAPO's scripts.
        ratio_cap: largest ratio that counts in the unclipped term (two-sided clipping, INTELLECT-2, arXiv 2505.07291;
            TRL's ``delta``); 0 = no bound. Above 1 + clip_high it is a dual clip by another name.
        span: "geometric" takes the mean over the sequence as the ratio of all its tokens, "product" the product.

    Raises:
        ConfigError: a setting outside its range.
    """
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ConfigError(f"ppo_clip: clip_low={clip_low} must lie between 0 and 1 and clip_high={clip_high} above 0")
    if dual_clip and dual_clip <= 1:
        raise ConfigError(f"ppo_clip: dual_clip={dual_clip} must be above 1, or 0 to switch it off")
    if ratio_cap and ratio_cap <= 1:
        raise ConfigError(f"ppo_clip: ratio_cap={ratio_cap} must be above 1, or 0 to switch it off")
    ratio, advantages = tokens.ratio_of(span), tokens.advantages
    loss, clipped = pessimistic(ratio, advantages, clip_low, clip_high, ratio_cap)
    dual_clipped = jnp.zeros_like(clipped)
    if dual_clip:
        ceiling = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = jnp.where(dual_clipped, ceiling, loss)
    return TokenLoss(
        loss, {"clip_fraction": clipped.astype(loss.dtype), "dual_clip_fraction": dual_clipped.astype(loss.dtype)}
    )


def gspo(tokens: Tokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> TokenLoss:
    """Clipped by the ratio of the sequence: max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s the geometric mean.

    GSPO (arXiv 2507.18071, section 4). Aggregate by ``sequence``: the same value stands at every token, so
    ``token`` weights sequences by their lengths. TRL: ``importance_sampling_level="sequence"``.

    Args:
        tokens: see ``Tokens``.
        clip_low: how far below 1 the sequence's ratio counts; ratios of sequences lie far closer to 1 than of tokens.
        clip_high: how far above 1 it counts.
    """
    not_negative("gspo", clip_low=clip_low, clip_high=clip_high)
    loss, clipped = pessimistic(tokens.ratio_of("geometric"), tokens.advantages, clip_low, clip_high)
    return TokenLoss(loss, {"clip_fraction": clipped.astype(loss.dtype)})


def gspo_token(tokens: Tokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> TokenLoss:
    """As ``gspo`` with the ratio sg(s) exp(logprob - sg(logprob)): a token's gradient is that of its own advantage.

    GSPO-token (arXiv 2507.18071, section 4.3); verl's ``gspo``. Where all tokens of a sequence have one advantage and
    one weight, value and gradient are those of ``gspo``.

    Args:
        tokens: see ``Tokens``.
        clip_low: how far below 1 the sequence's ratio counts.
        clip_high: how far above 1 it counts.
    """
    not_negative("gspo_token", clip_low=clip_low, clip_high=clip_high)
    own = tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs)
    ratio = jax.lax.stop_gradient(tokens.ratio_of("geometric")) * jnp.exp(own)
    loss, clipped = pessimistic(ratio, tokens.advantages, clip_low, clip_high)
    return TokenLoss(loss, {"clip_fraction": clipped.astype(loss.dtype)})


def luspo(tokens: Tokens, *, clip_low: float = 2e-3, clip_high: float = 2.5e-3) -> TokenLoss:
    """``gspo`` times the length of the sequence, so that aggregation by ``sequence`` does not favour short ones.

    LUSPO ("Length-Unbiased Sequence Policy Optimization"). The same as ``gspo`` aggregated by ``sequence_sum``; under
    that aggregation this loss would count the length twice. It is about the ratio of sequences: TRL's ``luspo`` with
    the ratio of tokens is ``ppo_clip`` aggregated by ``sequence_sum``.

    Args:
        tokens: see ``Tokens``; the length is that of the denominator, and counts tokens that were left out.
        clip_low: how far below 1 the sequence's ratio counts.
        clip_high: how far above 1 it counts.
    """
    not_negative("luspo", clip_low=clip_low, clip_high=clip_high)
    result = gspo(tokens, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(result.loss * tokens.recorded_lengths, result.metrics)


def gmpo(tokens: Tokens, *, clip_low: float = 0.4, clip_high: float = 0.4) -> TokenLoss:
    """-mean(A) times the geometric mean over the sequence of ratios that are clipped token by token.

    GMPO (arXiv 2507.20673). Bounds are those of the *logarithm* of the ratio, and one-sided: for A > 0 it
    is cut above ``clip_high``, for A < 0 below -``clip_low``. Aggregate by ``sequence``. verl's ``geo_mean``, which
    also counts sequences without a sampled token.

    Args:
        tokens: see ``Tokens``.
        clip_low: how far below 0 the log-ratio of a token counts.
        clip_high: how far above 0 it counts.
    """
    not_negative("gmpo", clip_low=clip_low, clip_high=clip_high)
    log_ratio = tokens.logprobs - tokens.proximal_logprobs
    cut_above = (tokens.advantages > 0) & (log_ratio > clip_high)
    cut_below = (tokens.advantages < 0) & (log_ratio < -clip_low)
    clipped = jnp.where(cut_above, clip_high, jnp.where(cut_below, -clip_low, log_ratio))
    clipped = jnp.where(tokens.advantages == 0, 0.0, clipped)
    loss = -tokens.mean_over_sequence(tokens.advantages) * jnp.exp(bounded(tokens.mean_over_sequence(clipped)))
    return TokenLoss(loss, {"clip_fraction": (cut_above | cut_below).astype(loss.dtype)})


def pessimistic(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float, ratio_cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where the clip decides. All [B, T].

    Args:
        ratio_cap: largest r in the first term; 0 = none.
    """
    unclipped = -advantages * (jnp.minimum(ratio, ratio_cap) if ratio_cap else ratio)
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.where(clipped > unclipped, clipped, unclipped), clipped > unclipped

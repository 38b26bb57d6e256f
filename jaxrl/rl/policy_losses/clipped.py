"""Losses that clip the ratio to the proximal policy."""

import jax.numpy as jnp

from jaxrl.config import ConfigError
from jaxrl.rl.tokens import TokenLoss, Tokens


def ppo_clip(tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 3.0) -> TokenLoss:
    """Clipped policy gradient: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    PPO (arXiv 1707.06347, equation 7) with separate bounds (DAPO, arXiv 2503.14476, equation 10) and, where
    A < 0, bounded above by -A dual_clip (arXiv 1912.09729, equation 5).

    Args:
        tokens: see ``Tokens``.
        clip_low: how far below 1 the ratio counts.
        clip_high: how far above 1 the ratio counts.
        dual_clip: largest ratio that counts for a negative advantage; 0 = no bound, otherwise more than 1.

    Raises:
        ConfigError: a setting outside its range.
    """
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ConfigError(f"ppo_clip: clip_low={clip_low} must lie between 0 and 1 and clip_high={clip_high} above 0")
    if dual_clip and dual_clip <= 1:
        raise ConfigError(f"ppo_clip: dual_clip={dual_clip} must be above 1, or 0 to switch it off")
    ratio, advantages = tokens.ratio, tokens.advantages
    unclipped = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    clipped = bounded > unclipped
    loss = jnp.where(clipped, bounded, unclipped)
    dual_clipped = jnp.zeros_like(clipped)
    if dual_clip:
        ceiling = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = jnp.where(dual_clipped, ceiling, loss)
    return TokenLoss(
        loss, {"clip_fraction": clipped.astype(loss.dtype), "dual_clip_fraction": dual_clipped.astype(loss.dtype)}
    )

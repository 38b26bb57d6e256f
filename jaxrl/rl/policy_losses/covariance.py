"""Losses that spare the few tokens whose update would cost most entropy: those where A and logprob rise together.

Both are of "The Entropy Mechanism of Reinforcement Learning" (arXiv 2505.22617). The product of the centred advantage
and the centred log-probability of a token is its share of their covariance, whose mean is how fast entropy falls. Means
and ranks are those of a micro-batch, as in the paper's code: more rows in it make them more exact.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.rl import order
from jaxrl.rl.methods import not_negative
from jaxrl.rl.policy_losses.clipped import pessimistic
from jaxrl.rl.tokens import TokenLoss, Tokens


def clip_cov(
    tokens: Tokens,
    *,
    share: float = 2e-4,
    lowest: float = 1.0,
    highest: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    choice: Literal["random", "first"] = "random",
) -> TokenLoss:
    """The clipped loss, but 0 on a few tokens drawn from those whose covariance lies between two bounds.

    Clip-Cov. Tokens that the ratio clips anyway are not drawn.

    Args:
        tokens: see ``Tokens``.
        share: of the sampled tokens that are drawn, rounded down, but at least one.
        lowest: covariance above which a token may be drawn.
        highest: covariance below which it may be drawn.
        clip_low: how far below 1 the ratio counts.
        clip_high: how far above 1 it counts.
        choice: "random" draws by a hash of the token's numbers, so that the draw does not depend on where it lies;
            "first" takes them row by row.
    """
    not_negative("clip_cov", share=share, clip_low=clip_low, clip_high=clip_high)
    loss, clipped = pessimistic(tokens.ratio, tokens.advantages, clip_low, clip_high)
    covariance, here = _covariance(tokens), tokens.mask > 0
    candidates = here & ~clipped & (covariance > lowest) & (covariance < highest)
    rank = _hashed(tokens) if choice == "random" else jnp.arange(loss.size, dtype=loss.dtype).reshape(loss.shape)
    drawn = order.lowest(rank, candidates, _count(share, here))
    shown = {"clip_fraction": clipped, "covariance_clip_fraction": drawn}
    return TokenLoss(jnp.where(drawn, 0.0, loss), {name: where.astype(loss.dtype) for name, where in shown.items()})


def kl_cov(tokens: Tokens, *, share: float = 2e-4, penalty: float = 1.0) -> TokenLoss:
    """-A r, plus penalty abs(logprob - proximal logprob) on the tokens of greatest covariance.

    KL-Cov; there is no clip beside it.

    Args:
        tokens: see ``Tokens``.
        share: of the sampled tokens that are penalised, rounded down, but at least one; fewer where fewer have a
            covariance above 0, and of equal ones those that lie first.
        penalty: weight of the absolute log-ratio: 1 where verl's loss is called by itself, 0.1 through its
            configuration.
    """
    not_negative("kl_cov", share=share, penalty=penalty)
    log_ratio = tokens.logprobs - tokens.proximal_logprobs
    here = tokens.mask > 0
    covariance = _covariance(tokens)
    chosen = order.lowest(-covariance, here & (covariance > 0), _count(share, here))
    loss = -tokens.advantages * tokens.ratio + penalty * chosen * log_ratio * jnp.sign(log_ratio)
    return TokenLoss(loss, {"covariance_penalty_fraction": chosen.astype(loss.dtype)})


def _covariance(tokens: Tokens) -> jax.Array:
    count = jnp.maximum(tokens.mask.sum(), 1)
    logprobs = jax.lax.stop_gradient(tokens.logprobs)
    centred = [(values - (values * tokens.mask).sum() / count) for values in (tokens.advantages, logprobs)]
    return centred[0] * centred[1]


def _count(share: float, here: jax.Array) -> jax.Array:
    """[] int32: the share of the sampled tokens, rounded down but for what rounding to float32 took from it."""
    return jnp.maximum(jnp.floor(share * here.sum() + 1e-4), 1).astype(jnp.int32)


def _hashed(tokens: Tokens) -> jax.Array:
    """[B, T] float32 in [0, 1), a hash of the token's numbers."""
    bits = [
        jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
        for values in (tokens.behaviour_logprobs, tokens.advantages)
    ]
    mixed = bits[0] ^ (bits[1] * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed >> 8).astype(jnp.float32) / 2**24

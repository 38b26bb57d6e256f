"""Losses whose gradient is a constant weight times A times that of the log-probability: nothing is clipped away."""

import jax
import jax.numpy as jnp

from jaxrl.rl.methods import not_negative
from jaxrl.rl.tokens import Span, TokenLoss, Tokens


def reinforce(tokens: Tokens) -> TokenLoss:
    """-A logprob.

    REINFORCE (Williams 1992, doi 10.1007/BF00992696). GPG (arXiv 2504.02546) is this loss with an advantage of its own;
    verl's ``gpg``. A ``mismatch`` weight makes it off-policy (verl's bypass mode ``reinforce``).
    """
    return TokenLoss(-tokens.advantages * tokens.logprobs, {})


def cispo(tokens: Tokens, *, clip_low: float = 1.0, clip_high: float = 4.0) -> TokenLoss:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprob: the bounds are distances from 1.

    CISPO (MiniMax-M1, arXiv 2506.13585), which has no effective lower bound; that of slime, ROLL
    (0.1 on both sides) and verl (its clip ratios, 0.2 on both sides unless set). TRL means something else by the same
    name: ``cispo_absolute``.

    Args:
        tokens: see ``Tokens``.
        clip_low: how far below 1 the weight may lie; 1 = no lower bound.
        clip_high: how far above 1 it may lie; 4 is a weight of at most 5.
    """
    not_negative("cispo", clip_low=clip_low, clip_high=clip_high)
    ratio = tokens.ratio
    return _weighted(tokens, jnp.clip(ratio, 1 - clip_low, 1 + clip_high), ratio)


def cispo_absolute(tokens: Tokens, *, cap: float = 5.0, span: Span = "token") -> TokenLoss:
    """-sg(min(r, cap)) A logprob: the bound is the weight itself, and there is none below.

    CISPO as in ScaleRL (arXiv 2510.13786) and TRL, whose ``epsilon_high`` is this ``cap`` and not a distance from 1.

    Args:
        tokens: see ``Tokens``.
        cap: largest weight.
        span: "geometric" weighs all tokens by the mean over the sequence.
    """
    not_negative("cispo_absolute", cap=cap)
    ratio = tokens.ratio_of(span)
    return _weighted(tokens, jnp.minimum(ratio, cap), ratio)


def reinforce_capped(tokens: Tokens, *, cap: float = 1.0) -> TokenLoss:
    """-sg(min(r, cap)) A logprob with a cap of 1: a token that grew likelier counts as if it were on policy.

    ROLL's policy loss "tis". That is not the correction for the sampler's numerics that verl and slime call TIS
    (``mismatch = "tis"``), whose ratio is that of proximal to behaviour policy.

    Args:
        tokens: see ``Tokens``.
        cap: largest weight.
    """
    not_negative("reinforce_capped", cap=cap)
    ratio = tokens.ratio
    return _weighted(tokens, jnp.minimum(ratio, cap), ratio)


def topr(tokens: Tokens, *, cap: float = 1.0, positive_weight: float = 1.0, negative_weight: float = 1.0) -> TokenLoss:
    """-A logprob where A >= 0, -sg(min(r, cap)) A logprob where A < 0.

    Tapered off-policy REINFORCE (TOPR, arXiv 2503.14286): good samples are learned whatever the policy thinks of them,
    bad ones only as far as it would still write them. The paper tapers whole sequences; here, as in ROLL, tokens.

    Args:
        tokens: see ``Tokens``.
        cap: largest weight of a token with a negative advantage.
        positive_weight: of tokens with a positive advantage.
        negative_weight: of tokens with a negative one.
    """
    not_negative("topr", cap=cap, positive_weight=positive_weight, negative_weight=negative_weight)
    ratio = tokens.ratio
    negative = tokens.advantages < 0
    weight = jnp.where(negative, negative_weight * jnp.minimum(ratio, cap), positive_weight)
    loss = -jax.lax.stop_gradient(weight) * tokens.advantages * tokens.logprobs
    return TokenLoss(loss, {"clip_fraction": (negative & (ratio > cap)).astype(loss.dtype)})


def dro(tokens: Tokens, *, beta: float = 0.1) -> TokenLoss:
    """-(A logprob - beta / 2 (logprob - proximal logprob)^2).

    Direct reward optimisation (arXiv 2405.19107) token by token; the policy update of Kimi k1.5 (arXiv 2501.12599),
    ROLL's ``kimi15``.

    Args:
        tokens: see ``Tokens``; the log-ratio is not clipped, so that a token that drifted is always pulled back.
        beta: strength of the pull to the proximal policy; 0.1 in ROLL, no default in verl.
    """
    not_negative("dro", beta=beta)
    drift = tokens.logprobs - tokens.proximal_logprobs
    return TokenLoss(-(tokens.advantages * tokens.logprobs - 0.5 * beta * drift**2), {"drift": jnp.abs(drift)})


def vespo(
    tokens: Tokens,
    *,
    power_positive: float = 2.0,
    rate_positive: float = 3.0,
    power_negative: float = 3.0,
    rate_negative: float = 2.0,
) -> TokenLoss:
    """-sg(phi(w)) A logprob, with w the product of the sequence's ratios and phi(w) = w^power exp(rate (1 - w)).

    VESPO (arXiv 2602.10693): a smooth weight that is 1 on policy and falls to 0 on both sides, so no threshold is
    needed however long the sequence. ln w is kept between ln 1e-8 and 20.

    Args:
        tokens: see ``Tokens``.
        power_positive: how fast the weight falls as w goes to 0, where A >= 0 (TRL's ``vespo_k_pos``).
        rate_positive: how fast it falls as w grows, where A >= 0 (TRL's ``vespo_lambda_pos``).
        power_negative: the first where A < 0.
        rate_negative: the second where A < 0.
    """
    not_negative("vespo", power_positive=power_positive, rate_positive=rate_positive)
    not_negative("vespo", power_negative=power_negative, rate_negative=rate_negative)
    log_product = jnp.clip(tokens.over_sequence(tokens.log_ratio), jnp.log(1e-8), 20.0)
    power = jnp.where(tokens.advantages >= 0, power_positive, power_negative)
    rate = jnp.where(tokens.advantages >= 0, rate_positive, rate_negative)
    weight = jax.lax.stop_gradient(jnp.exp(rate + power * log_product - rate * jnp.exp(log_product)))
    return TokenLoss(-weight * tokens.advantages * tokens.logprobs, {"sequence_weight": weight})


def _weighted(tokens: Tokens, weight: jax.Array, ratio: jax.Array) -> TokenLoss:
    loss = -jax.lax.stop_gradient(weight) * tokens.advantages * tokens.logprobs
    return TokenLoss(loss, {"clip_fraction": (weight != ratio).astype(loss.dtype)})

"""Losses that leave a token out once its probability has moved too far from the one it was sampled with.

The ratio is that to the behaviour policy, not to the proximal one: drift and the sampler's numerics are bounded
together, and a ``mismatch`` weight on top would count the latter twice. Differences of probabilities treat rare tokens
gently, whose ratios are large long before their probabilities differ.
"""

import jax
import jax.numpy as jnp

from jaxrl.rl.methods import not_negative
from jaxrl.rl.tokens import TokenLoss, Tokens, bounded


def dppo_tv(tokens: Tokens, *, drop_low: float = 0.2, drop_high: float = 0.2, cap: float = 20.0) -> TokenLoss:
    """-A sg(min(r, cap)) logprob, left out where A > 0 and p - p_b > drop_high, or A <= 0 and p - p_b < -drop_low.

    DPPO with the total variation of the two outcomes "this token or another" (arXiv 2602.04879).

    Args:
        tokens: see ``Tokens``.
        drop_low: how far the probability may have fallen.
        drop_high: how far it may have risen.
        cap: largest weight. The paper wants it large; a verl configuration takes 3 unless it is set, because the
            actor's ``clip_ratio_c`` wins over the 20 of the loss.
    """
    not_negative("dppo_tv", drop_low=drop_low, drop_high=drop_high, cap=cap)
    return _capped(tokens, cap, _within_variation(tokens, drop_low, drop_high))


def dppo_kl(tokens: Tokens, *, drop_low: float = 0.05, drop_high: float = 0.05, cap: float = 20.0) -> TokenLoss:
    """As ``dppo_tv``, with the KL of the two outcomes, KL(p_b || p), in place of p - p_b and p_b - p.

    DPPO with the binary KL (arXiv 2602.04879).

    Args:
        tokens: see ``Tokens``.
        drop_low: largest KL where A <= 0 and the token grew unlikelier, nats.
        drop_high: largest KL where A > 0 and the token grew likelier, nats.
        cap: largest weight, see ``dppo_tv``.
    """
    not_negative("dppo_kl", drop_low=drop_low, drop_high=drop_high, cap=cap)
    divergence = binary_kl(tokens.behaviour_logprobs, tokens.logprobs)
    risen = tokens.logprobs > tokens.behaviour_logprobs
    fallen = tokens.logprobs < tokens.behaviour_logprobs
    dropped = jnp.where(tokens.advantages > 0, risen & (divergence > drop_high), fallen & (divergence > drop_low))
    return _capped(tokens, cap, ~dropped)


def prime_rl(
    tokens: Tokens, *, drop_low: float = 0.2, drop_high: float = 0.2, drift_penalty: float = 1e-3
) -> TokenLoss:
    """-A r keep + drift_penalty (ln r)^2, ``keep`` being the rule of ``dppo_tv``; no clip.

    The default loss of prime-rl, which has nothing to do with the process rewards of PRIME (arXiv 2502.01456). The
    penalty holds for tokens that are left out, too.

    Args:
        tokens: see ``Tokens``.
        drop_low: how far the probability may have fallen.
        drop_high: how far it may have risen.
        drift_penalty: weight of the squared log-ratio.
    """
    not_negative("prime_rl", drop_low=drop_low, drop_high=drop_high, drift_penalty=drift_penalty)
    return _penalised(tokens, _within_variation(tokens, drop_low, drop_high), drift_penalty)


def prime_rl_symmetric(tokens: Tokens, *, drop: float = 0.1, drift_penalty: float = 1e-3) -> TokenLoss:
    """As ``prime_rl``, but a token is kept where abs(p - p_b) <= drop, whatever its advantage.

    What prime-rl calls its "ipo" loss; it has nothing to do with the preference loss IPO.

    Args:
        tokens: see ``Tokens``.
        drop: how far the probability may have moved.
        drift_penalty: weight of the squared log-ratio.
    """
    not_negative("prime_rl_symmetric", drop=drop, drift_penalty=drift_penalty)
    return _penalised(tokens, jnp.abs(_probability_change(tokens)) <= drop, drift_penalty)


def binary_kl(logprobs: jax.Array, other: jax.Array) -> jax.Array:
    """KL between the distributions over "this token" and "any other", from the log-probabilities of the token.

    A probability is kept away from 1 by one part in 10^7, where float32 could not tell the rest from nothing.
    """
    rest, other_rest = (jnp.maximum(-jnp.expm1(values), 1e-7) for values in (logprobs, other))
    return jnp.exp(logprobs) * (logprobs - other) + rest * (jnp.log(rest) - jnp.log(other_rest))


def _probability_change(tokens: Tokens) -> jax.Array:
    return jnp.exp(tokens.logprobs) - jnp.exp(tokens.behaviour_logprobs)


def _within_variation(tokens: Tokens, drop_low: float, drop_high: float) -> jax.Array:
    change = _probability_change(tokens)
    return jnp.where(tokens.advantages > 0, change <= drop_high, change >= -drop_low)


def _capped(tokens: Tokens, cap: float, keep: jax.Array) -> TokenLoss:
    weight = jax.lax.stop_gradient(jnp.minimum(tokens.behaviour_ratio, cap) * keep)
    loss = -weight * tokens.advantages * tokens.logprobs
    return TokenLoss(loss, {"drop_fraction": (~keep).astype(loss.dtype)})


def _penalised(tokens: Tokens, keep: jax.Array, drift_penalty: float) -> TokenLoss:
    log_ratio = bounded(tokens.logprobs - tokens.behaviour_logprobs)
    loss = -tokens.advantages * jnp.exp(log_ratio) * keep + drift_penalty * log_ratio**2
    return TokenLoss(loss, {"drop_fraction": (~keep).astype(loss.dtype)})

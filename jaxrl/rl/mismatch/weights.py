"""Weights of importance for the ratio k of the proximal to the behaviour policy."""

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError
from jaxrl.rl import sequences
from jaxrl.rl.policy_losses.trust_region import binary_kl
from jaxrl.rl.tokens import Span, Tokens


def unweighted(tokens: Tokens) -> jax.Array:
    """1 at every sampled token."""
    return tokens.mask


def tis(
    tokens: Tokens, *, span: Span = "token", cap: float = 2.0, floor: float = 0.0, normalize: bool = False
) -> jax.Array:
    """Truncated importance sampling: k, at most ``cap`` and at least ``floor``.

    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025). Names: verl's default
    once it corrects is ``span="product"``; AReaL says "sequence" and takes the geometric mean. ROLL's policy loss
    "tis" is another thing, ``reinforce_capped``.

    Args:
        tokens: see ``Tokens``.
        span: a product over hundreds of tokens is nearly always at its cap or near 0.
        cap: largest weight.
        floor: smallest weight.
        normalize: see ``_finished``.

    Raises:
        ConfigError: bounds in the wrong order.
    """
    _check_bounds("tis", floor, cap)
    return _finished(jnp.clip(jnp.exp(tokens.spanned(tokens.mismatch, span)), floor, cap), tokens, span, normalize)


def icepop(
    tokens: Tokens, *, span: Span = "token", low: float = 0.5, high: float = 5.0, normalize: bool = False
) -> jax.Array:
    """k where low <= k <= high, and 0 elsewhere.

    IcePop (Ring-1T, arXiv 2510.18855). With ``span="product"`` and low = 0 it is what TRL does unasked where vLLM
    samples (``sequence_mask``, cap 3): whole sequences go.

    Args:
        tokens: see ``Tokens``.
        span: over what the ratio is taken.
        low: smallest ratio that counts, inclusive.
        high: largest ratio that counts, inclusive.
        normalize: see ``_finished``.

    Raises:
        ConfigError: bounds in the wrong order.
    """
    _check_bounds("icepop", low, high)
    ratio = jnp.exp(tokens.spanned(tokens.mismatch, span))
    return _finished(jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0), tokens, span, normalize)


def kpop(tokens: Tokens, *, most: float = 0.05) -> jax.Array:
    """k where the binary KL is below ``most`` in both directions, and 0 elsewhere.

    KPop, by the authors of IcePop: a band of ratios drops rare tokens, whose ratios are large, and spares common ones,
    whose probabilities moved. The KL is that of "this token or another" under the proximal and the behaviour policy.

    Args:
        tokens: see ``Tokens``.
        most: nats, exclusive.
    """
    one, other = (binary_kl(*pair) for pair in _both_ways(tokens))
    return jnp.where((one < most) & (other < most), jnp.exp(tokens.mismatch), 0.0) * tokens.mask


def _finished(weights: jax.Array, tokens: Tokens, span: Span, normalize: bool) -> jax.Array:
    """0 where nothing was sampled, and if asked divided by the mean over the micro-batch, of tokens or of sequences.

    All 0 stays all 0. The mean makes the weight of a token depend on what else lies in its micro-batch.
    """
    weights = weights * tokens.mask
    if not normalize:
        return weights
    each = tokens.mask
    if span != "token":
        each = each / sequences.length(tokens.mask, tokens.segment_ids)
    mean = (weights * each).sum() / jnp.maximum(each.sum(), 1e-8)
    return weights / jnp.where(mean > 0, mean, 1.0)


def _both_ways(tokens: Tokens) -> tuple[tuple[jax.Array, jax.Array], ...]:
    pair = tokens.proximal_logprobs, tokens.behaviour_logprobs
    return pair, pair[::-1]


def _check_bounds(method: str, low: float, high: float) -> None:
    if not 0 <= low <= high:
        raise ConfigError(f"{method}: the bounds {low} and {high} of a ratio must rise and not be negative")

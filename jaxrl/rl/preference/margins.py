"""Losses of how far the chosen answer lies above the rejected one. Each [N], in nats, before the mean over pairs.

With h = beta (score of the chosen answer - score of the rejected one), the score being the log-ratio to the reference
unless another divergence is named (see ``Answers.score``).
"""

import math

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError
from jaxrl.rl.preference.records import MAX_EXPONENT, Divergence, Pairs


def sigmoid(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> jax.Array:
    """DPO (arXiv 2305.18290, equation 7): -ln σ(h); with label_smoothing e, cDPO: -(1 - e) ln σ(h) - e ln σ(-h).

    Without a reference (``PreferConfig.reference``) and with ``PreferConfig.sft_weight`` it is CPO (arXiv 2401.08417).
    """
    return _smoothed(beta * _margin(pairs, divergence, alpha), label_smoothing)


def sigmoid_norm(pairs: Pairs, *, beta: float = 0.1) -> jax.Array:
    """-ln σ(beta (log-ratio per token of the chosen - that of the rejected)): Tülu 3's length-normalised DPO."""
    return -jax.nn.log_sigmoid(beta * _margin_per_token(pairs))


def robust(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> jax.Array:
    """rDPO (arXiv 2403.00409): (-(1 - e) ln σ(h) + e ln σ(-h)) / (1 - 2e), unbiased if a share e of labels is flipped.

    Raises:
        ConfigError: ``label_smoothing`` not below a half.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"robust: label_smoothing={label_smoothing} must be at least 0 and below 0.5")
    h = beta * _margin(pairs, divergence, alpha)
    kept, flipped = -(1 - label_smoothing) * jax.nn.log_sigmoid(h), label_smoothing * jax.nn.log_sigmoid(-h)
    return (kept + flipped) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, *, beta: float = 0.1, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> jax.Array:
    """max(0, 1 - h) (SLiC-HF, arXiv 2305.10425, with the margin in units of 1 / beta)."""
    return jax.nn.relu(1 - beta * _margin(pairs, divergence, alpha))


def ipo(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    length_normalised: bool = True,
) -> jax.Array:
    """(h / beta - 1 / (2 beta))² (arXiv 2310.12036, equation 17); not prime-rl's mask of the same name.

    Args:
        length_normalised: scores per token, as in TRL and AReaL; the paper does not normalise.
    """
    if not length_normalised:
        return (_margin(pairs, divergence, alpha) - 0.5 / beta) ** 2
    chosen, rejected = (side.score(divergence, alpha) / side.lengths for side in (pairs.chosen, pairs.rejected))
    return (chosen - rejected - 0.5 / beta) ** 2


def exo_pair(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> jax.Array:
    """EXO on pairs (arXiv 2402.00856, equation 16): KL of (σ(h), σ(-h)) to (1 - e, e), e = label_smoothing.

    Raises:
        ConfigError: ``label_smoothing`` not between 0 and 1, where the KL would be infinite.
    """
    if not 0 < label_smoothing < 1:
        raise ConfigError(f"exo_pair: label_smoothing={label_smoothing} must be above 0 and below 1")
    h = beta * pairs.margin
    first = jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - math.log1p(-label_smoothing))
    return first + jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - math.log(label_smoothing))


def discopop(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> jax.Array:
    """The loss a language model discovered (arXiv 2406.08414, equation 5): -ln σ(h) where h is low, exp(-h) where it is
    high, blended by σ(h / tau)."""
    h = beta * _margin(pairs, divergence, alpha)
    low = -jax.nn.log_sigmoid(h) * jax.nn.sigmoid(-h / tau)
    return low + jnp.exp(jnp.minimum(jax.nn.log_sigmoid(h / tau) - h, MAX_EXPONENT))


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """AOT on pairs (arXiv 2406.05882): the margins of the policy above those of the reference as distributions, both
    sorted over the micro-batch. A pair's entry is that of its own place among the policy's margins."""
    policy = pairs.chosen.logprobs - pairs.rejected.logprobs
    reference = policy - pairs.margin
    return _smoothed(beta * _sorted_difference(policy, reference, pairs.present), label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """AOT on sets (arXiv 2406.05882): log-ratios of chosen answers above those of rejected ones, both sorted over the
    micro-batch. A pair's entry is that of its chosen answer's place."""
    difference = _sorted_difference(pairs.chosen.log_ratios, pairs.rejected.log_ratios, pairs.present)
    return _smoothed(beta * difference, label_smoothing)


def simpo(
    pairs: Pairs,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    length_normalised: bool = True,
) -> jax.Array:
    """SimPO (arXiv 2405.14734, equation 6): -ln σ(beta (ℓ⁺ - ℓ⁻) - gamma), ℓ the log-probability per token.

    Args:
        alpha: not 0, AlphaPO (arXiv 2501.03884): (1 - exp(-alpha ℓ)) / alpha in place of ℓ.
        length_normalised: False takes sums, as CPO does.
    """
    chosen, rejected = (
        side.logprobs / (side.lengths if length_normalised else 1) for side in (pairs.chosen, pairs.rejected)
    )
    if alpha:
        chosen, rejected = ((1 - jnp.exp(-alpha * value)) / alpha for value in (chosen, rejected))
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> jax.Array:
    """The odds-ratio term of ORPO (arXiv 2403.07691, equation 7): -beta ln σ(ln odds⁺ - ln odds⁻).

    The odds p / (1 - p) are of the probability per token. All of ORPO has ``PreferConfig.sft_weight = 1`` beside it.
    """

    def log_odds(mean: jax.Array) -> jax.Array:
        return mean - jnp.log1p(-jnp.exp(jnp.minimum(mean, -1e-7)))  # at 0 the odds are infinite

    chosen, rejected = (log_odds(side.logprobs / side.lengths) for side in (pairs.chosen, pairs.rejected))
    return -beta * jax.nn.log_sigmoid(chosen - rejected)


def _margin(pairs: Pairs, divergence: Divergence, alpha: float) -> jax.Array:
    return pairs.chosen.score(divergence, alpha) - pairs.rejected.score(divergence, alpha)


def _margin_per_token(pairs: Pairs) -> jax.Array:
    return pairs.chosen.log_ratios / pairs.chosen.lengths - pairs.rejected.log_ratios / pairs.rejected.lengths


def _smoothed(h: jax.Array, label_smoothing: float) -> jax.Array:
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def _sorted_difference(above: jax.Array, below: jax.Array, present: jax.Array) -> jax.Array:
    """The k-th smallest of ``above`` less the k-th smallest of ``below``, at the place of the former; [N]."""
    orders = [jnp.argsort(jnp.where(present > 0, values, jnp.inf)) for values in (above, below)]
    return jnp.zeros_like(above).at[orders[0]].set(above[orders[0]] - below[orders[1]])

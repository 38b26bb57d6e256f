"""Losses in which the chosen and the rejected answer each count by themselves. Each [N], before the mean over pairs.

With r⁺ and r⁻ = beta times the log-ratio of the chosen and of the rejected answer to the reference.
"""

import jax

from jaxrl.rl.preference import margins
from jaxrl.rl.preference.records import Pairs, mean_of


def nca_pair(pairs: Pairs, *, beta: float = 0.1) -> jax.Array:
    """NCA (arXiv 2402.05369): -ln σ(r⁺) - ½ ln σ(-r⁺) - ½ ln σ(-r⁻)."""
    good, bad = _rewards(pairs, beta)
    return -jax.nn.log_sigmoid(good) - 0.5 * (jax.nn.log_sigmoid(-good) + jax.nn.log_sigmoid(-bad))


def bco_pair(pairs: Pairs, *, beta: float = 0.1, shifted: bool = True) -> jax.Array:
    """BCO (arXiv 2404.04656): -ln σ(r⁺ - δ) - ln σ(δ - r⁻), δ the mean of all rewards of the micro-batch, a constant.

    Args:
        shifted: False sets δ = 0, as TRL's DPO trainer does.
    """
    good, bad = _rewards(pairs, beta)
    if not shifted:
        return -jax.nn.log_sigmoid(good) - jax.nn.log_sigmoid(-bad)
    shift = jax.lax.stop_gradient(mean_of(0.5 * (good + bad), pairs.present))
    return -jax.nn.log_sigmoid(good - shift) - jax.nn.log_sigmoid(shift - bad)


def sppo_hard(pairs: Pairs, *, beta: float = 0.1) -> jax.Array:
    """SPPO with certain wins (arXiv 2405.00675): (log-ratio⁺ - 1 / (2 beta))² + (log-ratio⁻ + 1 / (2 beta))².

    Verl-recipe's loss of that name is of single answers with a reward, see ``policy_losses``.
    """
    return (pairs.chosen.log_ratios - 0.5 / beta) ** 2 + (pairs.rejected.log_ratios + 0.5 / beta) ** 2


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> jax.Array:
    """APO-zero (arXiv 2408.06266): 1 - σ(r⁺) + σ(r⁻), which makes chosen answers likelier."""
    good, bad = _rewards(pairs, beta)
    return 1 - jax.nn.sigmoid(good) + jax.nn.sigmoid(bad)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> jax.Array:
    """APO-down (arXiv 2408.06266): σ(r⁺) + 1 - σ(r⁺ - r⁻), for chosen answers worse than the policy's own."""
    good, bad = _rewards(pairs, beta)
    return jax.nn.sigmoid(good) + 1 - jax.nn.sigmoid(good - bad)


def mpo(pairs: Pairs, *, beta: float = 0.1, sigmoid_weight: float = 0.8, bco_weight: float = 0.2) -> jax.Array:
    """MPO (arXiv 2411.10442): a weighted sum of DPO's loss and BCO's; ``PreferConfig.sft_weight = 1`` is its third."""
    return sigmoid_weight * margins.sigmoid(pairs, beta=beta) + bco_weight * bco_pair(pairs, beta=beta)


def _rewards(pairs: Pairs, beta: float) -> tuple[jax.Array, jax.Array]:
    return beta * pairs.chosen.log_ratios, beta * pairs.rejected.log_ratios

"""Generalised advantage estimation from a critic's values (arXiv 1506.02438, equation 16)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxrl.config import ConfigError
from jaxrl.rl.advantages.returns import discounted_sums, whitened
from jaxrl.rl.methods import not_negative
from jaxrl.rl.outcomes import Outcomes


def gae(
    outcomes: Outcomes, *, discount: float = 1.0, decay: float = 1.0, length_share: float = 0.0, whiten: bool = True
) -> list[np.ndarray]:
    """A_t = Σ (discount · decay)^l δ_{t + l}, δ_t = r_t + discount · V_{t + 1} - V_t, whitened over all tokens.

    Args:
        outcomes: ``values``.
        discount: γ.
        decay: λ; 1 is the return less the value, 0 the one-step error.
        length_share: α above 0 makes λ that of the length, 1 - 1 / (α · sampled tokens), at least 0, in the place of
            ``decay``: an error then counts over that share of any trajectory (VAPO, arXiv 2504.05118, section 4.1;
            there 0.05).
        whiten: as verl does.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.

    Raises:
        ConfigError: there is no critic; or ``length_share`` is negative, or given beside a ``decay``.
    """
    not_negative("gae", length_share=length_share)
    if length_share and decay != 1:
        raise ConfigError(f"gae: length_share={length_share} takes the place of decay={decay}; leave one of them out")
    decays = [decay_of_length(mask, length_share) if length_share else decay for mask in outcomes.masks]
    advantages, _ = advantages_and_returns(
        outcomes.rewards_by_token(), outcomes.need("values"), outcomes.masks, discount=discount, decay=decays
    )
    if whiten:
        return whitened(advantages, outcomes.trained_masks())
    return [values.astype(np.float32) for values in advantages]


def pf_ppo(
    outcomes: Outcomes,
    *,
    weight: Literal["power", "ends", "best"] = "power",
    power: float = 2.0,
    discount: float = 1.0,
    decay: float = 1.0,
) -> list[np.ndarray]:
    """``gae`` times how much a trajectory's reward is to be trusted, weights of mean 1 (PF-PPO, arXiv 2409.06957).

    verl draws the batch anew with these weights, with replacement; here a trajectory counts by its weight, which is
    what that draw does in expectation, for losses in proportion to the size of the advantage. The critic learns from
    all alike; in verl also from what was drawn.

    Args:
        outcomes: ``values``.
        weight: "power": |reward|^power (``pow`` of verl); "ends": 1 for the best and the worst of the batch, else 0
            (``max_min``); "best": 0.4 for the best, 0.1 for the others (``max_random``).
        power: see ``weight``.
        discount: as in ``gae``.
        decay: as in ``gae``.

    Returns:
        [T_i] float32 of each trajectory; all weights are 1 where all would be 0.

    Raises:
        ConfigError: there is no critic.
    """
    rewards = np.asarray(outcomes.rewards, np.float64)
    best = rewards == rewards.max(initial=-np.inf)
    weights = {
        "power": np.abs(rewards) ** power,
        "ends": (best | (rewards == rewards.min(initial=np.inf))).astype(np.float64),
        "best": np.where(best, 0.4, 0.1),
    }[weight]
    weights = weights / weights.mean() if weights.any() else np.ones(len(rewards))
    advantages = gae(outcomes, discount=discount, decay=decay)
    return [(each * values).astype(np.float32) for each, values in zip(weights, advantages, strict=True)]


def decay_of_length(mask: np.ndarray, share: float) -> float:
    """λ = 1 - 1 / (share · sampled tokens), 0 for trajectories of fewer than 1 / share of them."""
    return max(0.0, 1 - 1 / max(share * np.count_nonzero(mask), 1.0))


def advantages_and_returns(
    rewards: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    discount: float,
    decay: float | Sequence[float],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Advantages before whitening, and what a critic is to learn: advantage + value.

    Tokens the environment wrote are passed over: the next value of a sampled token is that of the next sampled one, and
    neither discount nor decay counts them.

    Args:
        rewards: of each trajectory [T_i]; those of tokens that were not sampled do not count.
        values: of each [T_i].
        masks: of each [T_i].
        discount: γ.
        decay: λ, of all trajectories or of each.

    Returns:
        Both [T_i] float64 of each trajectory, 0 where the mask is.
    """
    advantages, returns = [], []
    decays = [decay] * len(masks) if isinstance(decay, int | float) else decay
    for earned, value, mask, of_one in zip(rewards, values, masks, decays, strict=True):
        sampled = np.asarray(mask) > 0
        now = np.asarray(value, np.float64)[sampled]
        errors = np.asarray(earned, np.float64)[sampled] + discount * np.append(now[1:], 0.0)[: len(now)] - now
        of_tokens = np.zeros((2, len(sampled)))
        of_tokens[0, sampled] = discounted_sums(errors, discount * of_one)
        of_tokens[1, sampled] = of_tokens[0, sampled] + now
        advantages.append(of_tokens[0])
        returns.append(of_tokens[1])
    return advantages, returns

"""Generalised advantage estimation from a critic's values (arXiv 1506.02438, equation 16)."""

from collections.abc import Sequence

import numpy as np

from jaxrl.rl.advantages.returns import discounted_sums, whitened
from jaxrl.rl.outcomes import Outcomes


def gae(outcomes: Outcomes, *, discount: float = 1.0, decay: float = 1.0, whiten: bool = True) -> list[np.ndarray]:
    """A_t = Σ (discount · decay)^l δ_{t + l}, δ_t = r_t + discount · V_{t + 1} - V_t, whitened over all tokens.

    Args:
        outcomes: ``values``.
        discount: γ.
        decay: λ; 1 is the return less the value, 0 the one-step error.
        whiten: as verl does.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.

    Raises:
        ConfigError: there is no critic.
    """
    advantages, _ = advantages_and_returns(
        outcomes.rewards_by_token(), outcomes.need("values"), outcomes.masks, discount=discount, decay=decay
    )
    if whiten:
        return whitened(advantages, outcomes.trained_masks())
    return [values.astype(np.float32) for values in advantages]


def advantages_and_returns(
    rewards: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    discount: float,
    decay: float,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Advantages before whitening, and what a critic is to learn: advantage + value.

    Tokens the environment wrote are passed over: the next value of a sampled token is that of the next sampled one, and
    neither discount nor decay counts them.

    Args:
        rewards: of each trajectory [T_i]; those of tokens that were not sampled do not count.
        values: of each [T_i].
        masks: of each [T_i].
        discount: γ.
        decay: λ.

    Returns:
        Both [T_i] float64 of each trajectory, 0 where the mask is.
    """
    advantages, returns = [], []
    for earned, value, mask in zip(rewards, values, masks, strict=True):
        sampled = np.asarray(mask) > 0
        now = np.asarray(value, np.float64)[sampled]
        errors = np.asarray(earned, np.float64)[sampled] + discount * np.append(now[1:], 0.0)[: len(now)] - now
        of_tokens = np.zeros((2, len(sampled)))
        of_tokens[0, sampled] = discounted_sums(errors, discount * decay)
        of_tokens[1, sampled] = of_tokens[0, sampled] + now
        advantages.append(of_tokens[0])
        returns.append(of_tokens[1])
    return advantages, returns

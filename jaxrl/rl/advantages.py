"""Advantages of a group: how much better than its siblings a trajectory did. Host side, numpy.

One value a trajectory, the same for each of its tokens. They are computed over the trajectories that are
kept, as in rStar2-Agent (arXiv 2508.20722, equation 7).
"""

from typing import Literal

import numpy as np


def grpo(rewards: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """(reward - mean) / (std + epsilon), with the unbiased std (GRPO, arXiv 2402.03300; verl's conventions).

    Args:
        rewards: [G] of one group. A single trajectory has mean 0 and std 1 by convention.
        epsilon: 1e-6 in verl, 1e-4 in TRL.

    Returns:
        [G] float32; zeros if all rewards are equal and G > 1.
    """
    rewards = np.asarray(rewards, np.float64)
    deviation = rewards.std(ddof=1) if len(rewards) > 1 else 1.0
    return (_centered(rewards) / (deviation + epsilon)).astype(np.float32)


def dr_grpo(rewards: np.ndarray) -> np.ndarray:
    """reward - mean, not divided by the std (Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards: [G] of one group. A single trajectory has mean 0 by convention.

    Returns:
        [G] float32.
    """
    return _centered(np.asarray(rewards, np.float64)).astype(np.float32)


def group_advantages(rewards: np.ndarray, estimator: Literal["grpo", "dr_grpo"]) -> np.ndarray:
    """Advantages [G] float32 of the rewards [G] of one group's kept trajectories."""
    return {"grpo": grpo, "dr_grpo": dr_grpo}[estimator](rewards)


def _centered(rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean() if len(rewards) > 1 else rewards

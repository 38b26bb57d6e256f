"""How much better than its siblings a trajectory did: one value for each, the same for all its tokens.

Over the trajectories that are kept, as in rStar2-Agent (arXiv 2508.20722, equation 7). Standard deviations are the
unbiased ones, of n - 1. A trajectory that is alone in its group has mean 0 and std 1 by convention (verl), so that it
keeps its reward; ``alone="zero"`` makes it 0, as others do.
"""

import math
from typing import Literal

import numpy as np

from jaxrl.rl.outcomes import Outcomes

Alone = Literal["reward", "zero"]


def grpo(
    outcomes: Outcomes,
    *,
    epsilon: float = 1e-6,
    scale: Literal["group", "batch", "none"] = "group",
    alone: Alone = "reward",
) -> np.ndarray:
    """(reward - mean) / (std + epsilon) within the group (GRPO, arXiv 2402.03300).

    Args:
        outcomes: see ``Outcomes``.
        epsilon: 1e-6 in verl, 1e-4 in TRL.
        scale: whose std divides: that of the group; that of all rewards of the batch (``scale_rewards`` of TRL,
            Lite PPO, arXiv 2508.08221); or none, which is ``dr_grpo``.
        alone: what a trajectory without siblings gets: its reward (verl) or 0 (DARS).

    Returns:
        [N] float32; zeros in groups of more than one whose rewards are all equal.
    """
    values = centred(outcomes.rewards, outcomes, alone)
    if scale == "group":
        for rows in outcomes.by_group():
            values[rows] /= (outcomes.rewards[rows].std(ddof=1) if len(rows) > 1 else 1.0) + epsilon
    elif scale == "batch":
        values /= deviation(outcomes.rewards) + epsilon
    return values.astype(np.float32)


def dr_grpo(outcomes: Outcomes) -> np.ndarray:
    """reward - mean within the group, not divided by the std (Dr. GRPO, arXiv 2503.20783). [N] float32."""
    return centred(outcomes.rewards, outcomes).astype(np.float32)


def rloo(
    outcomes: Outcomes,
    *,
    alone: Alone = "reward",
    normalize: bool = False,
    epsilon: float = 1e-4,
    reward_low: float = -math.inf,
    reward_high: float = math.inf,
) -> np.ndarray:
    """reward - mean of the others' rewards (RLOO, arXiv 2402.14740), which is n / (n - 1) (reward - mean).

    Args:
        outcomes: see ``Outcomes``.
        alone: what a trajectory without siblings gets: its reward (``rloo`` of verl) or 0 (``rloo_vectorized``).
        normalize: whiten over the trajectories of the batch, with ``epsilon`` beside the std (TRL).
        epsilon: see ``normalize``.
        reward_low: rewards are clipped to at least this.
        reward_high: rewards are clipped to at most this.

    Returns:
        [N] float32.
    """
    rewards = np.clip(np.asarray(outcomes.rewards, np.float64), reward_low, reward_high)
    values = centred(rewards, outcomes, alone)
    for rows in outcomes.by_group():
        values[rows] *= len(rows) / max(len(rows) - 1, 1)
    if normalize:
        values = (values - values.mean()) / (deviation(values) + epsilon) if len(values) else values
    return values.astype(np.float32)


def opo(outcomes: Outcomes) -> np.ndarray:
    """reward - Σ length · reward / Σ length over the group (OPO, arXiv 2505.23585); a length is in sampled tokens.

    The baseline of least variance where every token's gradient has the same norm. [N] float32.
    """
    values = np.array(outcomes.rewards, np.float64)
    lengths = np.array([np.count_nonzero(mask) for mask in outcomes.masks], np.float64)
    for rows in outcomes.by_group():
        if len(rows) > 1 and lengths[rows].any():
            values[rows] -= np.average(values[rows], weights=lengths[rows])
    return values.astype(np.float32)


def gpg(outcomes: Outcomes, *, norm: float = 1.0) -> np.ndarray:
    """(N / trajectories with a reward other than 0) · (reward - mean) / norm (GPG, arXiv 2504.02546, as in verl).

    The factor undoes what trajectories without a gradient dilute. The paper counts those in groups with differing
    rewards; verl, and this, those whose own reward is not 0. [N] float32.
    """
    rewards = np.asarray(outcomes.rewards, np.float64)
    factor = len(rewards) / max(np.count_nonzero(rewards), 1)
    return (factor * centred(rewards, outcomes) / norm).astype(np.float32)


def pass_at_k(outcomes: Outcomes, *, scale: bool = True, epsilon: float = 1e-6) -> np.ndarray:
    """Best reward - second best, for the best of a group; 0 for the others (pass@k, arXiv 2503.19595).

    Called ``grpo_passk`` in verl, which fails on a trajectory without siblings; here it gets 0.

    Args:
        outcomes: see ``Outcomes``. Two that are equally good make all of the group 0.
        scale: divide by the std of the group.
        epsilon: beside the std.

    Returns:
        [N] float32.
    """
    values = np.zeros(len(outcomes.rewards))
    for rows in outcomes.by_group():
        if len(rows) > 1:
            rewards = np.asarray(outcomes.rewards[rows], np.float64)
            second, best = np.partition(rewards, -2)[-2:]
            values[rows[rewards.argmax()]] = (best - second) / (rewards.std(ddof=1) + epsilon if scale else 1.0)
    return values.astype(np.float32)


def max_rl(outcomes: Outcomes) -> np.ndarray:
    """(reward - mean) / mean within the group, 0 where the mean is not above 0 (MaxRL, arXiv 2602.02710).

    Rewards are 0 or 1: a problem that is solved in one of n tries then weighs n times one that always is, as the
    likelihood of a right answer asks for. [N] float32.
    """
    values = np.zeros(len(outcomes.rewards))
    for rows in outcomes.by_group():
        rewards = np.asarray(outcomes.rewards[rows], np.float64)
        if (mean := rewards.mean()) > 0:
            values[rows] = (rewards - mean) / mean
    return values.astype(np.float32)


def centred(rewards: np.ndarray, outcomes: Outcomes, alone: Alone = "reward") -> np.ndarray:
    """[N] float64: rewards less the mean of their group. Equal rewards give exact zeros."""
    values = np.array(rewards, np.float64)
    for rows in outcomes.by_group():
        if len(rows) > 1 or alone == "zero":
            values[rows] -= values[rows].mean() if np.ptp(values[rows]) else values[rows[0]]
    return values


def deviation(values: np.ndarray) -> float:
    """The unbiased standard deviation; 0 for fewer than two."""
    return float(np.asarray(values, np.float64).std(ddof=1)) if len(values) > 1 else 0.0

"""Preferences among the trajectories of a group, as advantages: learning from pairs that the policy has just played."""

import numpy as np
import scipy.special

from jaxrl.rl.outcomes import Outcomes


def online_dpo(outcomes: Outcomes, *, beta: float = 0.1) -> np.ndarray:
    """The slope of DPO's loss by the log-probability of a trajectory, over all pairs of its group with other rewards.

    Online DPO (arXiv 2402.04792): of a pair with h = beta (log-ratio of the better one to the reference - that of the
    other), beta σ(-h) for the better one and its negative for the other; the mean over the pairs of the group, times
    its trajectories. With ``loss = "reinforce"`` aggregated by ``sequence_sum`` and one update a step the gradient is
    that of the mean over groups of -ln σ(h), weighted by their sizes. TRL takes one pair of two trajectories.

    Args:
        outcomes: ``reference_ratios``.
        beta: how dearly the KL to the reference is paid for.

    Returns:
        [N] float32; 0 in a group of equal rewards.

    Raises:
        ConfigError: there are no ratios to a reference.
    """
    ratios = np.asarray(outcomes.need("reference_ratios"), np.float64)
    values = np.zeros(len(ratios))
    for rows in outcomes.by_group():
        better = outcomes.rewards[rows][:, None] > outcomes.rewards[rows][None]
        slopes = beta * better * scipy.special.expit(-beta * (ratios[rows][:, None] - ratios[rows][None]))
        values[rows] = (slopes.sum(axis=1) - slopes.sum(axis=0)) * (len(rows) / max(better.sum(), 1))
    return values.astype(np.float32)

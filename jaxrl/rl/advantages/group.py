"""How much better than its siblings a trajectory did: one value for each, the same for all its tokens.

Over the trajectories that are kept, as in rStar2-Agent (arXiv 2508.20722, equation 7).
"""

import numpy as np

from jaxrl.rl.outcomes import Outcomes


def grpo(outcomes: Outcomes, *, epsilon: float = 1e-6) -> np.ndarray:
    """(reward - mean) / (std + epsilon) within the group, with the unbiased std (GRPO, arXiv 2402.03300).

    Args:
        outcomes: a single trajectory of its group has mean 0 and std 1 by convention (verl).
        epsilon: 1e-6 in verl, 1e-4 in TRL.

    Returns:
        [N] float32; zeros in groups of more than one whose rewards are all equal.
    """
    values = _centered(outcomes)
    for rows in outcomes.by_group():
        values[rows] /= (outcomes.rewards[rows].std(ddof=1) if len(rows) > 1 else 1.0) + epsilon
    return values.astype(np.float32)


def dr_grpo(outcomes: Outcomes) -> np.ndarray:
    """reward - mean within the group, not divided by the std (Dr. GRPO, arXiv 2503.20783).

    Args:
        outcomes: a single trajectory of its group has mean 0 by convention.

    Returns:
        [N] float32.
    """
    return _centered(outcomes).astype(np.float32)


def _centered(outcomes: Outcomes) -> np.ndarray:
    values = np.array(outcomes.rewards, np.float64)
    for rows in outcomes.by_group():
        if len(rows) > 1:
            values[rows] -= values[rows].mean()
    return values

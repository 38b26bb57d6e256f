"""Rewards above the value of the best policy that stays near a reference."""

import numpy as np
import scipy.special

from jaxrl.config import ConfigError
from jaxrl.rl.outcomes import Outcomes


def optimal_value(outcomes: Outcomes, *, beta: float = 0.5) -> np.ndarray:
    """R - V*, V* = beta ln E exp(R / beta) over what the reference would write (A*-PO, arXiv 2505.20686, equation 2).

    V* is what the best policy earns that pays beta for a nat of KL to the reference: between the mean reward (beta
    large) and the largest (beta small). The paper, and TRL's ``A2PO``, sample it from the reference for every problem
    beforehand; here it is taken over the group, whose trajectories count by their weight of importance π_ref / π, which
    sum to 1 and are equal in the first step. To be used with ``loss = "a_star_po"``.

    Args:
        outcomes: ``reference_ratios``.
        beta: β₁ of the paper; 0.5 in TRL.

    Returns:
        [N] float32.

    Raises:
        ConfigError: there are no ratios to a reference, or ``beta`` is not above 0.
    """
    if beta <= 0:
        raise ConfigError(f"optimal_value: beta={beta} must be above 0")
    ratios = np.asarray(outcomes.need("reference_ratios"), np.float64)
    values = np.array(outcomes.rewards, np.float64)
    for rows in outcomes.by_group():
        weights = scipy.special.log_softmax(-ratios[rows])
        values[rows] -= beta * scipy.special.logsumexp(weights + values[rows] / beta)
    return values.astype(np.float32)

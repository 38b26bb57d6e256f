"""Advantages that are scaled over all trajectories of the batch rather than those of a group."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxrl.rl.advantages.group import centred, deviation
from jaxrl.rl.advantages.returns import discounted_sums, whitened
from jaxrl.rl.outcomes import Outcomes


def reinforce_plus_plus(outcomes: Outcomes, *, discount: float = 1.0) -> list[np.ndarray]:
    """What is still to come from each token, whitened over all tokens (REINFORCE++, arXiv 2501.03262).

    Tokens the environment wrote are passed over: they take no part in the discount. [T_i] float32 of each trajectory.
    """
    returns = []
    for rewards, mask in zip(outcomes.rewards_by_token(), outcomes.masks, strict=True):
        sampled = np.asarray(mask) > 0
        values = np.zeros(len(sampled))
        values[sampled] = discounted_sums(rewards[sampled], discount)
        returns.append(values)
    return whitened(returns, outcomes.trained_masks())


def reinforce_plus_plus_baseline(outcomes: Outcomes) -> list[np.ndarray]:
    """reward - mean of the group, whitened over all tokens (REINFORCE++ with baseline, arXiv 2501.03262).

    [T_i] float32 of each trajectory.
    """
    return _whitened_over_tokens(centred(outcomes.rewards, outcomes), outcomes)


def gdpo(
    outcomes: Outcomes, *, epsilon: float = 1e-6, over: Literal["tokens", "trajectories"] = "tokens"
) -> Sequence[np.ndarray | float]:
    """Every reward component by itself as in GRPO, their weighted sum whitened over the batch (GDPO, arXiv 2601.05242).

    So that components of small spread are not drowned by one of large spread. A trajectory to which a component gave
    none (nan) gets nothing from it and is not in that component's mean and std.

    Args:
        outcomes: ``components`` and their weights.
        epsilon: beside every std; 1e-6 in verl, 1e-4 in TRL.
        over: what the batch is made of: its tokens (verl), or its trajectories (``normalize_then_sum`` of TRL).

    Returns:
        [T_i] float32 of each trajectory, or one number for each.

    Raises:
        ConfigError: there are no components.
    """
    total = np.zeros(len(outcomes.rewards))
    scored = np.zeros(len(outcomes.rewards), bool)
    for name, rewards in outcomes.need("components").items():
        given = ~np.isnan(rewards)
        scored |= given
        for rows in outcomes.by_group():
            rows = rows[given[rows]]
            values = np.asarray(rewards[rows], np.float64)
            spread = deviation(values) if len(rows) > 1 else 1.0
            mean = values.mean() if len(rows) > 1 else 0.0
            total[rows] += outcomes.component_weights.get(name, 1.0) * (values - mean) / (spread + epsilon)
    if over == "tokens":
        return _whitened_over_tokens(total, outcomes)
    values = np.zeros(len(total))
    if scored.any():
        values[scored] = (total[scored] - total[scored].mean()) / (deviation(total[scored]) + epsilon)
    return values.astype(np.float32)


def _whitened_over_tokens(values: np.ndarray, outcomes: Outcomes) -> list[np.ndarray]:
    on_tokens = [np.full(len(mask), value) for value, mask in zip(values, outcomes.masks, strict=True)]
    return whitened(on_tokens, outcomes.trained_masks())

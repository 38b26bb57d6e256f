"""Several agents in one episode: who is compared with whom."""

import numpy as np

from jaxrl.rl.outcomes import Outcomes, indices_of


def hierarchical(outcomes: Outcomes, *, proposer: str = "proposer") -> np.ndarray:
    """reward - mean of those that had the same task: proposers within the group, others within their episode and role.

    Hierarchical GRPO of prime-rl: proposers write tasks for one and the same prompt, so they compete over the group;
    solvers face the task of their own episode, and only those of the same episode are comparable.

    Args:
        outcomes: ``roles`` and ``episodes``.
        proposer: the role that is centred over the group.

    Returns:
        [N] float32; one that is alone keeps its reward.

    Raises:
        ConfigError: there are no roles or no episodes.
    """
    roles, episodes = np.asarray(outcomes.need("roles")), np.asarray(outcomes.need("episodes"))
    values = np.array(outcomes.rewards, np.float64)
    proposes = roles == proposer
    tasks = np.char.add(
        np.where(proposes, "group ", "episode "), np.where(proposes, outcomes.groups, episodes).astype(str)
    )
    for rows in indices_of(np.char.add(np.char.add(tasks, " "), roles)):
        if len(rows) > 1:
            values[rows] -= values[rows].mean()
    return values.astype(np.float32)

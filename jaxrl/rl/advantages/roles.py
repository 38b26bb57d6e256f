"""Several agents in one episode: who is compared with whom."""

import numpy as np

from jaxrl.config import ConfigError
from jaxrl.rl.advantages.running import Remembered
from jaxrl.rl.outcomes import Outcomes, indices_of


def hierarchical(outcomes: Outcomes, *, proposer: str = "proposer") -> Remembered:
    """reward - mean of those that had the same task: proposers within the group, others within their episode and role.

    Hierarchical GRPO of prime-rl: proposers write tasks for one and the same prompt, so they compete over the group;
    solvers face the task of their own episode, and only those of the same episode are comparable.

    Args:
        outcomes: ``roles`` and ``episodes``.
        proposer: the role that is centred over the group.

    Returns:
        [N] float32; one that is alone keeps its reward. The memory says whether there has been a proposer: filters may
        leave out all of a step.

    Raises:
        ConfigError: there are no roles or no episodes, or never was a proposer.
    """
    roles, episodes = np.asarray(outcomes.need("roles")), np.asarray(outcomes.need("episodes"))
    values = np.array(outcomes.rewards, np.float64)
    proposes, remembered = roles == proposer, f"hierarchical/{proposer}"
    found = max(float(proposes.any()), outcomes.memory.get(remembered, 0.0))
    if (roles != "").any() and not found:
        raise ConfigError(
            f"hierarchical compares those of the role {proposer!r} over the group, but nobody has it: there are "
            f"{', '.join(np.unique(roles))}; set AlgorithmConfig.advantage_settings['proposer'] to one of them"
        )
    tasks = np.char.add(
        np.where(proposes, "group ", "episode "), np.where(proposes, outcomes.groups, episodes).astype(str)
    )
    for rows in indices_of(np.char.add(np.char.add(tasks, " "), roles)):
        if len(rows) > 1:
            values[rows] -= values[rows].mean()
    return Remembered(values.astype(np.float32), {**outcomes.memory, remembered: found})

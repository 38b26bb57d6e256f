"""Baselines that come from somewhere else than the siblings: a greedy rollout, or the steps before."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrl.rl.outcomes import Outcomes, indices_of


@dataclasses.dataclass(frozen=True)
class Remembered:
    """Advantages of a method with a memory.

    Attributes:
        values: one entry a trajectory, a number or [T_i].
        memory: numbers by name, which the method finds in ``Outcomes.memory`` at the next step, also after a resume.
    """

    values: Sequence[np.ndarray | float]
    memory: Mapping[str, float]


def remax(outcomes: Outcomes) -> list[np.ndarray]:
    """What is still to come from each token, less the reward of a greedy rollout (ReMax, arXiv 2310.10505).

    [T_i] float32 of each trajectory; 0 where the environment wrote the token.

    Raises:
        ConfigError: no greedy trajectories were played.
    """
    advantages = []
    greedy = outcomes.need("greedy_rewards")
    for rewards, mask, baseline in zip(outcomes.rewards_by_token(), outcomes.masks, greedy, strict=True):
        sampled = np.asarray(mask) > 0
        to_come = np.cumsum(np.where(sampled, rewards, 0.0)[::-1])[::-1]
        advantages.append(np.where(sampled, to_come - baseline, 0.0).astype(np.float32))
    return advantages


def rae(outcomes: Outcomes, *, decay: float = 0.95) -> Remembered:
    """reward - running mean of the agent's rewards (role-conditioned advantage, SPIRAL, arXiv 2506.24119).

    The running mean b of each role begins at 0; a step makes it decay · b + (1 - decay) · (mean reward of the role in
    this batch) and then subtracts it. The source does so trajectory by trajectory, which depends on their order. For
    games in which what one agent wins the other loses, a group has no common mean.

    Args:
        outcomes: all trajectories are of one role where ``roles`` is None.
        decay: what is kept of the running mean.

    Returns:
        [N] float32, with the running means as memory.
    """
    rewards = np.asarray(outcomes.rewards, np.float64)
    roles = np.full(len(rewards), "") if outcomes.roles is None else np.asarray(outcomes.roles)
    memory, values = dict(outcomes.memory), np.zeros(len(rewards))
    for rows in indices_of(roles):
        name = f"rae/{roles[rows[0]]}"
        memory[name] = decay * memory.get(name, 0.0) + (1 - decay) * float(rewards[rows].mean())
        values[rows] = rewards[rows] - memory[name]
    return Remembered(values.astype(np.float32), memory)

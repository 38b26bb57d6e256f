"""Credit along a tree of shared prefixes: a node is worth the mean reward of the trajectories that pass through it.

A turn that several trajectories share stands in each of their rows, with the same advantage; summed over the rows it
counts as often as leaves hang below it.
"""

import numpy as np

from jaxrl.rl.advantages.group import centred
from jaxrl.rl.outcomes import Outcomes

FLAT = 1e-6
"""A spread of values below this is none."""


def tree_depth(outcomes: Outcomes, *, clip: float = 5.0, epsilon: float = 1e-8, once: bool = False) -> list[np.ndarray]:
    """(value - mean) / (std + epsilon) of a turn's node, among the nodes of its depth (BranchGRPO, arXiv 2509.06040).

    Carried over from steps of denoising to turns: depth is the number of the turn. Nodes count once in mean and std,
    however many trajectories share them; 0 where a depth has one node, or nodes of equal value.

    Args:
        outcomes: ``turns`` and ``nodes``.
        clip: largest absolute advantage.
        epsilon: beside the std.
        once: divide by the trajectories that share the node, so that every edge of the tree counts once.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.
    """
    worth, shared = _worth(outcomes)
    paths = outcomes.need("nodes")
    advantages: dict[int, float] = {}
    for rows in outcomes.by_group():
        for depth in range(max((len(paths[row]) for row in rows), default=0)):
            nodes = sorted({int(paths[row][depth]) for row in rows if depth < len(paths[row])})
            values = np.array([worth[node] for node in nodes])
            spread = values.std(ddof=1) if len(nodes) > 1 else 0.0
            scaled = (values - values.mean()) / (spread + epsilon) if spread >= FLAT else np.zeros(len(nodes))
            advantages |= dict(zip(nodes, np.clip(scaled, -clip, clip).tolist(), strict=True))
    return outcomes.on_turns(
        [np.array([advantages[node] / (shared[node] if once else 1) for node in map(int, path)]) for path in paths]
    )


def tree_sibling(outcomes: Outcomes, *, once: bool = False) -> list[np.ndarray]:
    """value of a turn's node - value of the node before it: what the turn did to the chances.

    The first turn starts from the mean of the group, so along a trajectory the advantages add up to reward - mean. 0
    where no sibling branched off.

    Args:
        outcomes: ``turns`` and ``nodes``.
        once: divide by the trajectories that share the node, so that every edge of the tree counts once.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.
    """
    worth, shared = _worth(outcomes)
    roots = np.asarray(outcomes.rewards, np.float64) - centred(outcomes.rewards, outcomes)
    values = []
    for root, path in zip(roots, outcomes.need("nodes"), strict=True):
        along = np.array([root, *(worth[int(node)] for node in path)])
        values.append(np.diff(along) / (np.array([shared[int(node)] for node in path], float) if once else 1.0))
    return outcomes.on_turns(values)


def _worth(outcomes: Outcomes) -> tuple[dict[int, float], dict[int, int]]:
    """Of every node, the mean reward of the trajectories through it, and how many they are."""
    rewards: dict[int, list[float]] = {}
    for reward, path in zip(outcomes.rewards, outcomes.need("nodes"), strict=True):
        for node in path:
            rewards.setdefault(int(node), []).append(float(reward))
    return {node: float(np.mean(of)) for node, of in rewards.items()}, {node: len(of) for node, of in rewards.items()}

"""How far behind the trained weights the weights were that sampled a trajectory, in versions.

A trajectory may have been sampled by several versions, when weights were handed over in its middle; its oldest token
decides whether it may still be trained on. Dropping by the oldest token and bounding what is played ahead follow AReaL
(arXiv 2505.24298, section 5.1).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxrl.records import Trajectory


def oldest(trajectory: Trajectory, version: int) -> int:
    """Versions between the oldest sampled token and ``version``; 0 where nothing was sampled."""
    sampled = trajectory.versions[trajectory.mask > 0]
    return version - int(sampled.min()) if len(sampled) else 0


def young(trajectories: Iterable[Trajectory], version: int, limit: int) -> tuple[Trajectory, ...]:
    """Those whose oldest token is at most ``limit`` versions behind."""
    return tuple(trajectory for trajectory in trajectories if oldest(trajectory, version) <= limit)


def figures(fresh: Sequence[Trajectory], dropped: int, version: int) -> dict[str, float]:
    """What to show of a step: ``dropped_share`` of all trajectories; of the others ``mean`` over the sampled tokens,
    ``max`` and ``mixed_share``, those that several versions sampled. Names begin with "staleness/"."""
    sampled = [trajectory.versions[trajectory.mask > 0] for trajectory in fresh]
    behind = version - np.concatenate([np.zeros(0, np.int32), *sampled])
    shown = {"dropped_share": dropped / max(dropped + len(fresh), 1)}
    if len(behind):
        shown |= {"mean": float(behind.mean()), "max": float(behind.max())}
        shown["mixed_share"] = sum(len(set(one.tolist())) > 1 for one in sampled) / len(fresh)
    return {f"staleness/{name}": value for name, value in shown.items()}

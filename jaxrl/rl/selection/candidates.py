"""What a method that chooses among the trajectories of a group sees."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.records import Trajectory


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The trajectories of one group that may be trained on.

    Attributes:
        trajectories: G of them, in the order of their sample index.
        keep: how many to keep; 0 = all.
        rng: source of draws, the same for the same draw of a problem.
    """

    trajectories: Sequence[Trajectory]
    keep: int
    rng: np.random.Generator

    @property
    def correct(self) -> np.ndarray:
        """[G] bool."""
        return np.array([trajectory.correct for trajectory in self.trajectories], bool)

    @property
    def rewards(self) -> np.ndarray:
        """[G] float."""
        return np.array([trajectory.reward for trajectory in self.trajectories], np.float64)

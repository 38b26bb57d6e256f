"""What an advantage sees: the trajectories of one optimizer update and what became of them. Host side, numpy."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """N trajectories that are trained on together. Groups may have any sizes, and any order.

    Attributes:
        rewards: [N] float.
        groups: [N] int; trajectories with the same number answer the same problem.
        masks: of each trajectory [T_i], 1 where the policy sampled the token.
    """

    rewards: np.ndarray
    groups: np.ndarray
    masks: Sequence[np.ndarray]

    def by_group(self) -> Iterator[np.ndarray]:
        """Indices of the trajectories of each group."""
        for group in np.unique(self.groups):
            yield np.flatnonzero(self.groups == group)

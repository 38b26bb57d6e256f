"""The functions that a run's configuration names, made once: a file of the user's is executed here and not again."""

import dataclasses

from jaxrl.config import Config
from jaxrl.rl import algorithm, selection
from jaxrl.rl.outcomes import Recorded
from jaxrl.train.session import what_is_recorded


@dataclasses.dataclass(frozen=True)
class Methods:
    """What every step of a run goes by on the host. Made by ``methods_of``.

    Attributes:
        rules: choose what is trained on.
        recorded: what trajectories hold for the advantage.
        advantage: makes advantages of it.
    """

    rules: selection.Chooser
    recorded: Recorded
    advantage: algorithm.Advantage


def methods_of(config: Config) -> Methods:
    """The methods that ``AlgorithmConfig`` and ``RewardConfig`` name.

    Raises:
        ConfigError: see ``algorithm.check``.
    """
    recorded = what_is_recorded(config)
    return Methods(selection.chooser(config.algorithm), recorded, algorithm.advantage(config.algorithm, recorded))

"""How many more trajectories a problem gets once its first ones are graded (DARS, arXiv 2508.13755).

Problems that are rarely solved weigh little in a group-relative loss: the advantages of a group of N with accuracy a
add up to N · S in absolute value, S = 2 a (1 - a) where rewards are only centred, 2 √(a (1 - a)) where they are divided
by the std as well. More trajectories lift a hard problem to the largest such sum, P = N / 2 or N, or to more than that.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

SOLVED = 0.5
"""From this accuracy on nothing is added."""
UNSOLVED = 1e-6
"""At most this accuracy counts as half a trajectory of those played."""


def dars_equal(correct: np.ndarray, *, most: int = 32, std: bool = False) -> int:
    """Every problem below one half gets what lifts it to P: ⌈(P - N S) / S⌉ ("ET").

    Args:
        correct: [N] bool, of the first trajectories.
        most: of all trajectories of the problem, the first included.
        std: the advantage divides by the std.

    Returns:
        Trajectories to add.
    """
    return extra_samples(_accuracy(correct), len(correct), most, std=std, hard=False)


def dars_hard(correct: np.ndarray, *, most: int = 64, std: bool = False) -> int:
    """The harder the more: ⌈(2 (1 - a) P - N S) / S⌉ ("HW"); arguments as for ``dars_equal``."""
    return extra_samples(_accuracy(correct), len(correct), most, std=std, hard=True)


def extra_samples(accuracy: float, first: int, most: int, *, std: bool, hard: bool) -> int:
    """The schedules on an accuracy between 0 and 1. ``first`` is N; see ``dars_equal``."""
    if accuracy >= SOLVED or first < 1:
        return 0
    accuracy = accuracy if accuracy > UNSOLVED else 0.5 / first
    product = accuracy * (1 - accuracy)
    weight, peak = (2 * math.sqrt(product), float(first)) if std else (2 * product, 0.5 * first)
    goal = 2 * (1 - accuracy) * peak if hard else peak
    return max(0, min(math.ceil((goal - first * weight) / weight), most - first))


def _accuracy(correct: np.ndarray) -> float:
    return float(np.mean(correct)) if len(correct) else 1.0


EXTRA_SAMPLES: Mapping[str, Callable[..., int]] = {"dars_equal": dars_equal, "dars_hard": dars_hard}

"""Advantages by name: each a function of ``Outcomes`` whose keyword arguments are its settings.

It gives back one entry a trajectory: a number, which counts for all its tokens, or an array [T_i], one for each.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrl.rl.advantages.group import dr_grpo, grpo

ADVANTAGES: Mapping[str, Callable[..., Sequence[np.ndarray | float]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
}

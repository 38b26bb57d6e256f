"""Advantages by name: each a function of ``Outcomes`` whose keyword arguments are its settings.

It gives back one entry a trajectory: a number, which counts for all its tokens, or an array [T_i], one for each. A
method with a memory gives them back as ``Remembered``.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrl.rl.advantages.batch import gdpo, reinforce_plus_plus, reinforce_plus_plus_baseline
from jaxrl.rl.advantages.gae import gae, pf_ppo
from jaxrl.rl.advantages.group import dr_grpo, gpg, grpo, max_rl, opo, pass_at_k, rloo
from jaxrl.rl.advantages.optimal_value import optimal_value
from jaxrl.rl.advantages.preferred import nash_md, online_dpo, xpo
from jaxrl.rl.advantages.roles import hierarchical
from jaxrl.rl.advantages.running import Remembered, rae, remax
from jaxrl.rl.advantages.steps import gigpo, step_and_episode, turn_level
from jaxrl.rl.advantages.taught import self_distillation
from jaxrl.rl.advantages.token_baseline import optimal_token_baseline
from jaxrl.rl.advantages.tree import tree_depth, tree_sibling

ADVANTAGES: Mapping[str, Callable[..., Sequence[np.ndarray | float] | Remembered]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "opo": opo,
    "gpg": gpg,
    "pass_at_k": pass_at_k,
    "max_rl": max_rl,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gdpo": gdpo,
    "remax": remax,
    "rae": rae,
    "hierarchical": hierarchical,
    "gigpo": gigpo,
    "step_and_episode": step_and_episode,
    "turn_level": turn_level,
    "tree_depth": tree_depth,
    "tree_sibling": tree_sibling,
    "gae": gae,
    "pf_ppo": pf_ppo,
    "online_dpo": online_dpo,
    "xpo": xpo,
    "nash_md": nash_md,
    "optimal_value": optimal_value,
    "self_distillation": self_distillation,
    "optimal_token_baseline": optimal_token_baseline,
}

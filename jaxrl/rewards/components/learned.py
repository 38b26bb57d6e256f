"""What a reward model says that ``jaxrl prefer`` trained."""

import asyncio

import numpy as np

from jaxrl.rewards.graded import Graded
from jaxrl.rewards.learned import loaded


async def reward_model(graded: Graded, *, folder: str = "") -> float:
    """The number of a reward model at the episode's last token; other episodes go on meanwhile.

    Args:
        graded: its tokens must be of the tokenizer that the model was trained with.
        folder: the export of a run of kind "reward".
    """
    model = await asyncio.to_thread(loaded, folder)
    return await asyncio.to_thread(model.of_trajectory, graded.trajectory)


async def process_reward(graded: Graded, *, folder: str = "") -> np.ndarray:
    """[policy turns]: the chance that each turn is right, by a process reward model at the turn's last token.

    Args:
        graded: as for ``reward_model``.
        folder: the export of a run of kind "process".
    """
    model = await asyncio.to_thread(loaded, folder)
    return await asyncio.to_thread(model.of_turns, graded.trajectory)

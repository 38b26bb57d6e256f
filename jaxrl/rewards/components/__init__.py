"""Reward components by name: each a function of ``Graded`` whose keyword arguments are its settings.

It gives back a number; or an array [policy turns], one number for each turn, which reaches advantages that credit
turns; or None where it has nothing to say. One that is asynchronous and rewards turns says so by its return type,
np.ndarray.
"""

from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from jaxrl.rewards.components.execution import correct_then_fast, execution_prediction
from jaxrl.rewards.components.judged import error_location, flawed_positive
from jaxrl.rewards.components.learned import process_reward, reward_model
from jaxrl.rewards.components.outcome import correct, form, length, overlong
from jaxrl.rewards.components.tools import calls_of_turns, tool_use, turn_bonus

Value = float | np.ndarray | None

COMPONENTS: Mapping[str, Callable[..., Value | Awaitable[Value]]] = {
    "correct": correct,
    "form": form,
    "length": length,
    "overlong": overlong,
    "tool_use": tool_use,
    "turn_bonus": turn_bonus,
    "calls_of_turns": calls_of_turns,
    "flawed_positive": flawed_positive,
    "error_location": error_location,
    "correct_then_fast": correct_then_fast,
    "execution_prediction": execution_prediction,
    "reward_model": reward_model,
    "process_reward": process_reward,
}

OF_MODELS = ("reward_model", "process_reward")
"""Those that ask the reward model in their setting ``folder``."""

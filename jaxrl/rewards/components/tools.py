"""What the use of tools is worth."""

import numpy as np

from jaxrl.records import ToolStatus
from jaxrl.rewards.graded import Graded


def tool_use(graded: Graded, *, without: float = 0.0) -> float:
    """Share of calls that succeeded, in [0, 1]; ``without`` where none was made. A fault of ours is no call."""
    statuses = [call.status for call in graded.trajectory.calls if call.status is not ToolStatus.INFRA_ERROR]
    return sum(status is ToolStatus.OK for status in statuses) / len(statuses) if statuses else without


def turn_bonus(graded: Graded, *, each: float = 0.1, most: float = 0.4) -> float:
    """For a wrong answer ``each`` for every turn that called tools, at most ``most``; 0 for a correct one.

    verl's recipe for ReTool: with 1 and -1 for the answer, a wrong one is worth min(-0.6, -1 + 0.1 · tool turns).
    """
    if graded.trajectory.correct:
        return 0.0
    return min(most, each * sum(bool(turn.calls) for turn in graded.trajectory.turns))


def calls_of_turns(graded: Graded, *, good: float = 1.0, bad: float = 0.0, silent: float = 0.0) -> np.ndarray:
    """[policy turns]: ``good`` for a turn all of whose calls succeeded, ``bad`` for one with a failed call.

    The reward of a turn in MT-GRPO (arXiv 2505.11821) for tools that answer or fail; ``silent`` is of turns without a
    call.
    """
    turns = [turn for turn in graded.trajectory.turns if turn.author == "policy"]
    failed = [any(call.status.is_error for call in turn.calls) for turn in turns]
    return np.array([silent if not t.calls else bad if f else good for t, f in zip(turns, failed, strict=True)], float)

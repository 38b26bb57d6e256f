"""A judge by rule, where the preset ``fapo`` would ask a model; ``benchmarks/presets.py`` names it."""

from jaxrl.records import Trajectory
from jaxrl.statuses import ToolStatus


async def failed_before_it_answered(trajectory: Trajectory) -> str:
    """An answer is flawed if a call of its failed."""
    failed = any(call.status is not ToolStatus.OK for call in trajectory.calls)
    return f"step \\boxed{{{0 if failed else -1}}}"

"""Trajectories that are left out of a group, or stay in it without weight, whatever their reward: by name."""

from collections.abc import Callable, Mapping

from jaxrl.records import StopReason, Trajectory


def truncated(trajectory: Trajectory) -> bool:
    """Cut off by the token budget (overlong filtering, DAPO, arXiv 2503.14476, section 3.4)."""
    return trajectory.stop_reason is StopReason.MAX_TOKENS


def turn_limit(trajectory: Trajectory) -> bool:
    """Ended because it may take no further turn."""
    return trajectory.stop_reason is StopReason.MAX_TURNS


def wall_clock(trajectory: Trajectory) -> bool:
    """Ran out of time, which depends on the machine."""
    return trajectory.stop_reason is StopReason.WALL_CLOCK


def void_turn(trajectory: Trajectory) -> bool:
    """A turn neither calls nor answers (SimpleTIR, arXiv 2509.02479)."""
    return trajectory.stop_reason is StopReason.NO_CALL


def no_valid_call(trajectory: Trajectory) -> bool:
    """No call could be run, be it that there was none (VerlTool masks those)."""
    return all(call.status.is_unreadable for call in trajectory.calls)


def unreadable_call(trajectory: Trajectory) -> bool:
    """A call could not be run."""
    return any(call.status.is_unreadable for call in trajectory.calls)


def failed_call(trajectory: Trajectory) -> bool:
    """A call failed, for any reason but a fault of ours."""
    return any(call.status.is_error for call in trajectory.calls)


FILTERS: Mapping[str, Callable[[Trajectory], bool]] = {
    "truncated": truncated,
    "turn_limit": turn_limit,
    "wall_clock": wall_clock,
    "void_turn": void_turn,
    "no_valid_call": no_valid_call,
    "unreadable_call": unreadable_call,
    "failed_call": failed_call,
}

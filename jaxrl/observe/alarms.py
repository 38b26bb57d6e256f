"""Alarms: signs in the metrics that a run is going wrong, as pure functions of its history.

Each takes the metrics of all steps so far, oldest first, by the names of ``metrics.episode_pairs``, and returns a
message or None. Means over a window are compared, because single steps are noisy.
"""

import math
from collections.abc import Mapping, Sequence

History = Sequence[Mapping[str, float | None]]

WINDOW = 10
"""Steps that are averaged."""
PASS_RATE_FALL = 0.15
"""Pass rate lost since the best window."""
CALLS_LEFT = 0.25
"""Share of the best window's tool calls that remain."""
CAPPED_SHARE = 0.3
"""Share of episodes cut off at the token budget."""
REPEATED_CALL_SHARE = 0.3
"""Share of tool calls that repeat an earlier one of their episode."""


def pass_rate_falling(history: History) -> str | None:
    """The pass rate lies well below its best window."""
    windows = _windows(history, "pass_rate")
    if not windows or max(windows) - windows[-1] <= PASS_RATE_FALL:
        return None
    return (
        f"pass rate fell from {max(windows):.0%} to {windows[-1]:.0%} (means of {WINDOW} steps, limit "
        f"{PASS_RATE_FALL:.0%}); lower OptimizerConfig.learning_rate and go back with --step best"
    )


def tool_calls_vanishing(history: History) -> str | None:
    """The policy has almost stopped calling tools."""
    windows = _windows(history, "calls")
    if not windows or windows[-1] >= CALLS_LEFT * max(windows):
        return None
    return (
        f"tool calls fell from {max(windows):.2f} to {windows[-1]:.2f} an episode (means of {WINDOW} steps); "
        "the policy gives up on its tool: read the episodes, check that calls succeed and that reward needs them"
    )


def lengths_at_cap(history: History) -> str | None:
    """Many responses are cut off by the token budget."""
    windows = _windows(history, "capped_share")
    if not windows or windows[-1] <= CAPPED_SHARE:
        return None
    return (
        f"{windows[-1]:.0%} of the responses are cut off at the token budget (mean of {WINDOW} steps, limit "
        f"{CAPPED_SHARE:.0%}); raise EngineConfig.max_response_tokens, or look for endless repetition in the episodes"
    )


def calls_repeated(history: History) -> str | None:
    """The policy makes the same call over and over."""
    windows = _windows(history, "repeated_call_share")
    if not windows or windows[-1] <= REPEATED_CALL_SHARE:
        return None
    return (
        f"{windows[-1]:.0%} of the tool calls repeat an earlier call of their episode to the letter (mean of "
        f"{WINDOW} steps, limit {REPEATED_CALL_SHARE:.0%}); read the episodes: is the tool's answer cut, or empty?"
    )


def not_finite(history: History) -> str | None:
    """The last update's loss or gradient is no number."""
    last = history[-1] if history else {}
    for name in ("nll", "loss", "grad_norm"):
        value = last.get(name, 0.0)
        if value is None or not math.isfinite(value):
            shown = "not finite" if value is None else value
            return f"{name} is {shown}; lower OptimizerConfig.learning_rate and resume from the last checkpoint"
    return None


ALARMS = {
    "pass_rate_falling": pass_rate_falling,
    "tool_calls_vanishing": tool_calls_vanishing,
    "lengths_at_cap": lengths_at_cap,
    "calls_repeated": calls_repeated,
    "not_finite": not_finite,
}


def ringing(history: History) -> dict[str, str]:
    """The messages of all alarms that hold now, by alarm name."""
    messages = {name: alarm(history) for name, alarm in ALARMS.items()}
    return {name: message for name, message in messages.items() if message is not None}


def new_alarms(history: History) -> dict[str, str]:
    """The alarms that the last step set off: those that held before it are left out, so each is told once."""
    before = ringing(history[:-1]) if history else {}
    return {name: message for name, message in ringing(history).items() if name not in before}


def _windows(history: History, name: str) -> list[float]:
    """Means of ``name`` over every full window; steps without it are passed over."""
    values = [value for row in history if (value := row.get(name)) is not None and math.isfinite(value)]
    return [sum(values[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(values) + 1)]

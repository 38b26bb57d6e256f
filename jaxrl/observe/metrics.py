"""Metrics as (sum, count) pairs, and seconds by phase.

A mean of means weighs a half-empty batch like a full one; pairs are added and divided once, when they are shown.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from jaxrl.records import RewardStatus, StopReason, Trajectory

Pair = tuple[float, float]

SECONDS = "seconds/"
"""Metric names under this prefix are wall-clock seconds of one phase."""


class Accumulator:
    """Adds up pairs under their names."""

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add ``count`` observations that sum to ``total``."""
        old_total, old_count = self._pairs.get(name, (0.0, 0.0))
        self._pairs[name] = (old_total + float(total), old_count + float(count))

    def merge(self, pairs: Mapping[str, Pair]) -> None:
        """Add every pair of ``pairs``."""
        for name, (total, count) in pairs.items():
            self.add(name, total, count)

    def pairs(self) -> dict[str, Pair]:
        return dict(self._pairs)

    def means(self) -> dict[str, float]:
        """Sum over count of every name; names nothing was counted for are left out, not reported as 0."""
        return means(self._pairs)


def means(pairs: Mapping[str, Pair]) -> dict[str, float]:
    """Sum over count of every pair with a count."""
    return {name: total / count for name, (total, count) in pairs.items() if count}


def episode_pairs(trajectories: Iterable[Trajectory], max_response_tokens: int | None = None) -> dict[str, Pair]:
    """What a set of episodes says about the policy, as pairs.

    Episodes that cannot train (a fault of ours, a verifier that crashed or ran out of time) count in ``infra_share``
    and nowhere else.

    Args:
        max_response_tokens: response budget; with it ``capped_share`` also counts responses of that length that ended
            for another reason.

    Returns:
        pass_rate                    share of episodes answered correctly
        response_tokens              tokens of a response, tool output included
        policy_tokens                tokens of a response that the policy wrote
        capped_share                 share of episodes cut off by the token budget
        answered_share               share of episodes that ended with an answer
        turns                        policy turns of an episode
        calls                        tool calls of an episode
        call_share                   share of episodes with at least one call
        tool_error_share             share of tool calls that failed, the model's fault only
        tool_error_share_in_correct  the same among correctly answered episodes (what Resample-on-Correct lowers;
                                     rStar2-Agent, arXiv:2508.20722)
        repeated_call_share          share of calls that repeat an earlier call of their episode to the letter
        tool_seconds                 execution seconds of a call
        infra_share                  share of episodes left out through faults of ours
    """
    total = Accumulator()
    for trajectory in trajectories:
        total.add("infra_share", not trajectory.trainable)
        if not trajectory.trainable:
            continue
        tokens = len(trajectory.ids)
        capped = trajectory.stop_reason is StopReason.MAX_TOKENS
        total.add("pass_rate", trajectory.correct)
        total.add("response_tokens", tokens)
        total.add("policy_tokens", int(trajectory.mask.sum()))
        total.add("capped_share", capped or (max_response_tokens is not None and tokens >= max_response_tokens))
        total.add("answered_share", trajectory.reward_status is not RewardStatus.NO_ANSWER)
        total.add("turns", trajectory.policy_turns)
        calls = trajectory.calls
        total.add("calls", len(calls))
        total.add("call_share", bool(calls))
        errors = sum(call.status.is_error for call in calls)
        total.add("tool_error_share", errors, len(calls))
        if trajectory.correct:
            total.add("tool_error_share_in_correct", errors, len(calls))
        distinct = {(call.name, repr(sorted(call.arguments.items()))) for call in calls}
        total.add("repeated_call_share", len(calls) - len(distinct), len(calls))
        total.add("tool_seconds", sum(call.seconds for call in calls), len(calls))
    return total.pairs()


class PhaseTimer:
    """Wall-clock seconds by phase. Time inside a nested phase belongs to the inner one only, so phases add up.

    Args:
        on_phase: called with the name of the phase that is running from now on; "" between phases.
        clock: seconds that never run backwards.
    """

    def __init__(
        self, on_phase: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_phase = on_phase or (lambda name: None)
        self._clock = clock
        self._stack: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the ``with`` block under ``name``, also when the block raises."""
        self._settle()
        self._stack.append(name)
        self._on_phase(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()
            self._on_phase(self._stack[-1] if self._stack else "")

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, running phases included; counting starts again at zero."""
        self._settle()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _settle(self) -> None:
        """Credit the time since the last change to the phase on top."""
        now = self._clock()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """The phases among ``metrics``, without their prefix, in order."""
    return {name.removeprefix(SECONDS): value for name, value in metrics.items() if name.startswith(SECONDS)}

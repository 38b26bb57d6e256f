"""What a pool has done so far and what it is doing, as records; counted when results arrive, never while code runs."""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Mapping

from jaxrl.statuses import ToolStatus

LATENCY_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values lay between two bounds each."""

    bounds: tuple[float, ...]  # upper ends, rising; a value equal to one belongs below it
    counts: tuple[int, ...]  # one more than bounds: the last is of all larger values
    total: float  # sum of the values

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclasses.dataclass(frozen=True)
class WardenMetrics:
    """What one warden says of itself. Counted from its start; a replaced warden begins anew."""

    waiting: int = 0  # calls without a slot
    oldest_submitted: float | None = None  # time.monotonic() of the oldest among them
    running: int = 0
    sessions: int = 0  # live ones
    rss_kib: int = 0
    template_rss_kib: tuple[int, ...] = ()  # of each ready template, pages shared with its stem included
    template_restarts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by reason


@dataclasses.dataclass(frozen=True)
class Metrics:
    """A pool at one moment. Counts and sums are of the pool's whole life unless a line says otherwise."""

    calls: Mapping[ToolStatus, int]  # finished, by status
    cancelled: int
    latency: Histogram  # seconds from submission to result, of finished calls
    cpu_seconds: float  # sums over finished calls
    wall_seconds: float
    queue_seconds: float
    waiting: int  # calls submitted and not begun, before the pool's door and behind it
    oldest_waiting_seconds: float  # 0 where none waits
    running: int
    warden_restarts: int
    warden_rss_kib: int
    template_rss_kib: tuple[int, ...]  # of each ready template
    template_restarts: Mapping[str, int]  # by reason, since the present warden began
    sessions: int  # live ones


class Recorder:
    """Counts what ends."""

    def __init__(self) -> None:
        self.calls: Counter[ToolStatus] = Counter()
        self.cancelled = 0
        self.warden_restarts = 0
        self._latencies = [0] * (len(LATENCY_BOUNDS) + 1)
        self._latency = self._cpu = self._wall = self._queue = 0.0

    def finished(self, status: ToolStatus, latency: float, cpu: float, wall: float, queue: float) -> None:
        """Note one result; all times in seconds."""
        self.calls[status] += 1
        self._latencies[bisect.bisect_left(LATENCY_BOUNDS, latency)] += 1
        self._latency += latency
        self._cpu += cpu
        self._wall += wall
        self._queue += queue

    def snapshot(self, warden: WardenMetrics, at_door: int, oldest_at_door: float | None, now: float) -> Metrics:
        """The record of this moment.

        Args:
            at_door: calls that wait for admission, and when the oldest of them was submitted.
            now: time.monotonic().
        """
        since = [moment for moment in (oldest_at_door, warden.oldest_submitted) if moment is not None]
        return Metrics(
            calls=dict(self.calls),
            cancelled=self.cancelled,
            latency=Histogram(LATENCY_BOUNDS, tuple(self._latencies), self._latency),
            cpu_seconds=self._cpu,
            wall_seconds=self._wall,
            queue_seconds=self._queue,
            waiting=at_door + warden.waiting,
            oldest_waiting_seconds=max(now - min(since), 0.0) if since else 0.0,
            running=warden.running,
            warden_restarts=self.warden_restarts,
            warden_rss_kib=warden.rss_kib,
            template_rss_kib=warden.template_rss_kib,
            template_restarts=warden.template_restarts,
            sessions=warden.sessions,
        )

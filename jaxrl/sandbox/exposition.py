"""A pool's metrics in Prometheus' text format."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import CollectorRegistry

from jaxrl.sandbox.metrics import Histogram, Metrics
from jaxrl.statuses import ToolStatus

_PREFIX = "jaxrl_sandbox_"
_KIB = 1024
_STATUSES = (
    ToolStatus.OK,
    ToolStatus.ERROR,
    ToolStatus.TIMEOUT,
    ToolStatus.OUT_OF_MEMORY,
    ToolStatus.OUTPUT_LIMIT,
    ToolStatus.INFRA_ERROR,
)


def render(metrics: Metrics, refused: Mapping[int, int], open_sessions: int) -> bytes:
    """The text of one scrape.

    Args:
        refused: requests that were not run, by HTTP status.
        open_sessions: that are kept for clients.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(metrics, refused, open_sessions))
    return generate_latest(registry)


class _Snapshot:
    """What prometheus_client asks a collector to be."""

    def __init__(self, metrics: Metrics, refused: Mapping[int, int], open_sessions: int) -> None:
        self._metrics = metrics
        self._refused = refused
        self._open_sessions = open_sessions

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counters("calls", "Calls that ended.", "status", {s: metrics.calls.get(s, 0) for s in _STATUSES})
        yield _counters("refused_requests", "Requests not run.", "code", {str(k): n for k, n in self._refused.items()})
        reasons = metrics.template_restarts
        yield _counters("template_restarts", "Templates replaced since the warden began.", "reason", reasons)
        yield CounterMetricFamily(_PREFIX + "cancelled", "Calls whose caller left.", metrics.cancelled)
        yield CounterMetricFamily(_PREFIX + "warden_restarts", "Wardens replaced.", metrics.warden_restarts)
        yield CounterMetricFamily(_PREFIX + "cpu_seconds", "CPU time of ended calls.", metrics.cpu_seconds)
        yield CounterMetricFamily(_PREFIX + "wall_seconds", "Wall time of ended calls.", metrics.wall_seconds)
        yield CounterMetricFamily(_PREFIX + "queue_seconds", "Time that ended calls waited.", metrics.queue_seconds)
        yield _histogram("latency_seconds", "From submission to result.", metrics.latency)
        oldest = metrics.oldest_waiting_seconds
        yield GaugeMetricFamily(_PREFIX + "waiting_calls", "Calls that have not begun.", metrics.waiting)
        yield GaugeMetricFamily(_PREFIX + "oldest_waiting_seconds", "Age of the oldest of them.", oldest)
        yield GaugeMetricFamily(_PREFIX + "running_calls", "Calls that run.", metrics.running)
        yield GaugeMetricFamily(_PREFIX + "sessions", "Live sessions.", metrics.sessions)
        yield GaugeMetricFamily(_PREFIX + "open_sessions", "Sessions kept for clients.", self._open_sessions)
        yield GaugeMetricFamily(_PREFIX + "templates", "Templates that are ready.", len(metrics.template_rss_kib))
        resident = GaugeMetricFamily(_PREFIX + "resident_bytes", "Memory; templates share pages.", labels=["process"])
        resident.add_metric(["warden"], metrics.warden_rss_kib * _KIB)
        resident.add_metric(["templates"], sum(metrics.template_rss_kib) * _KIB)
        yield resident


def _counters(name: str, words: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, words, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, words: str, histogram: Histogram) -> Metric:
    below, buckets = 0, []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, below))
    return HistogramMetricFamily(_PREFIX + name, words, buckets=buckets, sum_value=histogram.total)

"""What an engine has done, in sums that add up over engines, and the figures that follow from them."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Counters:
    """Sums since the engine was made; seconds are wall time of one engine.

    Attributes:
        serving_seconds: time in which device work could have been done.
        preemptions: times a sequence gave its pages back in the middle.
        pages, pages_used, queued, admitted: the state now.
    """

    opened: int = 0
    rounds: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    slot_steps: int = 0
    prefill_tokens: int = 0
    prefill_calls: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    serving_seconds: float = 0.0
    queue_seconds: float = 0.0
    longest_queue_seconds: float = 0.0
    preemptions: int = 0
    pages: int = 0
    pages_used: int = 0
    queued: int = 0
    admitted: int = 0


def total(counters: Sequence[Counters]) -> Counters:
    """The sums of several engines together."""
    names = [field.name for field in dataclasses.fields(Counters)]
    summed = Counters(**{name: sum(getattr(one, name) for one in counters) for name in names})
    summed.longest_queue_seconds = max(one.longest_queue_seconds for one in counters)
    return summed


def figures(counters: Counters) -> dict[str, float]:
    """The counters by name, and what follows from them.

    ``occupancy`` is the share of slot-steps that sampled a token, ``idle_share`` the share of serving time in which
    the devices had nothing to do.
    """
    busy, serving = counters.decode_seconds + counters.prefill_seconds, counters.serving_seconds
    return dataclasses.asdict(counters) | {
        "occupancy": counters.decode_tokens / counters.slot_steps if counters.slot_steps else 0.0,
        "mean_queue_seconds": counters.queue_seconds / counters.opened if counters.opened else 0.0,
        "idle_share": max(0.0, 1 - busy / serving) if serving else 0.0,
    }

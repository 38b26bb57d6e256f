"""What a cluster pool has done on its nodes, and how it ended: what travels between the two, in batches."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.protocol import Call, CellHead, Limits, Outcome, Report
from jaxrl.sandbox.result import Result, fault

Outcomes = Result | Report | tuple[int, ...]  # of a call, of a cell, and ids of the processes that a fork made


class CallOrder(NamedTuple):
    """A call: the arguments of ``Pool.run`` under the cluster's own number."""

    id: int
    code: str
    stdin: str | bytes
    echo: bool
    limits: Limits
    tenant: str
    files: Mapping[str, bytes] | None
    wanted: tuple[str, ...]
    language: str | Language
    processes: bool

    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.code) + len(self.stdin) + sum(map(len, (self.files or {}).values()))

    def failed(self, reason: str) -> Outcomes:
        """How it ended where its node could not do it, but others of its kind."""
        return fault(reason, attempts=1)


class ReplayOrder(NamedTuple):
    """A cell of a session that keeps no process: a call that runs the cells before it too."""

    id: int
    call: Call

    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.call.code) + len(self.call.files)

    def failed(self, reason: str) -> Outcomes:
        """How it ended where its node could not do it, but others of its kind."""
        return fault(reason, attempts=1)


class CellOrder(NamedTuple):
    """A cell of a live session, whose process bears the cluster's number on its node too."""

    id: int
    call: Call
    head: CellHead

    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.call.code) + len(self.call.files)

    def failed(self, reason: str) -> Outcomes:
        """How it ended where its node could not do it, but others of its kind: its process is given up."""
        return lost(self.call, reason)


class ForkOrder(NamedTuple):
    """Copies of a session's process, and the numbers they shall bear."""

    id: int
    process: int
    copies: tuple[int, ...]

    def size(self) -> int:
        """About how many bytes it takes."""
        return 8 * len(self.copies)

    def failed(self, reason: str) -> Outcomes:
        """No copy was made, so each begins from the history."""
        return ()


class EndOrder(NamedTuple):
    """The end of a session's process."""

    id: int
    process: int

    def size(self) -> int:
        """About how many bytes it takes."""
        return 8

    def failed(self, reason: str) -> Outcomes:
        """Nothing is answered either way."""
        return ()


Order = CallOrder | ReplayOrder | CellOrder | ForkOrder | EndOrder


class Answer(NamedTuple):
    """How an order ended: with an outcome, by a fault of the node's own, refused, or none of it where cancelled."""

    id: int
    outcome: Outcomes | None
    fault: str = ""  # there is no pool on the node any more
    refusal: Exception | None = None  # SandboxUnavailable or ValueError: what is wrong with the order

    def size(self) -> int:
        """About how many bytes it takes."""
        if isinstance(self.outcome, Result):
            return len(self.outcome.stdout) + len(self.outcome.stderr) + sum(map(len, self.outcome.files.values()))
        if isinstance(self.outcome, Report):
            return len(self.outcome.stdout) + len(self.outcome.stderr) + len(self.outcome.files)
        return len(self.fault)


def lost(call: Call, reason: str, *, attempts: int = 1) -> Report:
    """The report of a cell whose process is gone, for its session to make another.

    Args:
        attempts: which that has cost the cell; 0 where it cannot have begun.
    """
    return Report.without_run(call, Outcome.LOST, call.attempts + attempts, reason.encode())

"""Live sessions on a cluster: on which node each one's process is, and the way there.

A session's history is kept with its caller, as for a pool of this machine (``session``). So a node that is lost costs a
session no more than a process, and the next one may be on any node.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from jaxrl.sandbox.node_orders import CellOrder, EndOrder, ForkOrder, ReplayOrder, lost
from jaxrl.sandbox.protocol import Call, CellHead, Outcome, Report
from jaxrl.sandbox.result import Result, result_of
from jaxrl.sandbox.session import Backend

if TYPE_CHECKING:
    from jaxrl.sandbox.node_link import NodeLink

# So long a node that lost a new process is chosen last: keeping none, it would have the fewest and be given them all.
_DISTRUST_SECONDS = 30.0

Preference = Callable[["NodeLink"], tuple[int, ...]]


class ClusterSessions:
    """The processes of a cluster's sessions.

    Args:
        isolation: which walls stand around the code.
        check: raises RuntimeError where no more is taken.
        next_id: gives numbers that no order and no process has had.
        place: waits for room on a node, given a tenant's number and which nodes to prefer; None if there is no node for
            too long.
        run: has a call carried out.
        nowhere: why there is no node, where there is none.
    """

    def __init__(
        self,
        isolation: str,
        check: Callable[[], object],
        next_id: Callable[[], int],
        place: Callable[[int, Preference], Awaitable["NodeLink | None"]],
        run: Callable[[ReplayOrder], Awaitable[Result]],
        nowhere: str,
    ) -> None:
        self._isolation = isolation
        self._check = check
        self._next_id = next_id
        self._place = place
        self._run = run
        self._nowhere = nowhere
        # Of living nodes alone:
        self._homes: dict[int, NodeLink] = {}  # by process
        self._processes: Counter[NodeLink] = Counter()
        self._distrusted: dict[NodeLink, float] = {}  # until which time.monotonic(), for having lost a new process

    def forget(self, link: "NodeLink") -> None:
        """A node is lost, and with it the processes that it had."""
        self._homes = {process: home for process, home in self._homes.items() if home is not link}
        self._processes.pop(link, None)
        self._distrusted.pop(link, None)

    def backend(self) -> Backend:
        """What sessions are made of."""
        return Backend(
            check=self._check,
            taken=contextlib.nullcontext(),
            next_id=self._next_id,
            run=self._replay,
            submit=self._submit,
            fork=self._fork,
            end=self._end,
            result=self._result,
            cancelled=_nothing,
        )

    def _replay(self, call: Call) -> Awaitable[Result]:
        return self._run(ReplayOrder(call.id, call))

    async def _submit(self, call: Call, head: CellHead) -> Report:
        """Run a cell where its process is, or shall be; where that is lost the report says so."""
        if head.fresh:
            link = await self._place(call.tenant, self._prefer)
            if link is not None:
                self._settle(head.session, link)
        else:
            link = self._homes.get(head.session)
        if link is None:
            return lost(call, self._nowhere if head.fresh else "its node was lost", attempts=0)
        waited = time.monotonic() - call.submitted
        answer = await link.run(CellOrder(call.id, call, head), bound=not head.fresh)
        if answer.refusal is not None:
            raise answer.refusal
        report = answer.outcome if isinstance(answer.outcome, Report) else lost(call, f"{link.name}: {answer.fault}")
        self._learn(head, link, report)
        return report._replace(queue_seconds=report.queue_seconds + waited, node=link.name)

    def _prefer(self, link: "NodeLink") -> tuple[int, ...]:
        """Nodes that keep what they are given, then those with the fewest processes, then those with the most room."""
        is_trusted = self._distrusted.get(link, 0.0) < time.monotonic()
        return is_trusted, -self._processes[link], link.free

    def _learn(self, head: CellHead, link: "NodeLink", report: Report) -> None:
        if report.outcome is not Outcome.LOST:
            self._distrusted.pop(link, None)
        elif head.fresh and link.alive:
            self._distrusted[link] = time.monotonic() + _DISTRUST_SECONDS
        if report.lost or not (report.survived or head.checkpoint):
            self._leave(head.session)

    async def _fork(self, process: int, copies: list[int]) -> list[int]:
        link = self._homes.get(process)
        if link is None:
            return []
        answer = await link.run(ForkOrder(self._next_id(), process, tuple(copies)), bound=True)
        living = answer.outcome if isinstance(answer.outcome, tuple) else ()
        if not link.alive:
            return []
        for copy in living:
            self._settle(copy, link)
        return list(living)

    def _end(self, process: int) -> Awaitable[object] | None:
        link = self._leave(process)
        return None if link is None else link.send(EndOrder(self._next_id(), process), bound=True)

    def _settle(self, process: int, link: "NodeLink") -> None:
        self._homes[process] = link
        self._processes[link] += 1

    def _leave(self, process: int) -> "NodeLink | None":
        link = self._homes.pop(process, None)
        if link is not None:
            self._processes[link] -= 1
        return link

    def _result(self, report: Report, submitted: float, rebuilt: bool, replay_differs: bool) -> Result:
        return result_of(report, self._isolation, rebuilt=rebuilt, replay_differs=replay_differs)


def _nothing() -> None:
    """Cells are counted nowhere."""

"""One pool over many machines: calls go in batches to a pool on every node of a Ray cluster.

Ray places the pools and notices which die. Which call is where, whose turn it is and what has to be done again is
decided here, so that nothing is repeated unknown to us and every call ends exactly once.
"""

import asyncio
import dataclasses
import functools
import importlib.util
import itertools
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from jaxrl.config import ConfigError
from jaxrl.sandbox import arguments, jail, pool_arguments
from jaxrl.sandbox import files as file_bytes
from jaxrl.sandbox.admission import Admission, Starts, check_loop
from jaxrl.sandbox.cluster_sessions import ClusterSessions, Preference
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.node_orders import Answer, CallOrder, ReplayOrder
from jaxrl.sandbox.pool_settings import PoolSettings
from jaxrl.sandbox.protocol import Limits
from jaxrl.sandbox.result import Result, fault
from jaxrl.sandbox.session import Session, Terms
from jaxrl.statuses import ToolStatus

if TYPE_CHECKING:
    from jaxrl.sandbox.members import Members
    from jaxrl.sandbox.node_link import NodeLink

_ATTEMPTS = 3  # nodes that a call may lose before the fault is reported
_WINDOW = 4  # calls on a node for each that can run there: enough to keep it busy between two batches


class _Fault(NamedTuple):
    """Why a call has to be run again."""

    node: str
    reason: str
    attempts: int = 1  # it took there


class _Deserted(Exception):
    """There has been no node for too long."""


class ClusterPool:
    """A ``Pool`` on every node of a Ray cluster; ``run`` and ``session`` are those of one.

    A node that joins later is used; calls of a node or pool that is lost are run again elsewhere, and sessions rebuilt
    there. A call waits here until a node has room for it, tenants in turn, so that little is lost with a node.

    Args:
        address: of the cluster's head as "host:port", or "auto" for the cluster that this machine belongs to. This
            machine must be one of its nodes; it needs no CPUs there.
        limits, workers, slots, slow_slots, queue, preload, unsafe, heartbeat_seconds, processes_without_cgroup,
            program_folders, recycle_calls, recycle_growth_mib, session_memory_mib: of the pool on each node, as for
            ``Pool``. At most four times as many calls as can run at once wait on a node, also with a longer ``queue``.
        silence_seconds: a node that says nothing for so long counts as lost.
        patience_seconds: calls wait for so long for a cluster without any node, and then end as ``infra_error``.

    Raises:
        ConfigError: Ray is not installed.
        TypeError, ValueError: an argument is of a wrong kind or out of range, as in ``Pool``.
        SandboxUnavailable (on entering): no cluster at the address, no node, or a node without jail; with the remedy.
    """

    def __init__(
        self,
        address: str,
        limits: Limits | None = None,
        *,
        workers: int = 2,
        slots: int = 4,
        slow_slots: int = 8,
        queue: int = 4096,
        preload: tuple[str, ...] = ("numpy", "scipy", "sympy"),
        unsafe: bool = False,
        heartbeat_seconds: float = 8.0,
        processes_without_cgroup: bool = False,
        program_folders: tuple[str, ...] = (),
        recycle_calls: int = 100_000,
        recycle_growth_mib: int = 64,
        session_memory_mib: int = 4096,
        silence_seconds: float = 30.0,
        patience_seconds: float = 120.0,
    ) -> None:
        self._settings = PoolSettings(
            limits=Limits() if limits is None else limits,
            workers=workers,
            slots=slots,
            slow_slots=slow_slots,
            queue=queue,
            preload=preload,
            unsafe=unsafe,
            heartbeat_seconds=heartbeat_seconds,
            processes_without_cgroup=processes_without_cgroup,
            program_folders=program_folders,
            recycle_calls=recycle_calls,
            recycle_growth_mib=recycle_growth_mib,
            session_memory_mib=session_memory_mib,
        )
        arguments.above_zero("silence_seconds", silence_seconds)
        arguments.above_zero("patience_seconds", patience_seconds)
        _check_address(address)
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(f'SandboxConfig.cluster="{address}" needs Ray: pip install "jaxrl[ray]"')
        self.limits = self._settings.limits
        self.most: Limits | None = None
        self.isolation = jail.UNSAFE if unsafe else jail.JAILED
        self._address = address
        running = self._settings.running
        self._window = min(_WINDOW * running, running + queue)
        self._silence_seconds = silence_seconds
        self._patience_seconds = patience_seconds
        self._nowhere = f"no node for {patience_seconds:g} s"
        self._admission = Admission(0)
        self._ids = itertools.count(1)
        self._members: Members | None = None
        self._starts = Starts()
        self._loop: asyncio.AbstractEventLoop | None = None  # in which the pool was started, and not closed yet
        self._sessions = ClusterSessions(
            self.isolation,
            check=self._check_taking,
            next_id=functools.partial(next, self._ids),
            place=lambda tenant, prefer: self._place(tenant, (), prefer),
            run=self._replay,
            nowhere=self._nowhere,
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect, and start a pool on every node. Unless used as a context manager, call it; again does nothing."""
        from jaxrl.sandbox.members import Members  # loads Ray, which a process without a cluster never does

        check_loop(self._loop)
        async with self._starts.turn():
            if self._members is not None:
                return
            self._loop = asyncio.get_running_loop()
            self._members = Members(self._address, self._make_link, self._patience_seconds, self._give_up)
            try:
                await self._members.start()
            except BaseException:
                await self._shut()
                raise

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that take part just now."""
        return [] if self._members is None else [link.name for link in self._members.living]

    async def close(self) -> None:
        """Kill what still runs; its callers get a RuntimeError. Leaves no process on any node."""
        check_loop(self._loop)
        self._starts.close()
        await self._shut()

    async def _shut(self) -> None:
        members, self._members = self._members, None
        self._admission.dismiss(_was_closed)
        if members is not None:
            await members.close()
        self._loop = None

    async def run(
        self,
        code: str,
        stdin: str | bytes = "",
        echo: bool = True,
        limits: Limits | None = None,
        tenant: str = "",
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
        language: str | Language = "python",
        processes: bool = False,
    ) -> Result:
        """Run a snippet to its end, as ``Pool.run``; ``Result.node`` says where.

        Raises:
            ValueError: a file's path is not a plain relative one, the files are larger than the directory, or the
                pool on the node refuses other arguments.
            TypeError: an argument is of a wrong kind.
            RuntimeError: the pool is not open, closed meanwhile, or of another event loop.
            SandboxUnavailable: the node lacks what the language or processes need.
        """
        pool_arguments.check_call(code, stdin, echo, limits, tenant, files, wanted, language, processes)
        self._check_taking()
        limits = limits or self.limits
        if files:
            file_bytes.check(files, limits.disk_mib << 20)
        given = dict(files) if files else None  # as it is now, and whatever mapping it is
        order = CallOrder(next(self._ids), code, stdin, echo, limits, tenant, given, tuple(wanted), language, processes)
        turn = zlib.crc32(tenant.encode())
        submitted = time.monotonic()
        faults: tuple[_Fault, ...] = ()
        while (link := await self._place(turn, faults)) is not None:
            queued = time.monotonic() - submitted
            result, faults = self._weigh(await link.run(order), link, queued, faults)
            if result is not None:
                return result
        return self._infra_error(faults, time.monotonic() - submitted)

    def session(
        self, *, limits: Limits | None = None, tenant: str = "", checkpoint: bool = False, live: bool = True
    ) -> Session:
        """A notebook, as ``Pool.session``: on one node, and its copies there too; ``Result.node`` says where.

        Where the node is lost, or has no room for its process any more, it is rebuilt on a node with its next cell.

        Raises:
            TypeError, ValueError: as ``Pool.session``.
        """
        pool_arguments.check_session(limits, tenant, checkpoint, live)
        jailed = self.isolation != jail.UNSAFE
        terms = Terms(limits or self.limits, zlib.crc32(tenant.encode()), checkpoint, live and jailed)
        terms.check_memory(self._settings.session_memory_mib)
        return Session(self._sessions.backend(), terms)

    async def _replay(self, order: ReplayOrder) -> Result:
        """As ``run``, which would be larger for each of the tens of thousands that wait in it if both were one."""
        faults: tuple[_Fault, ...] = ()
        while (link := await self._place(order.call.tenant, faults)) is not None:
            queued = time.monotonic() - order.call.submitted
            result, faults = self._weigh(await link.run(order), link, queued, faults)
            if result is not None:
                return result
        return self._infra_error(faults, time.monotonic() - order.call.submitted)

    def _weigh(
        self, answer: Answer, link: "NodeLink", queued: float, faults: tuple[_Fault, ...]
    ) -> tuple[Result | None, tuple[_Fault, ...]]:
        """The result of a call, or None if it is to be run again elsewhere; and the faults it has met."""
        if answer.refusal is not None:
            raise answer.refusal
        if not isinstance(answer.outcome, Result):
            return None, (*faults, _Fault(link.name, answer.fault))
        result = dataclasses.replace(
            answer.outcome,
            attempts=answer.outcome.attempts + sum(loss.attempts for loss in faults),
            queue_seconds=answer.outcome.queue_seconds + queued,
            node=link.name,
        )
        faults += (_Fault(link.name, result.stderr, answer.outcome.attempts),)
        if result.status is ToolStatus.INFRA_ERROR and not set(self.nodes) <= {loss.node for loss in faults}:
            return None, faults  # there is a node where it has not failed
        return result, faults

    async def _place(
        self, turn: int, faults: tuple[_Fault, ...], prefer: Preference | None = None
    ) -> "NodeLink | None":
        """A node with room for a call or a new process; None if it has failed too often, or there is none for too long.

        Of several the one preferred most.
        """
        while len(faults) < _ATTEMPTS and self._members is not None and not self._members.deserted:
            try:
                await self._admission.enter(turn, first=len(faults) > 0)
            except _Deserted:
                break
            free = [link for link in self._members.living if link.free] if self._members is not None else []
            if free:
                return max(free, key=prefer or _but_where(faults))
            self._admission.leave()  # the node with this room has been lost meanwhile
        if self._members is None:
            raise _was_closed()
        return None

    def _check_taking(self) -> None:
        """Raise RuntimeError where no calls are taken now, or not here."""
        if self._members is None:
            raise RuntimeError("the sandbox pool is not open: use it inside `async with ClusterPool(...)`")
        check_loop(self._loop)

    def _make_link(self, node: str, name: str) -> "NodeLink":
        from jaxrl.sandbox.node_link import NodeLink

        return NodeLink(
            node,
            name,
            self._settings,
            self._window,
            self._silence_seconds,
            on_room=self._admission.leave,
            on_lost=self._sessions.forget,
        )

    def _give_up(self) -> None:
        self._admission.dismiss(_Deserted)

    def _infra_error(self, faults: tuple[_Fault, ...], queued: float) -> Result:
        reasons = [f"{loss.node}: {loss.reason}" for loss in faults]
        if len(faults) < _ATTEMPTS:
            reasons.append(self._nowhere)
        attempts = max(sum(loss.attempts for loss in faults), 1)
        return fault("\n".join(reasons), isolation=self.isolation, queue_seconds=queued, attempts=attempts)


def _but_where(faults: tuple[_Fault, ...]) -> Preference:
    """Any node rather than those where a call has failed, then the one with the most room."""
    failed = {loss.node for loss in faults}
    return lambda link: (link.name not in failed, link.free, -link.taken)


def _was_closed() -> RuntimeError:
    return RuntimeError("the sandbox pool was closed before this call had ended")


def _check_address(address: object) -> None:
    arguments.kind("address", address, str, 'str: "auto" or "host:port"')
    if address != "auto" and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise ValueError(f'cluster address {address!r} must be "auto" or "host:port", such as "10.0.0.1:6379"')

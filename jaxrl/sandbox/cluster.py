"""One pool over many machines: calls go in batches to a pool on every node of a Ray cluster.

Ray places the pools and notices which die. Which call is where, whose turn it is and what has to be done again is
decided here, so that nothing is repeated unknown to us and every call ends exactly once.
"""

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
from jaxrl.sandbox.admission import Admission
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.node import Order
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.protocol import Limits
from jaxrl.sandbox.result import Result, fault
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
    """A ``Pool`` on every node of a Ray cluster; ``run`` is that of one, sessions are not had.

    A node that joins later is used; calls of a node or pool that is lost are run again elsewhere. A call waits here
    until a node has room for it, tenants in turn, so that little is lost with a node.

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
        pool_arguments.check_pool(
            limits=limits,
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
        self.limits = limits or Limits()
        self.most: Limits | None = None
        self.isolation = jail.UNSAFE if unsafe else jail.JAILED
        self._address = address
        self._make_pool = functools.partial(
            Pool,
            self.limits,
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
        running = slots + slow_slots
        self._window = min(_WINDOW * running, running + queue)
        self._silence_seconds = silence_seconds
        self._patience_seconds = patience_seconds
        self._admission = Admission(0)
        self._ids = itertools.count(1)
        self._members: Members | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect, and start a pool on every node. Needed once, unless used as a context manager."""
        from jaxrl.sandbox.members import Members  # loads Ray, which a process without a cluster never does

        self._members = Members(self._address, self._make_link, self._patience_seconds, self._give_up)
        try:
            await self._members.start()
        except BaseException:
            await self.close()
            raise

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that take part just now."""
        return [] if self._members is None else [link.name for link in self._members.living]

    async def close(self) -> None:
        """Kill what still runs; its callers get a RuntimeError. Leaves no process on any node."""
        members, self._members = self._members, None
        self._admission.dismiss(_not_open)
        if members is not None:
            await members.close()

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
            RuntimeError: the pool is not open.
            SandboxUnavailable: the node lacks what the language or processes need.
        """
        pool_arguments.check_call(code, stdin, echo, limits, tenant, files, wanted, language, processes)
        limits = limits or self.limits
        if files:
            file_bytes.check(files, limits.disk_mib << 20)
        given = {path: bytes(content) for path, content in files.items()} if files else None
        order = Order(next(self._ids), code, stdin, echo, limits, tenant, given, tuple(wanted), language, processes)
        turn = zlib.crc32(tenant.encode())
        submitted = time.monotonic()
        faults: tuple[_Fault, ...] = ()
        while len(faults) < _ATTEMPTS:
            link = await self._place(turn, faults)
            if link is None:
                break
            queued = time.monotonic() - submitted
            answer = await link.run(order)
            if answer.refusal is not None:
                raise answer.refusal
            if answer.result is None:
                faults += (_Fault(link.name, answer.fault),)
                continue
            result = dataclasses.replace(
                answer.result,
                attempts=answer.result.attempts + sum(loss.attempts for loss in faults),
                queue_seconds=answer.result.queue_seconds + queued,
                node=link.name,
            )
            faults += (_Fault(link.name, result.stderr, answer.result.attempts),)
            if result.status is not ToolStatus.INFRA_ERROR or not self._elsewhere(faults):
                return result
        self._open_members()  # a pool that was closed meanwhile is no fault
        return self._infra_error(faults, time.monotonic() - submitted)

    async def _place(self, turn: int, faults: tuple[_Fault, ...]) -> "NodeLink | None":
        """A node with room for a call, rather one where it has not failed; None if there is no node for too long."""
        while not (members := self._open_members()).deserted:
            try:
                await self._admission.enter(turn, first=len(faults) > 0)
            except _Deserted:
                break
            free = [link for link in members.living if link.free]
            if free:
                failed = {loss.node for loss in faults}
                return max(free, key=lambda link: (link.name not in failed, link.free, -link.taken))
            self._admission.leave()  # the node with this room has been lost meanwhile
        return None

    def _elsewhere(self, faults: tuple[_Fault, ...]) -> bool:
        """Whether there is a node where the call has not failed."""
        return not set(self.nodes) <= {loss.node for loss in faults}

    def _open_members(self) -> "Members":
        if self._members is None:
            raise _not_open()
        return self._members

    def _make_link(self, node: str, name: str) -> "NodeLink":
        from jaxrl.sandbox.node_link import NodeLink

        return NodeLink(node, name, self._make_pool, self._window, self._silence_seconds, self._admission.leave)

    def _give_up(self) -> None:
        self._admission.dismiss(_Deserted)

    def _infra_error(self, faults: tuple[_Fault, ...], queued: float) -> Result:
        reasons = [f"{loss.node}: {loss.reason}" for loss in faults]
        if len(faults) < _ATTEMPTS:
            reasons.append(f"no node for {self._patience_seconds:g} s")
        attempts = max(sum(loss.attempts for loss in faults), 1)
        return fault("\n".join(reasons), isolation=self.isolation, queue_seconds=queued, attempts=attempts)


def _check_address(address: object) -> None:
    arguments.kind("address", address, str, 'str: "auto" or "host:port"')
    if address != "auto" and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise ValueError(f'cluster address {address!r} must be "auto" or "host:port", such as "10.0.0.1:6379"')


def _not_open() -> RuntimeError:
    return RuntimeError("the sandbox pool is not open: use it inside `async with ClusterPool(...)`")

"""Which nodes of a Ray cluster take part: those that are there, those that come later, without those that have gone."""

import asyncio
import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable

import ray

from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.node_link import NodeLink, NodeLost

_WATCH_SECONDS = 1.0
_REFUSED_SECONDS = 30.0  # a node whose pool does not start is asked again after so long
_CONNECT_SECONDS = 30.0
_KNOCK_SECONDS = 5.0


class Members:
    """The nodes with a pool.

    Args:
        address: of the cluster's head as "host:port", or "auto" for the cluster that this machine belongs to.
        make_link: makes the link to the pool of a node, of which it is given Ray's id and the name.
        patience_seconds: the cluster may be without any node for so long.
        on_deserted: called once when it has been without for longer.
    """

    def __init__(
        self,
        address: str,
        make_link: Callable[[str, str], NodeLink],
        patience_seconds: float,
        on_deserted: Callable[[], None],
    ) -> None:
        self._address = address
        self._make_link = make_link
        self._patience_seconds = patience_seconds
        self._on_deserted = on_deserted
        self._links: dict[str, NodeLink] = {}
        self._past: list[NodeLink] = []  # lost ones, which may still be killing what was there
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, float] = {}  # time.monotonic() from which on to ask again
        self._watcher: asyncio.Task[None] | None = None
        self._connected_here = False
        self.deserted = False

    @property
    def living(self) -> list[NodeLink]:
        return [link for link in self._links.values() if link.alive]

    async def start(self) -> None:
        """Connect to Ray, unless this process already is, and start a pool on every node.

        Raises:
            SandboxUnavailable: nothing answers at the address, or there is no node, or one has no jail. One that dies
                meanwhile does no harm, as long as there is another.
        """
        if not ray.is_initialized():
            await _connect(self._address)
            self._connected_here = True
        nodes = await asyncio.to_thread(_nodes)
        if not nodes:
            raise SandboxUnavailable(
                f"the Ray cluster at {self._address!r} has no node with CPUs: see `ray start --help`"
            )
        self._joining = {node: asyncio.create_task(self._join(node, name)) for node, name in nodes.items()}
        outcomes = await asyncio.gather(*self._joining.values(), return_exceptions=True)
        self._joining.clear()
        for error in filter(None, outcomes):
            if not isinstance(error, NodeLost):
                raise error
            if not self.living:
                raise SandboxUnavailable(str(error)) from error
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop every pool. Ray stays connected only if it was before."""
        tasks = [*self._joining.values(), *filter(None, [self._watcher])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in (*self._links.values(), *self._past)))
        self._links.clear()
        self._past.clear()
        if self._connected_here:
            self._connected_here = False
            await asyncio.to_thread(ray.shutdown)

    async def _join(self, node: str, name: str) -> None:
        self._forget(node)
        link = self._links[node] = self._make_link(node, name)
        await link.start()
        self.deserted = False

    async def _watch(self) -> None:
        last_seen = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            with contextlib.suppress(ray.exceptions.RayError):  # while the head is silent, the nodes stay as they are
                self._follow(await asyncio.to_thread(_nodes))
            if self.living:
                last_seen = time.monotonic()
            elif not self.deserted and time.monotonic() - last_seen > self._patience_seconds:
                self.deserted = True
                self._on_deserted()

    def _follow(self, nodes: dict[str, str]) -> None:
        """Give up links to nodes that have gone, begin ones to nodes that have none."""
        for node in self._links.keys() - nodes.keys():
            self._links[node].lose("the node has left the cluster")
            self._forget(node)
        for node, name in nodes.items():
            connected = node in self._links and self._links[node].alive
            refused = self._refused.get(node, 0.0) > time.monotonic()
            if not connected and not refused and node not in self._joining:
                self._joining[node] = asyncio.create_task(self._join_later(node, name))

    def _forget(self, node: str) -> None:
        if node in self._links:
            self._past = [link for link in (*self._past, self._links.pop(node)) if link.busy]

    async def _join_later(self, node: str, name: str) -> None:
        try:
            await self._join(node, name)
        except (SandboxUnavailable, NodeLost) as error:
            self._refused[node] = time.monotonic() + _REFUSED_SECONDS
            warnings.warn(f"not used for the sandbox: {error}", stacklevel=2)
        finally:
            del self._joining[node]


def _nodes() -> dict[str, str]:
    """Living nodes that offer CPUs: Ray's id and a name for people."""
    return {
        node["NodeID"]: f"{node['NodeName']}/{node['NodeID'][:8]}"
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }


async def _connect(address: str) -> None:
    remedy = 'start one with `ray start --head`, or set SandboxConfig.cluster="" to run on this machine alone'
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:  # Ray itself would go on asking for minutes
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), _KNOCK_SECONDS)
        except (OSError, ValueError) as error:
            reason = f"no Ray cluster answers at {address!r} ({error}); the address is host:port"
            raise SandboxUnavailable(f"{reason}; {remedy}") from error
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    try:
        await asyncio.wait_for(_initialize(address), _CONNECT_SECONDS)
    except TimeoutError as error:
        reason = f"what answers at {address!r} is no Ray cluster that lets us in within {_CONNECT_SECONDS:g} s"
        raise SandboxUnavailable(f"{reason}; {remedy}") from error
    except (ConnectionError, RuntimeError) as error:
        raise SandboxUnavailable(f"cannot join the Ray cluster at {address!r}: {error}; {remedy}") from error


async def _initialize(address: str) -> None:
    """Connect in a thread of its own: Ray blocks, may do so for ever, and leaves SIGTERM's handler alone only there."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def work() -> None:
        outcome = None
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=work, name="ray.init", daemon=True).start()
    await done

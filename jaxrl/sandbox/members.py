"""Which nodes of a Ray cluster take part: those that are there, those that come later, without those that have gone."""

import asyncio
import contextlib
import time
import warnings
from collections.abc import Callable

import ray

from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.node_link import NodeLink, NodeLost
from jaxrl.sandbox.ray_connection import CONNECTION

_WATCH_SECONDS = 1.0
_REFUSED_SECONDS = 30.0  # a node whose pool does not start is asked again after so long


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
        self.deserted = False

    @property
    def living(self) -> list[NodeLink]:
        return [link for link in self._links.values() if link.alive]

    async def start(self) -> None:
        """Connect to Ray, unless this process already is, and start a pool on every node.

        Raises:
            SandboxUnavailable: nothing answers at the address, or there is no node, or one has no jail or another
                jaxrl. One that dies meanwhile does no harm, as long as there is another.
        """
        await CONNECTION.enter(self, self._address)
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
        """Stop every pool. Ray stays connected where others use it, or did before."""
        tasks = [*self._joining.values(), *filter(None, [self._watcher])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in (*self._links.values(), *self._past)))
        self._links.clear()
        self._past.clear()
        await CONNECTION.leave(self)

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

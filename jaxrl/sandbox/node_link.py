"""The cluster pool's end of one node: makes the actor there, sends batches, matches answers to waiting callers."""

import asyncio
import contextlib
import pickle
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jaxrl import __version__
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.node import BATCH_BYTES, BATCH_CALLS, BATCH_SECONDS, NodePool
from jaxrl.sandbox.node_orders import Answer, Order
from jaxrl.sandbox.pool_settings import PoolSettings

_START_SECONDS = 300.0
_CLOSE_SECONDS = 15.0
_MOST_WORDS = 400
_UNWRITABLE = (TypeError, ValueError, AttributeError, pickle.PicklingError)  # what Ray raises for what it cannot pickle
_COLLECT_SECONDS = 1.0  # a node with nothing to tell says so this often


class NodeLost(Exception):
    """The node ended, or never came to life; says why."""


class NodeLink:
    """One node's pool. Ray neither restarts it nor repeats a batch: what was lost is the caller's to submit elsewhere.

    Args:
        node: Ray's id of the node, in hexadecimal.
        name: of the node, for people.
        settings: of the pool on the node.
        window: orders that may be there at once, running or waiting, besides those that could be nowhere else.
        silence_seconds: a node that says nothing for so long counts as lost.
        on_room: told by how many orders the room on this node grows, or shrinks.
        on_lost: told of this link when the node is given up or closed.
    """

    def __init__(
        self,
        node: str,
        name: str,
        settings: PoolSettings,
        window: int,
        silence_seconds: float,
        on_room: Callable[[int], None],
        on_lost: Callable[["NodeLink"], None],
    ) -> None:
        self.name = name
        self.alive = False
        self.taken = 0  # orders so far
        self._node = node
        self._settings = settings
        self._window = window
        self._silence_seconds = silence_seconds
        self._on_room = on_room
        self._on_lost = on_lost
        self._actor: Any = None
        self._pending: dict[int, asyncio.Future[Answer]] = {}  # by order
        self._bound: set[int] = set()  # of these, the ones that take no room
        self._outgoing: dict[int, Order] = {}
        self._outgoing_bytes = 0
        self._cancelled: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._flushed = 0.0  # time.monotonic() of the last batch
        self._collector: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def free(self) -> int:
        return self._window - len(self._pending) + len(self._bound) if self.alive else 0

    @property
    def busy(self) -> bool:
        """Whether something is still to be done; of a lost node, killing what was there."""
        return len(self._tasks) > 0

    async def start(self) -> None:
        """Make the actor and wait until its pool is warm.

        Raises:
            SandboxUnavailable: there is no jail on the node, or another jaxrl; the text says what and why.
            NodeLost: there is no such node any more, or Ray starts nothing there.
        """
        self._actor = (
            ray.remote(NodePool)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
            )
            .remote()
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                self._compare(await self._actor.version.remote())
                await self._actor.start.remote(self._settings)
        except BaseException as error:
            await self._kill()
            if isinstance(error, ray.exceptions.RayTaskError):
                raise SandboxUnavailable(f"node {self.name}: {error.cause}") from error
            if isinstance(error, ray.exceptions.RayError | TimeoutError):
                raise NodeLost(f"node {self.name}: {_words(error)}") from error
            raise
        self.alive = True
        self._collector = self._spawn(self._collect())
        self._on_room(self._window)

    def _compare(self, version: str) -> None:
        """Two versions may mean different things by the same bytes."""
        if version != __version__:
            raise SandboxUnavailable(
                f"node {self.name} has jaxrl {version}, this machine {__version__}: install the same on every node"
            )

    async def run(self, order: Order, *, bound: bool = False) -> Answer:
        """Send an order and wait for its answer, which is a fault if the node is lost; cancelling this kills the call.

        Args:
            bound: it could be carried out nowhere else, so nothing is gained by letting it wait elsewhere: it takes
                no room.
        """
        try:
            return await self.send(order, bound=bound)
        except asyncio.CancelledError:
            self._cancel(order.id)
            raise

    def send(self, order: Order, *, bound: bool) -> "asyncio.Future[Answer]":
        """As ``run``, but an order that nobody needs to wait for; cancelling the future does not kill anything."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if not self.alive:
            future.set_result(Answer(order.id, None, "lost before"))
            return future
        self._outgoing_bytes += order.size()
        self._outgoing[order.id] = order
        self._pending[order.id] = future
        if bound:
            self._bound.add(order.id)
        self.taken += 1
        self._flush_soon()
        return future

    def lose(self, reason: str) -> None:
        """Give the node up: its calls are over for their callers, and what still lives there is killed."""
        if not self.alive:
            return
        free = self.free
        self.alive = False
        self._on_room(-free)
        self._on_lost(self)
        for id, future in self._pending.items():
            if not future.done():
                future.set_result(Answer(id, None, reason))
        self._pending.clear()
        self._bound.clear()
        self._stop_sending()
        if self._collector is not None and self._collector is not asyncio.current_task():
            self._collector.cancel()
        self._spawn(self._kill())

    async def close(self) -> None:
        """End the pool and its actor, and give up the calls that are still there."""
        if self.alive:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                await asyncio.wait_for(self._actor.close.remote(), _CLOSE_SECONDS)
            self.lose("closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Sending

    def _flush_soon(self) -> None:
        """Large batches leave at once; small ones after what else this turn of the event loop brings, but not often."""
        if len(self._outgoing) >= BATCH_CALLS or self._outgoing_bytes >= BATCH_BYTES:
            self._flush()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            wait = max(self._flushed + BATCH_SECONDS - time.monotonic(), 0.0)
            self._timer = loop.call_later(wait, self._flush)

    def _flush(self) -> None:
        orders, cancelled = list(self._outgoing.values()), self._cancelled
        self._stop_sending()
        self._flushed = time.monotonic()
        if cancelled:
            self._spawn(self._deliver(self._actor.cancel, cancelled))
        if orders:
            self._spawn(self._deliver(self._actor.submit, orders))

    def _stop_sending(self) -> None:
        """Nothing waits to be sent any more."""
        self._outgoing, self._outgoing_bytes, self._cancelled = {}, 0, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _deliver(self, method: Any, batch: Sequence[Order | int]) -> None:
        try:
            await method.remote(batch)
        except Exception as error:  # whatever it was: callers of a batch that has not arrived would wait for ever
            if isinstance(error, ray.exceptions.RayError) or not isinstance(error, _UNWRITABLE):
                self.lose(_words(error))
            elif len(batch) == 1:
                self._refuse(batch[0], error)
            else:
                for one in batch:
                    await self._deliver(method, [one])

    def _refuse(self, order: Order, error: Exception) -> None:
        """An argument cannot travel, which is its caller's mistake and no loss of the node."""
        reason = f"an argument that cannot be sent to a node: {type(error).__name__}: {_words(error)}"
        self._settle(Answer(order.id, None, refusal=ValueError(reason)))

    def _cancel(self, id: int) -> None:
        order = self._outgoing.pop(id, None)
        if order is not None:
            self._outgoing_bytes -= order.size()
            self._settle(Answer(id, None))
        elif id in self._pending:  # its room is free only when the node says that it is over
            self._cancelled.append(id)
            self._flush_soon()

    # Hearing

    async def _collect(self) -> None:
        try:
            while self.alive:
                for answer in await self._next_answers():
                    if self.alive:
                        self._settle(answer)
        except TimeoutError:
            self.lose(f"silent for {self._silence_seconds:g} s")
        except Exception as error:  # whatever it was: nobody hears the node any more
            self.lose(_words(error))

    async def _next_answers(self) -> list[Answer]:
        answers = asyncio.ensure_future(self._actor.collect.remote(_COLLECT_SECONDS))
        try:
            # Where it was this event loop that stood still, the time is up before the answers are looked at.
            for seconds in (_COLLECT_SECONDS + self._silence_seconds, _COLLECT_SECONDS):
                if (await asyncio.wait({answers}, timeout=seconds))[0]:
                    return answers.result()
            raise TimeoutError
        finally:
            answers.cancel()

    def _settle(self, answer: Answer) -> None:
        future = self._pending.pop(answer.id, None)
        if future is None:
            return  # answered before
        if not future.done():
            future.set_result(answer)
        if answer.id in self._bound:
            self._bound.remove(answer.id)
        else:
            self._on_room(1)
        if answer.fault:
            self.lose(answer.fault)  # there is no pool any more

    async def _kill(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            await asyncio.to_thread(ray.kill, self._actor)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _words(error: BaseException) -> str:
    """A line that says what Ray says in many."""
    if isinstance(error, TimeoutError):
        return f"not ready after {_START_SECONDS:g} s"
    return " ".join(str(error).split())[:_MOST_WORDS]

"""What runs on every machine of a cluster: a pool inside an actor, which takes calls in batches.

Results leave as they finish, together with whatever else has finished by then: a slow call never holds its batch.
Knows nothing of Ray, which makes an actor of it; see ``node_link`` for the other end.
"""

import asyncio
import functools
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.protocol import Limits
from jaxrl.sandbox.result import Result, fault

BATCH_CALLS = 64  # so many leave without waiting for more
BATCH_SECONDS = 0.005  # shortest time between two smaller batches
BATCH_BYTES = 4 << 20  # and no more than these in one, unless one call alone is larger
_MOST_ANSWERS = 256
_BAD_ARGUMENTS = (ValueError, TypeError, OverflowError, struct.error)  # what packing a call says of them


class Order(NamedTuple):
    """A call on its way to a node: the arguments of ``Pool.run`` under the cluster's own number."""

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


class Answer(NamedTuple):
    """How an order ended: with a result, by a fault of the node's own, refused, or nothing of it where cancelled."""

    id: int
    result: Result | None
    fault: str = ""  # there is no pool on the node any more
    refusal: Exception | None = None  # SandboxUnavailable or ValueError: what is wrong with the order

    def size(self) -> int:
        """About how many bytes it takes."""
        if self.result is None:
            return len(self.fault)
        return len(self.result.stdout) + len(self.result.stderr) + sum(map(len, self.result.files.values()))


class NodePool:
    """A pool that is asked from another machine.

    Args:
        make_pool: makes the pool, on this machine.
    """

    def __init__(self, make_pool: Callable[[], Pool]) -> None:
        self._make_pool = make_pool
        self._pool: Pool | None = None
        self._running: dict[int, asyncio.Task[Result]] = {}
        self._finished: deque[Answer] = deque()
        self._news = asyncio.Event()
        self._collected = 0.0  # time.monotonic() of the last batch of answers

    async def start(self) -> None:
        """Start the pool.

        Raises:
            SandboxUnavailable, ValueError: as the pool does.
        """
        self._pool = self._make_pool()
        await self._pool.start()

    async def submit(self, orders: list[Order]) -> None:
        """Begin calls; ``collect`` tells how they ended."""
        assert self._pool is not None
        for order in orders:
            call = self._pool.run(
                order.code,
                stdin=order.stdin,
                echo=order.echo,
                limits=order.limits,
                tenant=order.tenant,
                files=order.files,
                wanted=order.wanted,
                language=order.language,
                processes=order.processes,
            )
            task = self._running[order.id] = asyncio.create_task(call)
            task.add_done_callback(functools.partial(self._finish, order))

    async def cancel(self, ids: list[int]) -> None:
        """Kill calls; each is still answered, unless it was before."""
        for id in ids:
            if id in self._running:
                self._running[id].cancel()

    async def collect(self, seconds: float) -> list[Answer]:
        """What has finished since the last time. Waits for it, at most so long."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return []
        if len(self._finished) < BATCH_CALLS:
            await asyncio.sleep(self._collected + BATCH_SECONDS - time.monotonic())
        answers: list[Answer] = []
        size = 0
        while self._finished and len(answers) < _MOST_ANSWERS:
            size += self._finished[0].size()
            if answers and size > BATCH_BYTES:
                break
            answers.append(self._finished.popleft())
        if not self._finished:
            self._news.clear()
        self._collected = time.monotonic()
        return answers

    async def close(self) -> None:
        """Kill what still runs, and leave nothing behind."""
        if self._pool is not None:
            await self._pool.close()

    def _finish(self, order: Order, task: asyncio.Task[Result]) -> None:
        del self._running[order.id]
        if task.cancelled():
            answer = Answer(order.id, None)
        elif (error := task.exception()) is not None:
            answer = unfinished(order, error)
        else:
            answer = Answer(order.id, task.result())
        self._finished.append(answer)
        self._news.set()


def unfinished(order: Order, error: BaseException) -> Answer:
    """A plain call of Python is unavailable only where there is no jail any more; others also ask for what may lack."""
    words = f"{type(error).__name__}: {error}"
    plain = order.language == "python" and not order.processes
    if isinstance(error, SandboxUnavailable) and not plain:
        return Answer(order.id, None, refusal=SandboxUnavailable(str(error)))
    if isinstance(error, RuntimeError):  # the jail is gone for good, or the pool is closed
        return Answer(order.id, None, fault=words)
    if isinstance(error, _BAD_ARGUMENTS):
        return Answer(order.id, None, refusal=ValueError(words))
    return Answer(order.id, fault(words, attempts=1))  # of this one call; the node has room for others

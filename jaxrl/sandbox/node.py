"""What runs on every machine of a cluster: a pool inside an actor, which takes calls in batches.

Results leave as they finish, together with whatever else has finished by then: a slow call never holds its batch.
Knows nothing of Ray, which makes an actor of it; see ``node_link`` for the other end.
"""

import asyncio
import functools
import struct
import time
from collections import deque

from jaxrl import __version__
from jaxrl.sandbox import pool_arguments
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.node_orders import (
    Answer,
    CallOrder,
    CellOrder,
    EndOrder,
    ForkOrder,
    Order,
    Outcomes,
    ReplayOrder,
)
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.pool_settings import PoolSettings
from jaxrl.sandbox.protocol import Call

BATCH_CALLS = 64  # so many leave without waiting for more
BATCH_SECONDS = 0.005  # shortest time between two smaller batches
BATCH_BYTES = 4 << 20  # and no more than these in one, unless one call alone is larger
_MOST_ANSWERS = 256
_BAD_ARGUMENTS = (ValueError, TypeError, OverflowError, struct.error)  # what packing a call says of them


class NodePool:
    """A pool that is asked from another machine."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._running: dict[int, asyncio.Task[Outcomes]] = {}
        self._finished: deque[Answer] = deque()
        self._news = asyncio.Event()
        self._collected = 0.0  # time.monotonic() of the last batch of answers

    async def version(self) -> str:
        """Of the jaxrl that is installed here."""
        return __version__

    async def start(self, settings: PoolSettings) -> None:
        """Make a pool on this machine, and start it.

        Raises:
            SandboxUnavailable, ValueError: as the pool does.
        """
        self._pool = Pool(**vars(settings))
        await self._pool.start()

    async def submit(self, orders: list[Order]) -> None:
        """Begin what is ordered; ``collect`` tells how it ended."""
        assert self._pool is not None
        for order in orders:
            task = self._running[order.id] = asyncio.create_task(_carry_out(order, self._pool))
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

    def _finish(self, order: Order, task: asyncio.Task[Outcomes]) -> None:
        del self._running[order.id]
        if task.cancelled():
            answer = Answer(order.id, None)
        elif (error := task.exception()) is not None:
            answer = unfinished(order, error)
        else:
            answer = Answer(order.id, task.result())
        self._finished.append(answer)
        self._news.set()


async def _carry_out(order: Order, pool: Pool) -> Outcomes:
    match order:
        case CallOrder():
            return await pool.run(
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
        case ReplayOrder():
            return await pool.backend().run(_of_here(order.call, pool))
        case CellOrder():
            return await pool.backend().submit(_of_here(order.call, pool), order.head)
        case ForkOrder():
            return tuple(await pool.backend().fork(order.process, list(order.copies)))
        case EndOrder():
            ended = pool.backend().end(order.process)
            if ended is not None:
                await ended
            return ()


def _of_here(call: Call, pool: Pool) -> Call:
    """The call under a number of this pool, in the time of this machine's clock.

    Raises:
        ValueError: its limits are beyond this machine's own.
    """
    pool_arguments.check_host(call.limits)
    return call._replace(id=pool.backend().next_id(), submitted=time.monotonic())


def unfinished(order: Order, error: BaseException) -> Answer:
    """A plain call of Python is unavailable only where there is no jail any more; others also ask for what may lack."""
    words = f"{type(error).__name__}: {error}"
    plain = not isinstance(order, CallOrder) or (order.language == "python" and not order.processes)
    if isinstance(error, SandboxUnavailable) and not plain:
        return Answer(order.id, None, refusal=SandboxUnavailable(str(error)))
    if isinstance(error, RuntimeError):  # the jail is gone for good, or the pool is closed
        return Answer(order.id, None, fault=words)
    if isinstance(error, _BAD_ARGUMENTS):
        return Answer(order.id, None, refusal=ValueError(words))
    return Answer(order.id, order.failed(words))  # of this one; the node has room for others

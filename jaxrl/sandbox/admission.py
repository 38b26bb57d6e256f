"""Who may submit, and who next: a semaphore whose waiters take turns by tenant. What is under way, until its end."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable


class Admission:
    """Lets ``room`` calls in at once. Waiting tenants are served in turn, each one's calls in their order."""

    def __init__(self, room: int) -> None:
        self._room = room  # below 0 where places were taken away that calls had already been promised
        # Whose turn is next first; with each waiter when it came.
        self._waiting: dict[int, deque[tuple[asyncio.Future[None], float]]] = {}

    def waiting(self) -> tuple[int, float | None]:
        """How many wait, and the time.monotonic() at which the first of them came; None where none waits."""
        came = [moment for turns in self._waiting.values() for turn, moment in turns if not turn.done()]
        return len(came), min(came, default=None)

    async def enter(self, tenant: int, *, first: bool = False) -> None:
        """Wait for room and take it; with ``first`` before all others of the tenant."""
        if self._room > 0 and not self._waiting:
            self._room -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns = self._waiting.setdefault(tenant, deque())
        if first:
            turns.appendleft((turn, time.monotonic()))
        else:
            turns.append((turn, time.monotonic()))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # the room came together with the cancellation
            raise

    def leave(self, places: int = 1) -> None:
        """Give room back; a negative number takes it away for good."""
        self._room += places
        while self._room > 0 and self._waiting:
            tenant = next(iter(self._waiting))
            turns = self._waiting.pop(tenant)
            turn, _ = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # to the end
            if not turn.done():
                self._room -= 1
                turn.set_result(None)

    def dismiss(self, error: Callable[[], Exception]) -> None:
        """Let nobody in who waits now: each gets an error of its own."""
        waiting, self._waiting = self._waiting, {}
        for turns in waiting.values():
            for turn, _ in turns:
                if not turn.done():
                    turn.set_exception(error())


class UnderWay:
    """A count of what has entered and not left, some within others."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: list[asyncio.Future[None]] = []  # for the end

    def enter(self) -> None:
        self._count += 1

    def leave(self) -> None:
        self._count -= 1
        if not self._count:
            waiting, self._waiting = self._waiting, []
            for over in waiting:
                if not over.done():
                    over.set_result(None)

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def over(self) -> None:
        """Wait until nothing is inside."""
        while self._count:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(over)
            await over


class Starts:
    """Lets one start at a time: those that come meanwhile wait, to find that it is done, or to do it themselves."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._there = 0  # that start or wait
        self._closings = 0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Around a start.

        Raises:
            RuntimeError: what is to be started was closed while this waited.
        """
        if not self._there:
            self._lock = asyncio.Lock()  # the last one may have served another event loop
        closings = self._closings
        self._there += 1
        try:
            async with self._lock:
                if self._closings > closings:
                    raise RuntimeError("it was closed while this start waited for another: start it again")
                yield
        finally:
            self._there -= 1

    def close(self) -> None:
        """Let none of those that wait start any more."""
        self._closings += 1


def check_loop(started_in: asyncio.AbstractEventLoop | None) -> None:
    """Refuse to use a pool in another event loop than it was started in, if it was.

    Raises:
        RuntimeError: this is another one.
    """
    if started_in not in (None, asyncio.get_running_loop()):
        raise RuntimeError(
            "the sandbox pool was started in another event loop: use and close it there, or start a pool in each"
        )

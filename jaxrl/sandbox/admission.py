"""How many calls are under way, and who may submit next: a semaphore whose waiters take turns by tenant."""

import asyncio
import time
from collections import deque


class Admission:
    """Lets ``room`` calls in at once. Waiting tenants are served in turn, each one's calls in their order."""

    def __init__(self, room: int) -> None:
        self._room = room
        # Whose turn is next first; with each waiter when it came.
        self._waiting: dict[int, deque[tuple[asyncio.Future[None], float]]] = {}

    def waiting(self) -> tuple[int, float | None]:
        """How many wait, and the time.monotonic() at which the first of them came; None where none waits."""
        came = [moment for turns in self._waiting.values() for turn, moment in turns if not turn.done()]
        return len(came), min(came, default=None)

    async def enter(self, tenant: int) -> None:
        """Wait for room and take it."""
        if self._room and not self._waiting:
            self._room -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append((turn, time.monotonic()))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # the room came together with the cancellation
            raise

    def leave(self) -> None:
        """Give room back."""
        self._room += 1
        while self._room and self._waiting:
            tenant = next(iter(self._waiting))
            turns = self._waiting.pop(tenant)
            turn, _ = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # to the end
            if not turn.done():
                self._room -= 1
                turn.set_result(None)

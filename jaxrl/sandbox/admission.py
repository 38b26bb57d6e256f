"""How many calls are under way, and who may submit next: a semaphore whose waiters take turns by tenant."""

import asyncio
from collections import deque


class Admission:
    """Lets ``room`` calls in at once. Waiting tenants are served in turn, each one's calls in their order."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}  # whose turn is next first

    async def enter(self, tenant: int) -> None:
        """Wait for room and take it."""
        if self._room and not self._waiting:
            self._room -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
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
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # to the end
            if not turn.done():
                self._room -= 1
                turn.set_result(None)

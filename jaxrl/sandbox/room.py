"""How much a server takes at once, and how it refuses more."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from jaxrl.sandbox.wire import Problem

RETRY_SECONDS = 1  # after which a client that was refused for want of room may try again


class Refused(Exception):
    """A request that is answered with a Problem."""

    def __init__(self, status: int, error: str, *, value: str = "", limit: str = "", remedy: str = "") -> None:
        super().__init__(error)
        self.status = status
        self.problem = Problem(error, value, limit, remedy)


class Room:
    """Counts what is under way, against a limit."""

    def __init__(self, limit: int, noun: str, option: str) -> None:
        self.taken = 0
        self.empty = asyncio.Event()
        self.empty.set()
        self._limit = limit
        self._noun = noun
        self._option = option

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[Callable[[int], None]]:
        """Take room until the end of the block; calling what it gives returns some earlier.

        Raises:
            Refused: there never is so much (413), or not now (429).
        """
        if amount > self._limit:
            remedy = f"send less in one request, or start the server with a larger {self._option}"
            raise Refused(413, f"too many {self._noun}", value=str(amount), limit=str(self._limit), remedy=remedy)
        if self.taken + amount > self._limit:
            words = f"{self.taken} {self._noun} are under way, and {amount} more"
            remedy = f"try again after {RETRY_SECONDS} s, or start the server with a larger {self._option}"
            raise Refused(429, "the server is full", value=words, limit=str(self._limit), remedy=remedy)
        left = amount
        self.taken += amount
        self.empty.clear()

        def give_back(part: int) -> None:
            nonlocal left
            left -= part
            self.taken -= part
            if not self.taken:
                self.empty.set()

        try:
            yield give_back
        finally:
            give_back(left)

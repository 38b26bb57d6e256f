"""Compiled programs, kept: what was built once is not built again for the next input."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Built = TypeVar("Built")


class Builds(Generic[Built]):
    """Results of building by what they were built from; those used longest ago go first.

    Args:
        room: sum of the weights kept.
        weigh: weight of a result; None for one that is not to be kept.
    """

    def __init__(self, room: int, weigh: Callable[[Built], int | None]) -> None:
        self._room = room
        self._weigh = weigh
        self._kept: dict[object, tuple[Built, int]] = {}  # least recently used first
        self._under_way: dict[object, asyncio.Future[None]] = {}

    async def get(self, key: object, build: Callable[[], Awaitable[Built]]) -> Built:
        """What ``build`` gave for this key, now or earlier. Callers with the same key wait for one of them to build."""
        while key in self._under_way:
            await asyncio.wait([self._under_way[key]])
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)
            return self._kept[key][0]
        over = self._under_way[key] = asyncio.get_running_loop().create_future()
        try:
            built = await build()
        finally:  # also where this caller was cancelled: the next one builds
            del self._under_way[key]
            over.set_result(None)
        self._keep(key, built)
        return built

    def _keep(self, key: object, built: Built) -> None:
        weight = self._weigh(built)
        if weight is None:
            return
        self._kept[key] = (built, weight)
        total = sum(weight for _, weight in self._kept.values())
        while total > self._room:
            total -= self._kept.pop(next(iter(self._kept)))[1]

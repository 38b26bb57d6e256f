"""Groups of episodes that are being played, or have been and wait to be trained on, in the order of their draws."""

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from jaxrl.episodes import Player, first_cause
from jaxrl.records import Group, Problem

Choice = Callable[[], Coroutine[Any, Any, list[int]]]
"""Waits until there is something to choose from, and chooses draws."""


@dataclasses.dataclass
class _Entry:
    """One draw; ``playing`` is None until it is begun."""

    draw: int
    playing: asyncio.Future[Group] | None = None

    @property
    def group(self) -> Group | None:
        """What was played, once it was.

        Raises:
            Exception: what an episode raised.
        """
        if self.playing is None or not self.playing.done():
            return None
        if (error := self.playing.exception()) is not None:
            raise first_cause(error)
        return self.playing.result()


async def alone(choose: Choice) -> list[int]:
    """The choice of a single process."""
    return await choose()


class GroupQueue:
    """Plays in the background. Use it from one asyncio loop, and close it: then nothing of it goes on.

    Args:
        play: plays one problem; its further argument is the draw.
        finished_first: give out what is played first, the oldest of it first, instead of waiting for the oldest draw.
        agree: given what chooses the draws that are taken next, says which they are; the same in all processes.
        pending: groups that were played earlier.
        unfinished: draws that were begun earlier and not played to their end, which begin again.
    """

    def __init__(
        self,
        play: Callable[[Player, Problem, int], Coroutine[Any, Any, Group]],
        *,
        finished_first: bool,
        agree: Callable[[Choice], Awaitable[list[int]]] = alone,
        pending: Iterable[Group] = (),
        unfinished: Iterable[int] = (),
    ) -> None:
        self._play = play
        self._finished_first = finished_first
        self._agree = agree
        self._entries = [_Entry(draw) for draw in unfinished]
        for group in pending:
            played: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
            played.set_result(group)
            self._entries.append(_Entry(group.draw, played))
        self._entries.sort(key=lambda entry: entry.draw)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def unbegun(self) -> tuple[int, ...]:
        """Those of the ``unfinished`` it was made with that have not begun again."""
        return tuple(entry.draw for entry in self._entries if entry.playing is None)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Draws that have not been played to their end."""
        return tuple(entry.draw for entry in self._entries if entry.group is None)

    @property
    def pending(self) -> tuple[Group, ...]:
        """Groups that have been played."""
        return tuple(group for entry in self._entries if (group := entry.group) is not None)

    def begin(self, player: Player, draws: Iterable[tuple[int, Problem]]) -> None:
        """Begin these draws: those ``unbegun``, and others that come after all that are there."""
        waiting = {entry.draw: entry for entry in self._entries if entry.playing is None}
        for draw, problem in draws:
            entry = waiting.get(draw)
            if entry is None:
                entry = _Entry(draw)
                self._entries.append(entry)
            entry.playing = asyncio.create_task(self._play(player, problem, draw), name=f"group {draw}")

    async def take(self, count: int) -> list[Group]:
        """Wait for ``count`` groups and take them out, in the order of their draws.

        Raises:
            Exception: what an episode raised, at once and whichever it was.
        """
        agreeing = asyncio.ensure_future(self._agree(functools.partial(self._choose, count)))
        try:
            while not agreeing.done():
                self._played()  # raises what an episode raised
                await asyncio.wait({agreeing, *self._playing()}, return_when=asyncio.FIRST_COMPLETED)
            chosen = agreeing.result()
        finally:
            agreeing.cancel()
            await asyncio.gather(agreeing, return_exceptions=True)
        while not all(draw in self._played() for draw in chosen):
            await self._progress()
        played = self._played()
        self._entries = [entry for entry in self._entries if entry.draw not in set(chosen)]
        return [played[draw] for draw in chosen]

    async def settle(self) -> None:
        """Wait until every group has been played.

        Raises:
            Exception: as for ``take``.
        """
        while self.unfinished:
            await self._progress()

    async def discard(self) -> None:
        """Stop playing and forget everything."""
        entries, self._entries = self._entries, []
        playing = [entry.playing for entry in entries if entry.playing is not None]
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)

    async def aclose(self) -> None:
        """As ``discard``; for ``contextlib.aclosing``."""
        await self.discard()

    async def _choose(self, count: int) -> list[int]:
        """The draws that this process would take."""
        if not self._finished_first:
            return [entry.draw for entry in self._entries[:count]]
        while len(self._played()) < count:
            await self._progress()
        return list(self._played())[:count]

    def _played(self) -> dict[int, Group]:
        return {group.draw: group for group in self.pending}

    def _playing(self) -> list[asyncio.Future[Group]]:
        return [entry.playing for entry in self._entries if entry.playing is not None and not entry.playing.done()]

    async def _progress(self) -> None:
        await asyncio.wait(self._playing(), return_when=asyncio.FIRST_COMPLETED)

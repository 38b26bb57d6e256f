"""Groups of episodes that are being played, or have been and wait to be trained on, in the order of their draws."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from jaxrl.episodes import Player, first_cause
from jaxrl.records import Group, Problem


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


class GroupQueue:
    """Plays in the background. Use it from one asyncio loop, and close it: then nothing of it goes on.

    Args:
        play: plays one problem; its further argument is the draw.
        finished_first: give out what is played first, the oldest of it first, instead of waiting for the oldest draw.
        pending: groups that were played earlier.
        unfinished: draws that were begun earlier and not played to their end, which begin again.
    """

    def __init__(
        self,
        play: Callable[[Player, Problem, int], Coroutine[Any, Any, Group]],
        *,
        finished_first: bool,
        pending: Iterable[Group] = (),
        unfinished: Iterable[int] = (),
    ) -> None:
        self._play = play
        self._finished_first = finished_first
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
        while True:
            groups = [entry.group for entry in self._entries]
            if self._finished_first:
                chosen = [index for index, group in enumerate(groups) if group is not None][:count]
            else:
                chosen = list(range(count))
            if len(chosen) == count and all(groups[index] is not None for index in chosen):
                break
            await self._progress()
        self._entries = [entry for index, entry in enumerate(self._entries) if index not in set(chosen)]
        return [groups[index] for index in chosen]

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

    async def _progress(self) -> None:
        playing = [entry.playing for entry in self._entries if entry.playing is not None and not entry.playing.done()]
        await asyncio.wait(playing, return_when=asyncio.FIRST_COMPLETED)

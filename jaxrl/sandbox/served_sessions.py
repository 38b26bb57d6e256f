"""The sessions that a server keeps for its clients: by ids that nobody guesses, bounded, and ended when left alone."""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator

from jaxrl.sandbox.room import RETRY_SECONDS, Refused
from jaxrl.sandbox.session import Session

_ID_BYTES = 24  # of randomness


class _Kept:
    """A session, and for how many requests it is in use."""

    def __init__(self, session: Session, owner: int) -> None:
        self.session = session
        self.owner = owner
        self.users = 0
        self.expected_bytes = 0  # of cells under way, which the history may grow by
        self.end: asyncio.TimerHandle | None = None
        self.void = 0  # requests up to this number have been taken back
        self.forked: tuple[int, list[str]] = (0, [])  # number of the last fork that had one, and its copies


class ServedSessions:
    """Sessions by id.

    Args:
        most: open at once.
        most_of_one: of these, one owner's.
        idle_seconds: one that is not used for so long is ended, since its client may have vanished.
        history_bytes: code and files that one session may be given, which are kept for its rebuilding.
    """

    def __init__(self, most: int, most_of_one: int, idle_seconds: float, history_bytes: int) -> None:
        self.idle_seconds = idle_seconds
        self._most = most
        self._most_of_one = most_of_one
        self._history_bytes = history_bytes
        self._kept: dict[str, _Kept] = {}
        self._expected: Counter[int] = Counter()  # by owner: places that are held for sessions on their way
        self._endings: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, session: Session, owner: int) -> str:
        """Keep a session; its id.

        Args:
            owner: who alone may use it.
        """
        id = secrets.token_urlsafe(_ID_BYTES)
        self._kept[id] = kept = _Kept(session, owner)
        self._leave_alone(id, kept)
        return id

    @contextlib.contextmanager
    def room(self, owner: int, amount: int) -> Iterator[None]:
        """Hold room for new sessions of an owner, which are added at the end of the block.

        Raises:
            Refused: there are too many, or too many of the owner's.
        """
        every = len(self._kept) + self._expected.total()
        own = sum(kept.owner == owner for kept in self._kept.values()) + self._expected[owner]
        _check_room("too many sessions", every, amount, self._most, "--sessions")
        _check_room("too many sessions of this token", own, amount, self._most_of_one, "--token-sessions")
        self._expected[owner] += amount
        try:
            yield
        finally:
            self._expected[owner] -= amount

    @contextlib.contextmanager
    def use(self, id: str, owner: int) -> Iterator[Session]:
        """The session, which meanwhile is not left alone.

        Raises:
            Refused: there is none that is so called and the owner's.
        """
        kept = self._find(id, owner)
        kept.users += 1
        if kept.end is not None:
            kept.end.cancel()
        try:
            yield kept.session
        finally:
            kept.users -= 1
            if not kept.users and id in self._kept:
                self._leave_alone(id, kept)

    @contextlib.contextmanager
    def history_room(self, id: str, owner: int, more: int) -> Iterator[int]:
        """Hold room in a session's history for a cell of so many bytes, until it is in there or will not be.

        Gives the most bytes that the history may have when it is the cell's turn.

        Raises:
            Refused: there is no such session of the owner's, or its cells would be too large together.
        """
        kept = self._find(id, owner)
        before = kept.session.history_bytes + kept.expected_bytes
        if before + more > self._history_bytes:
            words = f"{before} bytes, those of cells under way included, and {more} more"
            remedy = "begin another session, or start the server with a larger --session-mib"
            limit = f"{self._history_bytes} bytes"
            raise Refused(413, "the session's cells are too large together", value=words, limit=limit, remedy=remedy)
        kept.expected_bytes += more
        try:
            yield before
        finally:
            kept.expected_bytes -= more

    def check_number(self, id: str, owner: int, number: int) -> None:
        """Refuse a numbered request that came later than its taking back.

        Raises:
            Refused: so it did, or there is no such session of the owner's.
        """
        void = self._find(id, owner).void
        if 0 < number <= void:
            remedy = "give each request a larger number than the one before"
            raise Refused(400, "this was taken back", value=f"number {number}", limit=f"above {void}", remedy=remedy)

    def note_copies(self, id: str, number: int, copies: list[str]) -> None:
        """Remember what a numbered fork made, until the next one, which tells that its answer has come."""
        if number and id in self._kept:
            self._kept[id].forked = (number, copies)

    async def take_back(self, id: str, owner: int, answered: int, given: int) -> None:
        """Undo the requests to a session with numbers above ``answered``, and take none up to ``given`` any more.

        Raises:
            Refused: there is no session that is so called and the owner's.
        """
        kept = self._find(id, owner)
        kept.void = max(kept.void, given)
        with self.use(id, owner) as session:
            await session.take_back(answered)
            number, copies = kept.forked
            if number > answered:
                kept.forked = (0, [])
                endings = [self._end(copy) for copy in copies if copy in self._kept]
                await asyncio.gather(*map(asyncio.shield, endings))

    async def close(self, id: str, owner: int) -> None:
        """End a session; nothing is left of it when this returns.

        Raises:
            Refused: there is none that is so called and the owner's.
        """
        self._find(id, owner)
        await asyncio.shield(self._end(id))

    async def close_all(self) -> None:
        """End every session."""
        for id in list(self._kept):
            self._end(id)
        await asyncio.gather(*self._endings)

    def _find(self, id: str, owner: int) -> _Kept:
        kept = self._kept.get(id)
        if kept is None or kept.owner != owner:
            limit = f"an open session; one that is not used for {self.idle_seconds:g} s is ended"
            raise Refused(404, "no such session", value=id[:80], limit=limit, remedy="begin another session")
        return kept

    def _leave_alone(self, id: str, kept: _Kept) -> None:
        kept.end = asyncio.get_running_loop().call_later(self.idle_seconds, self._end, id)

    def _end(self, id: str) -> asyncio.Task[None]:
        kept = self._kept.pop(id)
        if kept.end is not None:
            kept.end.cancel()
        ending = asyncio.get_running_loop().create_task(kept.session.close())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return ending


def _check_room(error: str, taken: int, more: int, most: int, option: str) -> None:
    if taken + more > most:
        words = f"{taken} are open, and {more} more"
        remedy = f"close some and try again after {RETRY_SECONDS} s, or start the server with a larger {option}"
        raise Refused(429, error, value=words, limit=str(most), remedy=remedy)

"""A session on a server: the same cells, results and copies as ``Session``, over HTTP."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from jaxrl.sandbox import pool_arguments, wire
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.result import Result, fault
from jaxrl.statuses import ToolStatus

_END_SECONDS = 5.0  # for ending a session on a server that may have gone silent


class NotAnswered(Exception):
    """A request was not carried out, or its answer did not arrive; the text says why."""


class AnswerLost(NotAnswered):
    """Whether the request was carried out is not known."""


class Patience(NamedTuple):
    """For how many seconds a request is sent again."""

    full: float  # to a server that has no room for it
    away: float  # to one that refuses connections or is shutting down


class SessionChannel(NamedTuple):
    """What the sessions of one client share."""

    # (method, path, record or None, type of the answer, tenant, patience) to the answer, or NotAnswered is raised
    ask: Callable[[str, str, Any, type, str, Patience], Awaitable[Any]]
    open: set[str]  # ids of those that are there
    patience: float  # for a server that is away, or has no room for one more session


class RemoteSession:
    """Made by ``SandboxClient.session`` and by ``fork``; close it, or use ``async with``."""

    def __init__(self, shared: SessionChannel, terms: wire.SessionRequest, tenant: str, id: str = "") -> None:
        self._shared = shared
        self._terms = terms
        self._tenant = tenant
        self._id = id  # "" until the server has been asked for a session
        self._turn = asyncio.Lock()
        self._lost = ""  # why it can go on no more
        self._given = self._answered = 0  # numbers of the last request to it, and of the last that was answered
        self._open = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def run(
        self,
        code: str,
        echo: bool = True,
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
    ) -> Result:
        """Run a cell, as ``Session.run``. Where the server has no such session any more it is an ``infra_error``.

        So it is where the answer is lost. Since the cell may have run, and would do what it does twice if it were run
        again, that ends the session: all later cells are an ``infra_error`` too, which says so. Cancelling this kills
        the cell; one that had run by then is undone before the next.

        Raises:
            ValueError: the server refuses the files, or the cells of this session are too large together.
            TypeError: code or wanted of a wrong type.
            PermissionError: the token is missing or wrong.
            RuntimeError: the session or the client is closed.
        """
        pool_arguments.check_cell(code, echo, files, wanted)
        async with self._turn:
            self._check_open()
            patience = Patience(math.inf, self._shared.patience)
            try:
                await self._begin()
                await self._take_back()
                cell = wire.CellRequest(code, echo, files or {}, wanted, self._next_number())
                result = await self._ask("POST", f"/{self._id}/cells", cell, Result, patience)
                self._answered = cell.number
            except AnswerLost as error:
                await self._give_up(error)
                result = fault(self._lost or str(error))
            except NotAnswered as error:
                result = fault(str(error))
            if result.status is ToolStatus.INFRA_ERROR:
                self._check_open()  # that it was closed meanwhile is no fault
            return result

    async def fork(self, copies: int) -> "list[RemoteSession]":
        """Copies of this session, as ``Session.fork``.

        Raises:
            ValueError: ``copies`` is not positive, or more than ``protocol.MOST_COPIES``.
            SandboxUnavailable: the server cannot be reached, has no such session any more, or no room for the copies.
            PermissionError: the token is missing or wrong.
            RuntimeError: the session or the client is closed, or was while this ran.
        """
        pool_arguments.check_copies(copies)
        async with self._turn:
            self._check_open()
            patience = Patience(self._shared.patience, self._shared.patience)
            try:
                await self._begin()
                await self._take_back()
                asked = wire.ForkRequest(copies, self._next_number())
                made = await self._ask("POST", f"/{self._id}/fork", asked, wire.Copies, patience)
                self._answered = asked.number
            except AnswerLost as error:
                await self._take_back_soon()
                self._check_open()
                raise SandboxUnavailable(f"the session could not be copied: {error}") from error
            except NotAnswered as error:
                self._check_open()
                raise SandboxUnavailable(f"the session could not be copied: {error}") from error
            return [self._opened(copy.id) for copy in made.sessions]

    async def close(self) -> None:
        """End the session, a cell that is under way included; its copies live on.

        A server that cannot be reached ends it when it has not been used for long.
        """
        self._open = False
        if not self._id:
            async with self._turn:  # it may be about to be opened
                pass
        if self._id in self._shared.open:
            self._shared.open.discard(self._id)
            if not self._turn.locked():  # else the request under way ends with the session
                await self._take_back_soon()
            with contextlib.suppress(NotAnswered, RuntimeError):
                await self._end()

    async def _give_up(self, error: AnswerLost) -> None:
        """End the session, if there is one already."""
        if not self._id:
            return
        self._lost = f"{error}; the cell may have run, so that its session was ended: begin another"
        with contextlib.suppress(NotAnswered, RuntimeError, TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._end()
                self._shared.open.discard(self._id)

    def _next_number(self) -> int:
        self._given += 1
        return self._given

    async def _take_back(self) -> None:
        """Undo the requests of which no answer has come: nothing waits for one any more."""
        if self._answered == self._given:
            return
        asked = wire.TakeBackRequest(self._answered, self._given)
        patience = Patience(self._shared.patience, self._shared.patience)
        try:
            await self._ask("POST", f"/{self._id}/take-back", asked, wire.TakenBack, patience)
        except AnswerLost as error:  # it may be asked for again
            raise NotAnswered(f"{error}; the request before this one has yet to be undone") from error
        self._answered = self._given

    async def _take_back_soon(self) -> None:
        """The same, if the server answers; otherwise it is done with the next request."""
        with contextlib.suppress(NotAnswered, RuntimeError, TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._take_back()

    async def _end(self) -> None:
        await self._ask("DELETE", f"/{self._id}", None, wire.ClosedSession, Patience(0.0, 0.0))

    async def _begin(self) -> None:
        if self._lost:
            raise NotAnswered(self._lost)
        if self._id:
            return
        patience = Patience(self._shared.patience, self._shared.patience)
        self._id = (await self._ask("POST", "", self._terms, wire.OpenSession, patience)).id
        self._shared.open.add(self._id)
        self._check_open()

    async def _ask(self, method: str, path: str, asked: Any, answer: type, patience: Patience) -> Any:
        return await self._shared.ask(method, f"/v1/sessions{path}", asked, answer, self._tenant, patience)

    def _opened(self, id: str) -> "RemoteSession":
        self._shared.open.add(id)
        return RemoteSession(self._shared, self._terms, self._tenant, id)

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the session is closed: use it inside `async with`, or close it later")

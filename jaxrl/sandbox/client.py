"""A pool somewhere else: the same calls and results as ``Pool``, over HTTP to ``jaxrl sandbox serve``.

Back-pressure (429) is waited out, as a full pool makes its callers wait. A server that refuses the connection or is
shutting down (503) is tried again for a while. Whatever else fails on the way is an ``infra_error``, since the
call may have run: never a status that would be blamed on the code.
"""

import asyncio
import contextlib
import json
import math
import random
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

try:
    import aiohttp
except ImportError as error:
    raise ImportError("the sandbox's client needs aiohttp: pip install 'jaxrl[serve]'") from error

from jaxrl.sandbox import arguments, codec, pool_arguments, wire
from jaxrl.sandbox.admission import Starts
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.protocol import Limits
from jaxrl.sandbox.remote_session import AnswerLost, NotAnswered, Patience, RemoteSession, SessionChannel
from jaxrl.sandbox.result import Result, fault
from jaxrl.sandbox.wire import BatchLine, Health, RunRequest

_CONNECT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # between two tries, in seconds; doubled each time
_PART_CALLS, _PART_BYTES = 256, 8 << 20  # of one request of a batch
_PARTS_AT_ONCE = 4
# A host that vanished without a word is noticed after a minute: seconds idle, seconds between probes, probes.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 20, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 4}
_EXAMPLE = "http://127.0.0.1:8780"
_BLAMED_ON_CALLER = (400, 413)
_BLAMED_ON_TOKEN = (401, 403)
_LACKING, _FULL, _SHUTTING_DOWN = 422, 429, 503
_CLOSE_SECONDS = 5.0  # for ending sessions
_LOST = (NotAnswered, aiohttp.ClientError, TimeoutError)


class SandboxClient:
    """Runs snippets on a server: ``run`` and ``session`` as ``Pool`` has them.

    Args:
        url: of the server, such as ``http://127.0.0.1:8780``.
        token: where the server asks for one.
        patience_seconds: how long a server that refuses connections or is shutting down is tried again.
        silence_seconds: how long a result may take, the time in the server's queue included, before the server
            is taken for lost.
        connections: requests under way at once; further calls wait for one.

    Raises:
        ValueError: the URL is none of HTTP, or a number is out of range.
        SandboxUnavailable (on entering): there is no such server at this address.
        PermissionError (on entering): the token is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        patience_seconds: float = 30.0,
        silence_seconds: float = 600.0,
        connections: int = 256,
    ) -> None:
        arguments.kind("url", url, str, "str")
        if not urllib.parse.urlsplit(url).netloc or not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https:// and a host; give one such as {_EXAMPLE}")
        arguments.kind("token", token, str, "str")
        if token != token.strip() or not token.isprintable():
            raise ValueError("token holds white space or unprintable characters, such as a line's end; strip it")
        arguments.above_zero("patience_seconds", patience_seconds)
        arguments.above_zero("silence_seconds", silence_seconds)
        arguments.whole("connections", connections)
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._patience = patience_seconds
        self._silence = silence_seconds
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._starts = Starts()
        self.limits = Limits()  # the server's own, once it is known
        self.most: Limits | None = None  # the same, once it is known
        self.isolation = ""
        self._part_calls, self._part_bytes = _PART_CALLS, _PART_BYTES
        self._sessions = SessionChannel(self._ask, set(), patience_seconds)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Find the server. Unless used as a context manager, call it; again does nothing."""
        async with self._starts.turn():
            if self._session is not None:
                return
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, socket_factory=_socket),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=self._silence),
                headers=self._headers,
            )
            try:
                health = await self.health()
            except BaseException:
                await self._shut()
                raise
            self.limits = self.most = health.limits
            self.isolation = health.isolation
            self._part_calls = min(_PART_CALLS, health.most_calls)
            self._part_bytes = min(_PART_BYTES, health.most_bytes // 2)  # the rest is for the largest single call

    async def close(self) -> None:
        """End the sessions and the connections; the server kills what still runs for them."""
        self._starts.close()
        await self._shut()

    async def _shut(self) -> None:
        if self._sessions.open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await asyncio.gather(*map(self._end_session, self._sessions.open), return_exceptions=True)
            self._sessions.open.clear()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def health(self) -> Health:
        """What the server says of itself.

        Raises:
            SandboxUnavailable: it cannot be reached, or is no sandbox server.
            PermissionError: the token is wrong.
        """
        try:
            async with self._accepted("GET", "/v1/health") as response:
                return _read(Health, await response.read())
        except _LOST as error:
            reason = str(error) or type(error).__name__
            raise SandboxUnavailable(
                f"no sandbox server answers at {self._url}: {reason}. Start one: jaxrl sandbox serve"
            ) from error

    async def run(
        self,
        code: str,
        stdin: str | bytes = "",
        echo: bool = True,
        limits: Limits | None = None,
        tenant: str = "",
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
        language: str | Language = "python",
        processes: bool = False,
    ) -> Result:
        """As ``Pool.run``; ``limits`` beyond the server's own are cut to those.

        Raises:
            ValueError: the server refuses the files, or the call for its size; or a language that no server knows.
            SandboxUnavailable: the server lacks what the language or processes need.
            PermissionError: the token is missing or wrong.
            RuntimeError: the client is not open.
        """
        pool_arguments.check_call(code, stdin, echo, limits, tenant, files, wanted, language, processes)
        request = wire.request(code, stdin, echo, limits, files, wanted, language, processes)
        try:
            async with self._accepted("POST", "/v1/run", _bytes_of(request), tenant) as response:
                return _read(Result, await response.read())
        except _LOST as error:
            return self._fault(error)

    def session(
        self, *, limits: Limits | None = None, tenant: str = "", checkpoint: bool = False, live: bool = True
    ) -> RemoteSession:
        """A notebook, as ``Pool.session``; ``limits`` beyond the server's own are cut to those.

        The server ends it when it is not used for long (``--session-idle-seconds``), and keeps no more than so many.

        Raises:
            TypeError: an argument is of a wrong kind.
        """
        pool_arguments.check_session(limits, tenant, checkpoint, live)
        return RemoteSession(self._sessions, wire.SessionRequest(wire.partial(limits), checkpoint, live), tenant)

    async def _ask(self, method: str, path: str, asked: Any, answer: type, tenant: str, patience: Patience) -> Any:
        """What the server answers to a session's request."""
        try:
            async with self._accepted(method, path, _bytes_of(asked), tenant, patience) as response:
                return _read(answer, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AnswerLost(self._words(error)) from error

    async def _end_session(self, id: str) -> None:
        await self._ask("DELETE", f"/v1/sessions/{id}", None, wire.ClosedSession, "", Patience(0.0, 0.0))

    async def run_batch(self, calls: Sequence[RunRequest], tenant: str = "") -> AsyncIterator[tuple[int, Result]]:
        """Run many calls in few requests; gives (index of the call, its result) as they end, each call once.

        Raises:
            ValueError: the server refuses a call's files, or a call for its size.
            SandboxUnavailable: the server lacks what a call's language or processes need.
            PermissionError: the token is missing or wrong.
            RuntimeError: the client is not open.
        """
        arguments.kind("calls", calls, Sequence, "a sequence of sandbox.RunRequest")
        for call in calls:
            arguments.kind("an entry of calls", call, RunRequest, "a sandbox.RunRequest")
        finished: asyncio.Queue[tuple[int, Result] | Exception] = asyncio.Queue()
        parts = _parts(calls, self._part_calls, self._part_bytes)

        async def work() -> None:
            try:
                for first, part in parts:
                    async for index, result in self._run_part(part, tenant):
                        finished.put_nowait((first + index, result))
            except Exception as error:
                finished.put_nowait(error)

        tasks = [asyncio.create_task(work()) for _ in range(_PARTS_AT_ONCE)]
        try:
            for _ in calls:
                item = await finished.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_part(self, part: Sequence[bytes], tenant: str) -> AsyncIterator[tuple[int, Result]]:
        missing = set(range(len(part)))
        reason: Exception = NotAnswered(f"{self._url} was stopped")
        try:
            body = b'{"calls": [' + b", ".join(part) + b"]}"
            async with self._accepted("POST", "/v1/batch", body, tenant) as response:
                async for line in _lines(response):
                    answer = _read(BatchLine, line)
                    if answer.index in missing:
                        missing.remove(answer.index)
                        yield answer.index, answer.result
        except _LOST as error:
            reason = error
        for index in sorted(missing):
            yield index, self._fault(reason)

    def _fault(self, error: Exception) -> Result:
        return fault(self._words(error))

    def _words(self, error: Exception) -> str:
        return str(error) if isinstance(error, NotAnswered) else f"the answer of {self._url} was lost: {error!r}"

    @contextlib.asynccontextmanager
    async def _accepted(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        tenant: str = "",
        patience: Patience | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of a server that took the request, after as many tries as that needs.

        Raises:
            NotAnswered: patience ran out, or the server refused; AnswerLost where it failed.
            ValueError, PermissionError: the request is at fault.
            SandboxUnavailable: the server lacks what a call asks for.
        """
        headers = (
            {"Content-Type": "application/json", "X-Tenant": urllib.parse.quote(tenant)} if body is not None else {}
        )
        patience = patience or Patience(math.inf, self._patience)
        pause, failing_since, was_full = _FIRST_PAUSE, None, False
        while True:
            if self._session is None:
                raise RuntimeError("the sandbox client is not open: use it inside `async with SandboxClient(...)`")
            try:
                async with self._session.request(
                    method, self._url + path, data=body, headers=headers, allow_redirects=False
                ) as response:
                    if response.status == 200:
                        yield response
                        return
                    status, problem = response.status, await _problem(response)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:  # nothing was sent
                status, problem = 0, str(error)
            if status in _BLAMED_ON_CALLER:
                raise ValueError(problem)
            if status == _LACKING:
                raise SandboxUnavailable(f"{self._url}: {problem}")
            if status in _BLAMED_ON_TOKEN:
                raise PermissionError(f"{self._url} refuses the token: {problem}")
            if status not in (0, _FULL, _SHUTTING_DOWN):
                kind = NotAnswered if 300 <= status < 500 else AnswerLost
                raise kind(f"{self._url}{path} answered {status}: {problem}")
            full = status == _FULL
            if failing_since is None or full != was_full:
                was_full, failing_since = full, time.monotonic()
            if time.monotonic() - failing_since >= (patience.full if full else patience.away):
                raise NotAnswered(f"{self._url} takes no calls: {problem}")
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _bytes_of(request: Any) -> bytes | None:
    return None if request is None else json.dumps(codec.write(request)).encode()


def _parts(calls: Sequence[RunRequest], most: int, most_bytes: int) -> Iterator[tuple[int, list[bytes]]]:
    """Calls as JSON, cut into requests; with each the index of its first call."""
    first, part, size = 0, [], 0
    for index, call in enumerate(calls):
        data = _bytes_of(call)
        if part and (len(part) == most or size + len(data) > most_bytes):
            yield first, part
            first, part, size = index, [], 0
        part.append(data)
        size += len(data)
    if part:
        yield first, part


def _read(record: type, body: bytes) -> Any:
    try:
        return codec.read(record, json.loads(body), closed=False)
    except ValueError as error:
        raise AnswerLost(f"an answer that cannot be read: {error}") from error


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines, of any length."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        rest += chunk
        *lines, last = rest.split(b"\n") if b"\n" in chunk else (rest,)
        rest = last
        for line in lines:
            yield bytes(line)


async def _problem(response: aiohttp.ClientResponse) -> str:
    """What a refusal says."""
    text = await response.text(errors="replace")
    try:
        problem = codec.read(wire.Problem, json.loads(text), closed=False)
    except ValueError:
        return text[:200]
    return "; ".join(filter(None, [problem.error, problem.limit and f"limit: {problem.limit}", problem.remedy]))


def _socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made

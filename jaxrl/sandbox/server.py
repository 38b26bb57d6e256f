"""A pool over HTTP. Whatever the code does, the answer is 200 and a result; a refusal means that nothing was run."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from jaxrl import __version__
from jaxrl.sandbox import codec, exposition, loopback, openapi, pool_arguments
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.result import Result, fault
from jaxrl.sandbox.room import RETRY_SECONDS, Refused, Room
from jaxrl.sandbox.served_sessions import ServedSessions
from jaxrl.sandbox.session import Session
from jaxrl.sandbox.wire import (
    BatchLine,
    BatchRequest,
    CellRequest,
    ClosedSession,
    Copies,
    ForkRequest,
    Health,
    OpenSession,
    Problem,
    RunRequest,
    SessionRequest,
    TakeBackRequest,
    TakenBack,
    capped,
)

_METRICS_SECONDS = 5.0
_LAST_ANSWERS_SECONDS = 0.5  # for what is being written when the drain is over; aiohttp waits twice as long
_OPEN_PATHS = ("/v1/health", "/openapi.json")  # no token needed
_LONGEST_TENANT = 256
_LONGEST_REASON = 200  # characters in the log

_log = logging.getLogger(__name__)
_http_log = logging.getLogger(f"{__name__}.http")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """What a server takes.

    Attributes:
        tokens: any of them opens it; none: every program of this machine may.
        calls: calls that may run or wait at once; further requests are refused with 429.
        body_bytes: of one request.
        waiting_bytes: of all requests that are under way, and of the histories that run with them.
        width: calls of one batch that are in the pool at once.
        peer_seconds: a client that neither sends its request nor takes its results for so long is cut off.
        sessions: open at once; further ones are refused with 429.
        token_sessions: of these, those of one token.
        idle_seconds: a session that is not used for so long is ended.
        history_bytes: code and files that the cells of one session may be given.
    """

    tokens: tuple[str, ...] = ()
    calls: int = 4096
    body_bytes: int = 32 << 20
    waiting_bytes: int = 512 << 20
    width: int = 24
    peer_seconds: float = 60.0
    sessions: int = 256
    token_sessions: int = 256
    idle_seconds: float = 600.0
    history_bytes: int = 64 << 20


class SandboxServer:
    """The routes over one pool."""

    def __init__(self, pool: Pool, settings: ServerSettings) -> None:
        self._pool = pool
        self._settings = settings
        self._calls = Room(settings.calls, "calls", "--queue")
        self._bytes = Room(settings.waiting_bytes, "bytes", "--queue-mib")
        self._sessions = ServedSessions(
            settings.sessions, settings.token_sessions, settings.idle_seconds, settings.history_bytes
        )
        self._refused: Counter[int] = Counter()
        self._draining = False
        self._unavailable = False  # the last call found no jail
        self._description = json.dumps(openapi.document())

    def application(self) -> web.Application:
        """For an ``aiohttp.web.AppRunner`` with ``handler_cancellation``, which ends calls whose clients leave."""
        application = web.Application(middlewares=[self._answer_refusals], client_max_size=self._settings.body_bytes)
        application.add_routes(
            [
                web.post("/v1/run", self._run),
                web.post("/v1/batch", self._batch),
                web.post("/v1/sessions", self._open_session),
                web.post("/v1/sessions/{id}/cells", self._run_cell),
                web.post("/v1/sessions/{id}/fork", self._fork_session),
                web.post("/v1/sessions/{id}/take-back", self._take_back),
                web.delete("/v1/sessions/{id}", self._close_session),
                web.get("/v1/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._openapi),
            ]
        )
        application.on_cleanup.append(self._end_sessions)
        return application

    async def drain(self) -> None:
        """Refuse new requests, wait until those under way are answered, and end the sessions."""
        self._draining = True
        await self._bytes.empty.wait()
        await self._sessions.close_all()

    async def _end_sessions(self, application: web.Application) -> None:
        await self._sessions.close_all()

    # Around every request

    @web.middleware
    async def _answer_refusals(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            self._authorize(request)
            return await handler(request)
        except Refused as refused:
            status, problem = refused.status, refused.problem
        except web.HTTPException as error:  # no such path, no such method
            known = ", ".join(resource.canonical for resource in request.app.router.resources())
            status = error.status
            problem = Problem(error.reason, f"{request.method} {request.path}", known, "see /openapi.json")
        except Exception as error:
            _log.exception("a request failed")
            status, problem = 500, Problem("the server failed", type(error).__name__, "", "see the server's log")
        self._refused[status] += 1
        headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return _json(problem, status, headers)

    def _authorize(self, request: web.Request) -> None:
        if not self._settings.tokens:
            loopback.check(request.headers)
        given = request.headers.get("Authorization")
        if self._settings.tokens and (given is not None or request.path not in _OPEN_PATHS):
            self._token_number(given)

    def _token_number(self, header: str | None) -> int:
        """Which token the header names; every one is compared, in a time that tells nothing of them."""
        presented = (header or "").removeprefix("Bearer ").strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(presented, token.encode()) for token in self._settings.tokens]
        if not any(matches):
            remedy = "send the header `Authorization: Bearer TOKEN` with a token of this server"
            raise Refused(401, "no valid token" if header else "no token", limit="a bearer token", remedy=remedy)
        return matches.index(True)

    def _tenant(self, request: web.Request) -> str:
        tenant = request.headers.get("X-Tenant", "")
        if len(tenant) > _LONGEST_TENANT or not tenant.isascii():
            limit = f"at most {_LONGEST_TENANT} ASCII characters"
            raise Refused(400, "bad X-Tenant", value=ascii(tenant)[:80], limit=limit, remedy="shorten it")
        return f"{self._owner(request)}:{tenant}"

    def _owner(self, request: web.Request) -> int:
        """Number of the token, whose sessions are nobody else's."""
        return self._token_number(request.headers.get("Authorization")) if self._settings.tokens else 0

    @contextlib.asynccontextmanager
    async def _body(self, request: web.Request, record: type) -> AsyncIterator[Any]:
        """The request as a record; holds room for its bytes until it is answered."""
        if self._draining:
            raise Refused(503, "the server is shutting down", remedy="try again, there or elsewhere")
        if request.content_type != "application/json":  # what a web page cannot send unasked to a server on loopback
            kind = request.content_type
            raise Refused(415, "not JSON", value=kind, limit="application/json", remedy="set Content-Type")
        size = request.content_length
        if size is None:
            raise Refused(411, "a request of unknown length", remedy="send Content-Length")
        limit = self._settings.body_bytes
        if size > limit:
            remedy = "send smaller files or batches, or start the server with a larger --body-mib"
            raise Refused(413, "the request is too large", value=str(size), limit=f"{limit} bytes", remedy=remedy)
        with self._bytes.hold(size):
            try:
                async with asyncio.timeout(self._settings.peer_seconds):
                    body = await request.read()
                asked = codec.read(record, json.loads(body, parse_constant=_no_constant))
            except TimeoutError as error:
                raise Refused(408, "the request never came whole", remedy="send it faster") from error
            except codec.Malformed as error:
                raise Refused(
                    400, str(error), value=error.value, limit=error.expected, remedy="see /openapi.json"
                ) from error
            except (ValueError, RecursionError) as error:
                raise Refused(400, "not JSON", value=str(error), limit="JSON", remedy="see /openapi.json") from error
            yield asked

    # Routes

    async def _run(self, request: web.Request) -> web.Response:
        tenant = self._tenant(request)
        async with self._body(request, RunRequest) as asked:
            self._check(asked, "the call")
            with self._calls.hold(1):
                try:
                    return _json(await self._call(asked, tenant))
                except ValueError as error:
                    raise _bad_call(error, "the call") from error

    async def _batch(self, request: web.Request) -> web.StreamResponse:
        tenant = self._tenant(request)
        async with self._body(request, BatchRequest) as asked:
            for index, call in enumerate(asked.calls):
                self._check(call, f"calls[{index}]")
            with self._calls.hold(len(asked.calls)) as give_back:
                response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
                await response.prepare(request)
                try:
                    await self._stream(asked.calls, tenant, response, give_back)
                except* (TimeoutError, ConnectionError):
                    _log.warning("a client took no more results of its batch and was cut off")
                    if request.transport is not None:
                        request.transport.abort()
                return response

    async def _stream(
        self, calls: Sequence[RunRequest], tenant: str, response: web.StreamResponse, give_back: Callable[[int], None]
    ) -> None:
        """Run the calls, ``width`` at once, and write each result when it is there.

        Whoever ran a call writes its result before taking the next, so a slow reader holds ``width`` results at most.
        """
        waiting = iter(enumerate(calls))
        writing = asyncio.Lock()

        async def work() -> None:
            for index, call in waiting:
                try:
                    result = await self._call(call, tenant)
                except ValueError as error:  # the answer has begun, so it is too late to refuse the request
                    result = fault(str(error))
                line = json.dumps(codec.write(BatchLine(index, result))) + "\n"
                async with writing, asyncio.timeout(self._settings.peer_seconds):
                    await response.write(line.encode())
                give_back(1)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._settings.width, len(calls))):
                group.create_task(work())

    async def _call(self, asked: RunRequest, tenant: str) -> Result:
        return await self._outcome(
            self._pool.run(
                asked.code,
                stdin=asked.stdin,
                echo=asked.echo,
                limits=capped(asked.limits, self._pool.limits),
                tenant=tenant,
                files=asked.files,
                wanted=asked.wanted,
                language=asked.language,
                processes=asked.processes,
            )
        )

    async def _outcome(self, call: Awaitable[Result]) -> Result:
        """The pool's result; whatever keeps the pool from giving one is a fault of ours, but for ValueError."""
        try:
            result = await call
        except SandboxUnavailable as error:  # what only this call lacks was noticed before
            self._unavailable = True
            return fault(str(error))
        except ValueError:
            raise
        except RuntimeError as error:  # pool or session is closed
            _log.warning("a call could not be run: %s", error)
            return fault(str(error))
        except Exception as error:
            _log.exception("a call could not be run")
            return fault(f"{type(error).__name__}: {error}")
        self._unavailable = False
        return result

    def _check(self, asked: RunRequest, where: str) -> None:
        """Refuse a call that the pool would not take, while nothing of its request has run."""
        limits = capped(asked.limits, self._pool.limits)
        try:
            pool_arguments.check_cell(asked.code, asked.echo, asked.files, asked.wanted)
            self._pool.check(limits, asked.files, asked.language, asked.processes)
        except ValueError as error:
            raise _bad_call(error, where) from error
        except SandboxUnavailable as error:
            value = f"{where}: language={asked.language!r}, processes={asked.processes}"
            remedy = "ask a server that has it, or mend this one's machine: `jaxrl sandbox doctor`"
            raise Refused(422, f"not available here: {error}", value=value, remedy=remedy) from error

    async def _open_session(self, request: web.Request) -> web.Response:
        tenant = self._tenant(request)
        async with self._body(request, SessionRequest) as asked:
            with self._sessions.room(self._owner(request), 1):
                limits = capped(asked.limits, self._pool.limits)
                try:
                    session = self._pool.session(
                        limits=limits, tenant=tenant, checkpoint=asked.checkpoint, live=asked.live
                    )
                except ValueError as error:
                    remedy = "ask for less, or start the server with a larger --session-memory-mib"
                    raise Refused(400, str(error), value="limits", limit="sessions that fit", remedy=remedy) from error
                return _json(self._keep(session, request))

    async def _run_cell(self, request: web.Request) -> web.Response:
        id, owner = request.match_info["id"], self._owner(request)
        with self._sessions.use(id, owner) as session:
            async with self._body(request, CellRequest) as asked:
                self._sessions.check_number(id, owner, asked.number)
                with self._calls.hold(1), self._sessions.history_room(id, owner, _cell_bytes(asked)) as history:
                    with self._bytes.hold(history if session.replays else 0):
                        cell = session.run_numbered(asked.number, asked.code, asked.echo, asked.files, asked.wanted)
                        try:
                            return _json(await self._outcome(cell))
                        except ValueError as error:
                            raise _bad_call(error, "the cell") from error

    async def _fork_session(self, request: web.Request) -> web.Response:
        id, owner = request.match_info["id"], self._owner(request)
        with self._sessions.use(id, owner) as session:
            async with self._body(request, ForkRequest) as asked:
                self._sessions.check_number(id, owner, asked.number)
                with self._calls.hold(1), self._sessions.room(owner, asked.copies):
                    try:
                        copies = await session.fork(asked.copies)
                    except RuntimeError as error:
                        remedy = "try again; then see /v1/health"
                        raise Refused(503, f"the session could not be copied: {error}", remedy=remedy) from error
                    opened = [self._keep(copy, request) for copy in copies]
                    self._sessions.note_copies(id, asked.number, [copy.id for copy in opened])
                    return _json(Copies(opened))

    async def _take_back(self, request: web.Request) -> web.Response:
        id, owner = request.match_info["id"], self._owner(request)
        async with self._body(request, TakeBackRequest) as asked:
            await self._sessions.take_back(id, owner, asked.answered, asked.given)
            return _json(TakenBack(asked.answered))

    def _keep(self, session: Session, request: web.Request) -> OpenSession:
        return OpenSession(self._sessions.add(session, self._owner(request)), self._settings.idle_seconds)

    async def _close_session(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        await self._sessions.close(id, self._owner(request))
        return _json(ClosedSession(id))

    async def _health(self, request: web.Request) -> web.Response:
        status = "draining" if self._draining else "unavailable" if self._unavailable else "ok"
        health = Health(
            status=status,
            isolation=self._pool.isolation,
            limits=self._pool.limits,
            most_calls=self._settings.calls,
            most_bytes=self._settings.body_bytes,
            version=__version__,
        )
        return _json(health, 200 if status == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            metrics = await asyncio.wait_for(self._pool.metrics(), _METRICS_SECONDS)
        except TimeoutError as error:
            raise Refused(
                503, "the pool's warden does not answer", remedy="try again; then restart the server"
            ) from error
        text = exposition.render(metrics, self._refused, len(self._sessions))
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.Response(text=self._description, content_type="application/json")


def _json(record: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(codec.write(record), status=status, headers=headers)


def _cell_bytes(asked: CellRequest) -> int:
    texts = sum(len(text.encode("utf-8", "surrogatepass")) for text in (asked.code, *asked.files))
    return texts + sum(map(len, asked.files.values()))


def _bad_call(error: ValueError, where: str) -> Refused:
    return Refused(400, str(error), value=where, limit="files that fit", remedy="leave them out or rename them")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _without_trace(record: logging.LogRecord) -> bool:
    """Let a line about what was no request be a line: where aiohttp noticed that is of no use to anybody."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        record.msg, record.args, record.exc_info = f"not a request: {reason}", (), None
    return True


async def serve(
    pool: Pool,
    settings: ServerSettings,
    host: str,
    port: int,
    drain_seconds: float,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way; a second signal ends that at once.

    Args:
        port: 0 takes a free one.
        drain_seconds: how long calls under way may go on; what is left is killed.
        announce: is told the address once calls are taken.

    Raises:
        SandboxUnavailable: the machine refuses a layer of the jail.
        OSError: the address cannot be bound.
    """
    _http_log.addFilter(_without_trace)
    asked, pressed = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (pressed if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    async with pool:
        server = SandboxServer(pool, settings)
        runner = web.AppRunner(
            server.application(),
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            shutdown_timeout=_LAST_ANSWERS_SECONDS,
            logger=_http_log,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            address, bound, *_ = runner.addresses[0]
            announce(f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}")
            await asked.wait()
            ends = [asyncio.create_task(server.drain()), asyncio.create_task(pressed.wait())]
            await asyncio.wait(ends, timeout=drain_seconds, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()
            await pool.close()  # what still runs is answered, as a fault of ours, before its connection is closed
        finally:
            await runner.cleanup()

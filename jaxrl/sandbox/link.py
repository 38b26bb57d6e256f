"""The pool's end of one warden: starts the process, sends calls, matches reports to the callers that wait."""

import asyncio
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

from jaxrl.sandbox.board import Board, shared_memory
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.metrics import WardenMetrics
from jaxrl.sandbox.protocol import (
    READ_BYTES,
    Call,
    CellHead,
    FrameReader,
    Kind,
    Report,
    frame,
    pack_ids,
    unpack_ids,
)

HOME = str(pathlib.Path(__file__).resolve().parents[2])  # the folder that holds the package
_BOOT = "import sys; sys.path.append(sys.argv[2]); from jaxrl.sandbox.warden import main; main()"
_START_SECONDS = 300.0
_CLOSE_SECONDS = 10.0
_MOST_FRAMES = 1024  # that are gathered for one write


class WardenLost(Exception):
    """The warden ended before it reported the call.

    Attributes:
        running: the call was being run, and not just waiting for a slot.
        served: the warden had finished other calls.
    """

    def __init__(self, *, running: bool = False, served: bool = False) -> None:
        super().__init__("the sandbox's warden process ended")
        self.running, self.served = running, served


class WardenLink(asyncio.BufferedProtocol):
    """One warden process.

    Args:
        on_slot_free: called whenever a submitted call is over, whether or not anybody still waits for it.
    """

    def __init__(self, on_slot_free: Callable[[], None]) -> None:
        self._on_slot_free = on_slot_free
        self._frames = FrameReader()
        self._room = memoryview(bytearray(READ_BYTES))
        self._pending: dict[int, asyncio.Future[Report]] = {}
        self._asked: list[asyncio.Future[WardenMetrics]] = []  # in the order of the questions, and of the answers
        self._questions: dict[int, asyncio.Future[list[int]]] = {}
        self._outgoing: list[bytes] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._board: Board | None = None
        self._heartbeat_seconds = 0.0
        self._heard = self._pinged = 0.0  # when the last data came, and when the last ping was sent
        self._overdue = False
        self._served = False

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._gone.done()

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, settings: dict) -> None:
        """Start the process and wait until its templates are warm.

        Raises:
            SandboxUnavailable: no jail can be had; the text says why.
            WardenLost: the process ended while starting.
        """
        loop = asyncio.get_running_loop()
        self._heartbeat_seconds = settings["heartbeat_seconds"]
        places = settings["slots"] + settings["slow_slots"]
        memory = shared_memory(places)
        self._board = Board(memory, places)
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-c", _BOOT, str(theirs.fileno()), HOME, str(memory)],
            env={"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
            pass_fds=[theirs.fileno(), memory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a Ctrl-C in the terminal is the pool's to handle
        )
        theirs.close()
        os.close(memory)
        ours.setblocking(False)
        try:
            self._transport, _ = await loop.connect_accepted_socket(lambda: self, ours)
            self._transport.write(frame(Kind.SETUP, json.dumps(settings | {"home": HOME}).encode()))
            await asyncio.wait_for(asyncio.shield(self._ready), _START_SECONDS)
        except BaseException:
            self._ready.cancel()  # nobody waits for it any more
            await self.close()
            raise
        self._beat()

    def submit(self, call: Call, cell: CellHead | None = None) -> "asyncio.Future[Report]":
        """Send a call, or a session's cell; its report, or WardenLost, comes with the future.

        A coroutine would be larger than that.
        """
        future: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        if self.alive:
            try:
                content = call.pack()
            except BaseException:
                self._on_slot_free()
                raise
            data = frame(Kind.SUBMIT, content) if cell is None else frame(Kind.CELL, cell.pack() + content)
            self._send(data, gather=bool(self._pending))  # one that is alone has nothing to wait for
            self._pending[call.id] = future
        else:
            self._on_slot_free()
            future.set_exception(WardenLost(served=self._served))
        return future

    def cancel(self, id: int) -> None:
        """Kill a call that nobody waits for any more."""
        self._send(frame(Kind.CANCEL, id.to_bytes(8, "little")))

    async def metrics(self) -> WardenMetrics:
        """What the warden says of itself.

        Raises:
            WardenLost: it ended first.
        """
        if not self.alive:
            raise WardenLost
        future: asyncio.Future[WardenMetrics] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self._send(frame(Kind.STATS))
        return await future

    def fork(self, question: int, session: int, copies: list[int]) -> "asyncio.Future[list[int]]":
        """Have a session's process copied; gives the ids of the copies that live, none where it cannot be copied."""
        return self._ask(Kind.FORK, question, session, *copies)

    def end_session(self, question: int, session: int) -> "asyncio.Future[list[int]]":
        """End a session's process; done when it is gone."""
        return self._ask(Kind.END, question, session)

    def _ask(self, kind: Kind, question: int, *ids: int) -> "asyncio.Future[list[int]]":
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        if self.alive:
            self._questions[question] = future
            self._send(frame(kind, pack_ids([question, *ids])))
        else:
            future.set_result([])
        return future

    async def close(self) -> None:
        """End the process and everything it started; nothing is left when this returns."""
        if self.alive:
            self._send(frame(Kind.CLOSE))
            self._flush()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._gone), _CLOSE_SECONDS)
        if self._process is None:
            return
        if self._transport is None:
            self._process.kill()  # it was not told to start anything yet
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the jail's first process dies with its parent, and all others with it
            self._process.wait()
        if self._transport is not None:
            self._transport.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _beat(self) -> None:
        """Ask the warden whether it is there, now and again; one that stays silent is killed.

        Silence has to be found twice in a row: a caller that kept this event loop from running for long would
        otherwise take what it has not read yet for silence.
        """
        if not self.alive:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._heard >= self._pinged:
            self._pinged, self._overdue = now, False
            self._send(frame(Kind.PING))
        elif now - self._pinged > self._heartbeat_seconds:
            if self._overdue and self._process is not None:
                self._process.kill()
            self._overdue = True
        loop.call_later(self._heartbeat_seconds / 4, self._beat)

    def _send(self, data: bytes, gather: bool = True) -> None:
        """Frames of one turn of the event loop leave in one write, unless they are very many or not to be gathered."""
        if gather and not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(data)
        if not gather or len(self._outgoing) >= _MOST_FRAMES:
            self._flush()

    def _flush(self) -> None:
        data, self._outgoing = b"".join(self._outgoing), []
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    # asyncio.BufferedProtocol

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, length: int) -> None:
        self._heard = asyncio.get_running_loop().time()
        for kind, body in self._frames.feed(self._room[:length]):
            if kind is Kind.REPORT:
                report = Report.unpack(body)
                future = self._pending.pop(report.id)
                self._on_slot_free()
                self._served = True
                if not future.done():
                    future.set_result(report)
            elif kind is Kind.STATS:
                answer = json.loads(body)
                asked = self._asked.pop(0)
                if not asked.done():
                    asked.set_result(WardenMetrics(**answer | {"template_rss_kib": tuple(answer["template_rss_kib"])}))
            elif kind is Kind.DONE:
                question, *ids = unpack_ids(body)
                done = self._questions.pop(question)
                if not done.done():
                    done.set_result(ids)
            elif kind is Kind.READY and not self._ready.done():
                self._ready.set_result(None)
            elif kind is Kind.UNAVAILABLE and not self._ready.done():
                self._ready.set_exception(SandboxUnavailable(body.decode()))

    def connection_lost(self, error: Exception | None) -> None:
        self._gone.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(WardenLost())
        running = self._board.running() if self._board is not None else set()
        pending, self._pending = self._pending, {}
        for id, future in pending.items():
            self._on_slot_free()
            if not future.done():
                future.set_exception(WardenLost(running=id in running, served=self._served))
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(WardenLost())
        for done in self._questions.values():
            if not done.done():
                done.set_result([])

"""Answers of a server that nobody had: what was asked for is then as if it had not been."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from jaxrl.sandbox import Pool, SandboxClient, SandboxUnavailable
from jaxrl.sandbox.bench.processes import descendants
from tests.sandbox.test_serve_sessions import serving


class Wire:
    """Between client and server; while ``cut``, whatever the server answers is held back, or lost at the end."""

    def __init__(self) -> None:
        self.cut = False
        self.drops = False  # the connection ends with the first answer that is held back
        self.held = asyncio.Event()  # there was such an answer

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(1 << 16):
                if self.cut:
                    self.held.set()
                    if self.drops:
                        return
                else:
                    writer.write(data)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(1 << 16):
                writer.write(data)

    def connect(self, port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to_server = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                await asyncio.gather(self._requests(reader, to_server), self._answers(there, writer))

        return between


def over_a_wire(work: Callable[[Pool, SandboxClient, Wire], Coroutine[Any, Any, None]]) -> None:
    async def together(pool: Pool, served: TestServer) -> None:
        wire = Wire()
        async with await asyncio.start_server(wire.connect(served.port), "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            async with SandboxClient(f"http://127.0.0.1:{port}") as client:
                await work(pool, client, wire)

    serving(together)


async def cancel_when_held(asked: Coroutine[Any, Any, Any], wire: Wire) -> None:
    """Ask, and wait no more once the answer is on its way."""
    wire.cut = True
    task = asyncio.create_task(asked)
    await asyncio.wait_for(wire.held.wait(), 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    wire.cut = False
    wire.held.clear()


@pytest.mark.parametrize("live", [True, False])
def test_a_cancelled_cell_is_undone_though_it_had_ended(live: bool) -> None:
    async def work(pool: Pool, client: SandboxClient, wire: Wire) -> None:
        async with client.session(live=live) as session:
            await session.run("n = 1")
            for code in ("n += 10", "n += 100"):
                await cancel_when_held(session.run(code), wire)
            assert (await session.run("n += 1; n")).stdout == "2\n"
            await cancel_when_held(session.run("n += 10"), wire)
            (copy,) = await session.fork(1)
            async with copy:
                assert (await copy.run("n")).stdout == "2\n"
            assert (await session.run("n")).stdout == "2\n"

    over_a_wire(work)


def test_copies_of_which_no_answer_came_are_ended_at_once() -> None:
    async def work(pool: Pool, client: SandboxClient, wire: Wire) -> None:
        async with client.session() as session:
            await session.run("n = 1")
            alone = set(descendants(pool.warden_pid))
            wire.cut = wire.drops = True
            forking = asyncio.create_task(session.fork(3))
            await asyncio.wait_for(wire.held.wait(), 20)
            wire.cut = wire.drops = False
            with pytest.raises(SandboxUnavailable, match="could not be copied"):
                await forking
            assert set(descendants(pool.warden_pid)) == alone and (await pool.metrics()).sessions == 1
            (copy,) = await session.fork(1)
            assert (await copy.run("n")).stdout == "1\n"
            await copy.close()
            await cancel_when_held(session.fork(3), wire)
            assert (await session.run("n")).stdout == "1\n"
            assert (await pool.metrics()).sessions == 1
            await cancel_when_held(session.fork(3), wire)
        assert (await pool.metrics()).sessions == 0, "closing the session ended the copies that nobody knows of"

    over_a_wire(work)


def test_a_request_that_comes_later_than_its_taking_back_is_refused() -> None:
    async def work(pool: Pool, client: SandboxClient, wire: Wire) -> None:
        async with client.session() as session:
            await session.run("n = 1")
            path = f"{client._url}/v1/sessions/{session._id}"
            assert client._session is not None
            asked = ((f"{path}/take-back", {"answered": 1, "given": 3}, 200), (f"{path}/cells", _cell(3), 400))
            for url, body, status in (*asked, (f"{path}/fork", {"copies": 1, "number": 2}, 400)):
                async with client._session.post(url, json=body) as response:
                    assert response.status == status, await response.text()
            async with client._session.post(f"{path}/cells", json=_cell(4)) as response:
                assert (await response.json())["stdout"] == "2\n"

    over_a_wire(work)


def _cell(number: int) -> dict[str, Any]:
    return {"code": "n += 1; n", "number": number}

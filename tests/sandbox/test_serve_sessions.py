"""Sessions over HTTP: a real server process, clients that use it, and clients that leave or pry."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import gc
import http.client
import json
import pathlib
import signal
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import jsonschema
import pytest
from aiohttp.test_utils import TestServer

from jaxrl.records import ToolStatus
from jaxrl.sandbox import (
    Limits,
    Pool,
    RemoteSession,
    Result,
    Runner,
    RunnerSession,
    SandboxClient,
    SandboxUnavailable,
    openapi,
)
from jaxrl.sandbox.bench.processes import descendants, is_alive
from jaxrl.sandbox.server import SandboxServer, ServerSettings
from tests.sandbox.driver import Driver, wait_until
from tests.sandbox.served import Served
from tests.sandbox.test_serve import JSON, SLEEP, ask, metrics

OK, ERROR, TIMEOUT, INFRA = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.INFRA_ERROR
LARGE = base64.b64encode(bytes(600_000)).decode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served("--wall-seconds", "30") as server:
        yield server


def post(served: Served, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and answer of a request to the sessions' routes."""
    status, _, text = ask(served, "POST", f"/v1/sessions{path}", body, JSON | (headers or {}))
    return status, json.loads(text)


def begin(served: Served, code: str = "x = 41", **options: Any) -> str:
    """Id of a session that has run a cell."""
    status, answer = post(served, "", options)
    assert status == 200, answer
    assert post(served, f"/{answer['id']}/cells", {"code": code})[1]["status"] == "ok"
    return answer["id"]


def idle_processes(served: Served) -> int:
    """How many the server has while it has nothing to do; they may still be going."""
    wait_until(lambda: metrics(served)["jaxrl_sandbox_sessions"] == 0)
    return len(descendants(served.process.pid))


# As in a pool

CELLS = [
    "import os, random\nx = random.random()\nx",
    "print('before')\nraise ValueError('no')",
    "open('f', 'wb').write(b'\\xff' * 10)",
    "os.write(1, b'\\xff\\x00ok');",
    "while True: pass",
    "x, os.listdir()",
    "os._exit(3)",
    "x = bytearray(1 << 40)",
    "print('y' * 10_000)",
    "random.random()",
]


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"live": False}])
def test_cells_end_as_they_do_in_a_pool(served: Served, options: dict[str, bool]) -> None:
    limits = Limits(cpu_seconds=0.4, disk_mib=8, output_kib=8, wall_seconds=30)

    async def run_all(runner: Runner) -> list[Result]:
        async with runner.session(limits=limits, **options) as session:
            return [await session.run(code, wanted=["f"]) for code in CELLS]

    there = served.use(run_all)
    with Driver(workers=1, preload=()) as driver:
        here = driver.wait(run_all(driver.pool))
    measured = dict.fromkeys(("cpu_seconds", "wall_seconds", "queue_seconds", "peak_rss_kib"), 0)
    assert [dataclasses.replace(result, **measured) for result in there] == [
        dataclasses.replace(result, **measured) for result in here
    ]
    assert [result.rebuilt for result in there].count(True) == (2 if not options else 0)


def test_copies_share_the_past_and_nothing_else(served: Served) -> None:
    async def work(client: SandboxClient) -> None:
        async with client.session() as session:
            await session.run("x = [open('g').read()]", files={"g": b"given"})
            left, right = await session.fork(2)
            await left.run("x.append('left')")
            await session.close()
            (second,) = await left.fork(1)
            results = [await one.run("x") for one in (left, right, second)]
            assert [result.stdout for result in results] == [
                "['given', 'left']\n", "['given']\n", "['given', 'left']\n",
            ]  # fmt: skip
            assert not any(result.rebuilt for result in results)
            with pytest.raises(RuntimeError, match="session is closed"):
                await session.run("1")
            with pytest.raises(ValueError, match="copies=0 must be at least 1"):
                await left.fork(0)
            with pytest.raises(ValueError, match="copies=1000000000 must be at most 4096"):
                await left.fork(10**9)
            await asyncio.gather(*(one.close() for one in (left, right, second)))

    before = idle_processes(served)
    served.use(work)
    wait_until(lambda: idle_processes(served) == before)


def test_cells_of_one_session_run_in_their_order_and_those_of_others_meanwhile(served: Served) -> None:
    async def work(client: SandboxClient) -> None:
        async with client.session() as session, client.session() as other:
            await session.run("import time; seen = []")
            cells = [asyncio.create_task(session.run(f"time.sleep(0.1); seen.append({n}); seen")) for n in range(5)]
            assert (await cells[-1]).stdout == "[0, 1, 2, 3, 4]\n"
            long = asyncio.create_task(session.run("time.sleep(25)"))
            await asyncio.to_thread(wait_until, lambda: metrics(served)["jaxrl_sandbox_running_calls"] == 1)
            assert (await other.run("7")).stdout == "7\n"
            assert not long.done()
            long.cancel()

    served.use(work)


def test_a_session_gets_no_more_than_the_server_gives(served: Served) -> None:
    async def work(client: SandboxClient) -> Result:
        async with client.session(limits=Limits(cpu_seconds=50)) as session:
            return await session.run("while True: pass")

    result = served.use(work)
    assert result.status is TIMEOUT and 0.5 < result.cpu_seconds < 2


def test_answers_are_as_the_description_says(served: Served) -> None:
    document = json.loads(ask(served, "GET", "/openapi.json")[2])

    def check(path: str, method: str, status: int, answer: Any) -> None:
        described = document["paths"][path][method]["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator(described | {"components": document["components"]}).validate(answer)

    status, opened = post(served, "", {"limits": {"cpu_seconds": 0.1}, "checkpoint": True})
    check("/v1/sessions", "post", status, opened)
    status, result = post(served, f"/{opened['id']}/cells", {"code": "1", "files": {"f": "AA=="}, "wanted": ["f"]})
    assert (status, result["stdout"], result["files"]) == (200, "1\n", {"f": "AA=="})
    check("/v1/sessions/{id}/cells", "post", status, result)
    status, copies = post(served, f"/{opened['id']}/fork", {"copies": 2})
    assert status == 200 and len(copies["sessions"]) == 2
    check("/v1/sessions/{id}/fork", "post", status, copies)
    for one in (opened, *copies["sessions"]):
        for status in (200, 404):
            answered, _, text = ask(served, "DELETE", f"/v1/sessions/{one['id']}")
            assert answered == status
            check("/v1/sessions/{id}", "delete", status, json.loads(text))


def test_every_route_is_described_and_no_other() -> None:
    routes = SandboxServer(Pool(preload=()), ServerSettings()).application().router.routes()
    served = {(route.resource.canonical, route.method.lower()) for route in routes if route.resource is not None}
    described = {(path, method) for path, methods in openapi.document()["paths"].items() for method in methods}
    assert {(path, method) for path, method in served if method != "head"} == described


# What is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("", {"checkpoint": 1}, 400, "checkpoint is 1 but must be true or false"),
        ("", {"limits": {"memory_mib": 1}}, 400, "limits.memory_mib is 1"),
        ("/no-such-id/cells", {"code": "1"}, 404, "no such session"),
        ("/no-such-id/fork", {"copies": 1}, 404, "no such session"),
        ("/{id}/cells", {}, 400, "code is None but must be given"),
        ("/{id}/cells", {"code": "1", "files": {"../x": ""}}, 400, "plain relative path"),
        ("/{id}/cells", {"code": "1", "language": "bash"}, 400, "language is 'bash' but must be left out"),
        ("/{id}/fork", {"copies": -1}, 400, "copies is -1 but must be at least 1"),
        ("/{id}/fork", {"copies": 10**9}, 400, "copies is 1000000000 but must be at most 4096"),
        ("/{id}/fork", {"copies": 300}, 429, "too many sessions"),
    ],
)
def test_bad_requests_are_refused_in_words(served: Served, path: str, body: Any, status: int, words: str) -> None:
    id = begin(served)
    answered, problem = post(served, path.format(id=id), body)
    assert (answered, set(problem)) == (status, {"error", "value", "limit", "remedy"}) and words in problem["error"]
    assert post(served, f"/{id}/cells", {"code": "x"})[1]["stdout"] == "41\n"
    ask(served, "DELETE", f"/v1/sessions/{id}")


def test_ids_are_not_guessed_and_open_nothing_to_another_token(tmp_path: pathlib.Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    first, second = ({"Authorization": f"Bearer {token}"} for token in ("first", "second"))
    with Served("--token-file", str(tokens)) as served:
        ids = [post(served, "", {}, first)[1]["id"] for _ in range(20)]
        assert len(set(ids)) == 20 and min(map(len, ids)) >= 32
        assert all(sum(a == b for a, b in zip(ids[0], id, strict=True)) < 12 for id in ids[1:])
        for path, body in (("cells", {"code": "1"}), ("fork", {"copies": 1})):
            assert post(served, f"/{ids[0]}/{path}", body)[0] == 401
            assert post(served, f"/{ids[0]}/{path}", body, second)[0] == 404
        assert ask(served, "DELETE", f"/v1/sessions/{ids[0]}", headers=second)[0] == 404
        assert post(served, f"/{ids[0]}/cells", {"code": "1"}, first)[1]["stdout"] == "1\n"


def test_sessions_are_bounded_and_clients_wait_for_room() -> None:
    with Served("--sessions", "2") as served:

        async def work(client: SandboxClient) -> None:
            one, other = client.session(), client.session()
            await one.run("x = 1")
            await other.run("x = 2")
            status, problem = await asyncio.to_thread(post, served, "", {})
            assert (status, problem["error"], problem["limit"]) == (429, "too many sessions", "2")
            assert "--sessions" in problem["remedy"]
            with pytest.raises(SandboxUnavailable, match="too many sessions"):
                await one.fork(1)
            refused = await client.session().run("1")
            assert refused.status is INFRA and "too many sessions; limit: 2" in refused.stderr
            late = client.session()
            waiting = asyncio.create_task(late.run("7"))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await other.close()
            assert (await waiting).stdout == "7\n"
            assert (await one.run("x")).stdout == "1\n"

        served.use(work, patience_seconds=1.5)


def test_one_token_cannot_take_all_sessions(tmp_path: pathlib.Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    first, second = ({"Authorization": f"Bearer {token}"} for token in ("first", "second"))
    with Served("--token-file", str(tokens), "--sessions", "4", "--token-sessions", "2") as served:
        ids = [post(served, "", {}, first)[1]["id"] for _ in range(2)]
        for path, body in (("", {}), (f"/{ids[0]}/fork", {"copies": 1})):
            status, problem = post(served, path, body, first)
            assert (status, problem["error"], problem["limit"]) == (429, "too many sessions of this token", "2")
            assert "--token-sessions" in problem["remedy"]
        assert [post(served, "", {}, second)[0] for _ in range(3)] == [200, 200, 429]
        assert ask(served, "DELETE", f"/v1/sessions/{ids[0]}", headers=first)[0] == 200
        assert post(served, f"/{ids[1]}/fork", {"copies": 1}, first)[0] == 200


def test_what_one_session_is_given_is_bounded() -> None:
    """It is kept for as long as the session lives, to rebuild that."""
    with Served("--session-mib", "1") as served:

        async def work(client: SandboxClient) -> None:
            async with client.session() as session:
                await session.run("x = 1", files={"f": bytes(600_000)})
                with pytest.raises(ValueError, match="cells are too large together.*1048576 bytes.*--session-mib"):
                    await session.run("x = 2", files={"g": bytes(600_000)})
                assert (await session.run("x")).stdout == "1\n"

        served.use(work)


@pytest.mark.parametrize("text", ["x" * 400_000, "é" * 200_000], ids=["ascii", "two bytes each"])
def test_cells_that_come_together_share_what_one_session_may_be_given(text: str) -> None:
    """Each would fit by itself; those that run are remembered, so what they may be given is one bound for all."""
    with Served("--session-mib", "1", "--wall-seconds", "30") as served:
        id = begin(served, "n = 0")

        def add(_: int) -> int:
            return post(served, f"/{id}/cells", {"code": f"{SLEEP.format(0.3)}; n += 1; '{text}';"})[0]

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            statuses = Counter(threads.map(add, range(8)))
        assert statuses == {200: 2, 413: 6}
        assert post(served, f"/{id}/cells", {"code": "n"})[1]["stdout"] == "2\n"


def test_what_a_cell_under_way_may_add_is_free_again_when_it_does_not() -> None:
    with Served("--session-mib", "1") as served:
        id = begin(served)
        for _ in range(3):
            status, result = post(served, f"/{id}/cells", {"code": "import os; os._exit(3)", "files": {"f": LARGE}})
            assert (status, result["status"]) == (200, "error")
        assert post(served, f"/{id}/cells", {"code": "x", "files": {"f": LARGE}})[1]["stdout"] == "41\n"


def test_histories_that_are_run_again_count_towards_what_is_under_way() -> None:
    """Copies share one for nothing, but each cell of a copy without a process carries it whole."""
    with Served("--queue-mib", "3", "--wall-seconds", "50") as served:
        file = base64.b64encode(bytes(900_000)).decode()
        id = post(served, "", {"live": False})[1]["id"]
        assert post(served, f"/{id}/cells", {"code": "x = 41", "files": {"f": file}})[1]["status"] == "ok"
        copies = [copy["id"] for copy in post(served, f"/{id}/fork", {"copies": 4})[1]["sessions"]]
        live = begin(served)
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            for copy in copies[:3]:
                threads.submit(post, served, f"/{copy}/cells", {"code": SLEEP.format(40)})
            wait_until(lambda: metrics(served)["jaxrl_sandbox_running_calls"] == 3)
            status, problem = post(served, f"/{copies[3]}/cells", {"code": "x"})
            assert (status, problem["error"]) == (429, "the server is full") and "--queue-mib" in problem["remedy"]
            assert post(served, f"/{live}/cells", {"code": "x"})[1]["stdout"] == "41\n"
            for copy in copies[:3]:
                ask(served, "DELETE", f"/v1/sessions/{copy}")
        assert post(served, f"/{copies[3]}/cells", {"code": "x"})[1]["stdout"] == "41\n"


def test_a_session_that_would_be_put_out_by_itself_is_refused() -> None:
    with Served("--session-memory-mib", "88", "--memory-mib", "88") as served:

        async def work(client: SandboxClient) -> None:
            with pytest.raises(ValueError, match="disk_mib = 96 may outgrow session_memory_mib=88.*--session-memory"):
                await client.session().run("1")
            async with client.session(limits=Limits(memory_mib=80)) as session:
                assert (await session.run("7")).stdout == "7\n"

        served.use(work)


def test_cells_wait_while_the_server_is_full() -> None:
    with Served("--slots", "1", "--slow-slots", "0", "--queue", "2", "--wall-seconds", "30") as served:

        async def work(client: SandboxClient) -> list[Result]:
            sessions = [client.session() for _ in range(5)]
            return await asyncio.gather(*(one.run(f"{SLEEP.format(0.3)}; {n}") for n, one in enumerate(sessions)))

        assert [result.stdout for result in served.use(work, patience_seconds=0.5)] == [f"{n}\n" for n in range(5)]
        assert metrics(served)["jaxrl_sandbox_refused_requests_total429"] >= 1


# Ends


def test_a_session_that_nobody_uses_is_ended_and_one_in_use_is_not() -> None:
    with Served("--session-idle-seconds", "3", "--wall-seconds", "30", "--cpu-seconds", "9") as served:
        before = idle_processes(served)
        begin(served)  # by a client that vanishes
        assert metrics(served)["jaxrl_sandbox_open_sessions"] == 1

        async def work(client: SandboxClient) -> None:
            session = client.session()
            assert (await session.run(f"x = 1; {SLEEP.format(4)}")).status is OK
            for _ in range(5):
                await asyncio.sleep(0.8)
                result = await session.run("x")
                assert (result.stdout, result.rebuilt) == ("1\n", False)
            await asyncio.to_thread(wait_until, lambda: metrics(served)["jaxrl_sandbox_open_sessions"] == 0)
            result = await session.run("x")
            assert result.status is INFRA and "no such session" in result.stderr and "used for 3 s" in result.stderr
            with pytest.raises(SandboxUnavailable, match="no such session"):
                await session.fork(1)
            await session.close()

        served.use(work)
        wait_until(lambda: idle_processes(served) == before)
        assert metrics(served)["jaxrl_sandbox_open_sessions"] == 0


def test_a_client_that_closes_ends_its_sessions(served: Served) -> None:
    async def work(client: SandboxClient) -> None:
        session = client.session()
        await session.run("1")
        await session.fork(2)

    before = idle_processes(served)
    served.use(work)
    wait_until(lambda: idle_processes(served) == before)


def test_a_client_that_leaves_in_the_middle_of_a_cell_costs_the_session_that_cell(served: Served) -> None:
    id = begin(served)
    address = urllib.parse.urlsplit(served.url)
    connection = http.client.HTTPConnection(address.hostname, address.port)
    connection.request("POST", f"/v1/sessions/{id}/cells", json.dumps({"code": f"x = 2; {SLEEP.format(25)}"}), JSON)
    wait_until(lambda: metrics(served)["jaxrl_sandbox_running_calls"] == 1)
    connection.close()
    wait_until(lambda: metrics(served)["jaxrl_sandbox_running_calls"] == 0)
    _, result = post(served, f"/{id}/cells", {"code": "x"})
    assert (result["stdout"], result["rebuilt"]) == ("41\n", True)
    ask(served, "DELETE", f"/v1/sessions/{id}")


def test_cancelling_a_cell_ends_it_and_the_session_goes_on(served: Served) -> None:
    async def work(client: SandboxClient) -> None:
        async with client.session() as session:
            await session.run("import time; x = 1")
            cell = asyncio.create_task(session.run("x = 2; time.sleep(25)"))
            await asyncio.sleep(0.3)
            cell.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cell
            result = await session.run("x")
            assert (result.stdout, result.rebuilt) == ("1\n", True)

    served.use(work)


def test_closing_a_session_ends_the_cell_that_it_runs(served: Served) -> None:
    async def work(client: SandboxClient) -> None:
        session = client.session()
        await session.run("import time")
        cell, behind = (asyncio.create_task(session.run("time.sleep(25)")) for _ in range(2))
        await asyncio.sleep(0.3)
        await session.close()
        for waiting in (cell, behind):
            with pytest.raises(RuntimeError, match="session is closed"):
                await waiting

    served.use(work)
    wait_until(lambda: metrics(served)["jaxrl_sandbox_running_calls"] == 0)


def test_sigterm_lets_cells_end_and_leaves_no_session() -> None:
    with Served("--wall-seconds", "30") as served:

        async def work(client: SandboxClient) -> tuple[Result, int, set[int]]:
            session, idle = client.session(), client.session()
            await session.run("import time; x = 1")
            await idle.run("1")
            below = set(descendants(served.process.pid))
            running = asyncio.create_task(session.run("time.sleep(1.5); x"))
            await asyncio.sleep(0.5)
            served.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            status, _ = await asyncio.to_thread(post, served, "", {})
            return await running, status, below

        result, status, below = served.use(work, patience_seconds=0.5)
        assert (result.status, result.stdout, status) == (OK, "1\n", 503)
        assert served.process.wait(20) == 0
    assert not any(map(is_alive, below))


def test_a_killed_server_is_a_fault_of_ours_and_leaves_nothing() -> None:
    """And so is the next one at its address, which knows nothing of the session."""
    with Served("--wall-seconds", "30") as served:
        port = urllib.parse.urlsplit(served.url).port

        async def work(client: SandboxClient) -> list[int]:
            session, idle = client.session(), client.session()
            await session.run("x = 1")
            await idle.run("x = 1")
            below = descendants(served.process.pid)
            running = asyncio.create_task(session.run(SLEEP.format(25)))
            await asyncio.sleep(0.3)
            served.process.kill()
            assert (await running).status is INFRA
            await asyncio.to_thread(served.process.wait)
            with pytest.raises(SandboxUnavailable, match="the cell may have run"):
                await session.fork(1)
            with pytest.raises(SandboxUnavailable, match="takes no calls"):
                await idle.fork(1)
            with Served(port=port):
                result = await idle.run("x")
                assert result.status is INFRA and "no such session" in result.stderr
                async with client.session() as fresh:
                    assert (await fresh.run("7")).stdout == "7\n"
            return below

        below = served.use(work, patience_seconds=0.5)
        wait_until(lambda: not any(map(is_alive, below)))


def test_a_cell_whose_answer_is_lost_ends_its_session_and_is_not_run_twice() -> None:
    """The connection is cut when the cell has run, before a byte of its answer has passed; a caller tries again."""

    async def work(pool: Pool, served: TestServer) -> None:
        cut = False

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
            with contextlib.closing(writer):
                while data := await reader.read(1 << 16):
                    if answers and cut:
                        return
                    writer.write(data)

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to_server = await asyncio.open_connection("127.0.0.1", served.port)
            with contextlib.suppress(ConnectionError):
                await asyncio.gather(pass_on(reader, to_server, False), pass_on(there, writer, True))

        async with await asyncio.start_server(between, "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            async with SandboxClient(f"http://127.0.0.1:{port}") as client:
                session = client.session()
                await session.run("n = 0")
                (copy,) = await session.fork(1)
                cut = True
                first = await session.run("n += 1; n")
                cut = False
                again = await session.run("n += 1; n")
                for result in (first, again):
                    assert result.status is INFRA and "the cell may have run" in result.stderr, result
                with pytest.raises(SandboxUnavailable, match="begin another"):
                    await session.fork(1)
                assert (await copy.run("n += 1; n")).stdout == "1\n"
                await asyncio.gather(session.close(), copy.close())

    serving(work)


def test_a_session_outside_of_its_client() -> None:
    session = SandboxClient("http://127.0.0.1:9").session()
    with pytest.raises(RuntimeError, match="client is not open"):
        asyncio.run(session.run("1"))
    asyncio.run(session.close())


def test_a_client_that_is_started_twice_has_its_connections_once() -> None:
    async def work(pool: Pool, served: TestServer) -> None:
        client = SandboxClient(str(served.make_url("")))
        await asyncio.gather(client.start(), client.start())
        session = client._session
        await client.start()
        assert client._session is session
        assert (await client.run("6 * 7")).stdout == "42\n"
        await client.close()
        gc.collect()
        assert not complaints

    complaints: list[str] = []

    async def listening(pool: Pool, served: TestServer) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what["message"]))
        await work(pool, served)

    serving(listening)


def serving(work: Callable[[Pool, TestServer], Awaitable[None]], **settings: float) -> None:
    async def together() -> None:
        async with Pool(Limits(disk_mib=8), workers=1, preload=()) as pool:
            async with TestServer(SandboxServer(pool, ServerSettings(**settings)).application()) as served:
                await work(pool, served)
            assert (await pool.metrics()).sessions == 0, "the pool is still open when the server has ended"
            assert (await pool.run("1")).status is OK

    asyncio.run(asyncio.wait_for(together(), 60))


def test_a_server_that_ends_ends_its_sessions() -> None:
    async def work(pool: Pool, served: TestServer) -> None:
        client = SandboxClient(str(served.make_url("")))
        await client.start()
        sessions: list[RunnerSession] = [client.session() for _ in range(3)]
        await asyncio.gather(*(session.run("1") for session in sessions))
        assert (await pool.metrics()).sessions == 3
        session = client._session
        assert session is not None
        await session.close()  # without a word to the server

    serving(work)


@pytest.mark.slow
def test_requests_that_come_together_with_the_end_of_a_session_are_answered() -> None:
    """The session is ended a moment after its last use, again and again; each cell is run in it or refused."""

    async def work(pool: Pool, served: TestServer) -> None:
        async with SandboxClient(str(served.make_url(""))) as client:
            sessions: list[RemoteSession] = []
            for pause in range(40):
                session = client.session()
                assert (await session.run("x = 1")).status is OK
                await asyncio.sleep(0.03 + pause * 0.001)
                result = await session.run("x")
                assert result.stdout == "1\n" or "no such session" in result.stderr, result
                sessions.append(session)
            deadline = time.monotonic() + 20
            while (await pool.metrics()).sessions and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            assert (await pool.metrics()).sessions == 0

    serving(work, idle_seconds=0.05)

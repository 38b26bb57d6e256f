"""What the server does when its pool, or its peer, does not do its part; in this process, on a real socket."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from aiohttp.test_utils import TestServer

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Pool, RunRequest, SandboxClient
from jaxrl.sandbox.server import SandboxServer, ServerSettings
from tests.sandbox.served import REPOSITORY
from tests.sandbox.test_jail import ORDINARY, python

LIMITS = Limits(cpu_seconds=2, disk_mib=8)


def serving(work: Callable[[Pool, TestServer], Awaitable[None]], **settings: float) -> None:
    """Do some work with an open pool and a server over it."""

    async def together() -> None:
        async with Pool(LIMITS, workers=1, preload=()) as pool:
            server = SandboxServer(pool, ServerSettings(**settings))
            async with TestServer(server.application(), handler_cancellation=True) as served:
                await work(pool, served)

    asyncio.run(asyncio.wait_for(together(), 60))


def test_a_pool_that_cannot_run_calls_is_a_fault_of_ours() -> None:
    async def work(pool: Pool, served: TestServer) -> None:
        async with SandboxClient(str(served.make_url(""))) as client:
            assert (await client.run("1")).status is ToolStatus.OK
            await pool.close()
            result = await client.run("1")
            assert result.status is ToolStatus.INFRA_ERROR and "not open" in result.stderr
            batch = [item async for item in client.run_batch([RunRequest("1"), RunRequest("2")])]
            assert [item.status for _, item in batch] == [ToolStatus.INFRA_ERROR] * 2
            await pool.start()
            assert (await client.run("1")).status is ToolStatus.OK

    serving(work)


def test_a_request_that_never_comes_whole_is_given_up() -> None:
    async def work(pool: Pool, served: TestServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(
            b"POST /v1/run HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
        )
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 408 " in answer
        writer.close()

    serving(work, peer_seconds=0.3)


def test_a_client_that_takes_no_results_is_cut_off_and_its_calls_end() -> None:
    """Results of a megabyte each, none of which is read: the server runs a few and waits, not for ever."""

    async def work(pool: Pool, served: TestServer) -> None:
        calls = [{"code": "open('f', 'wb').write(bytes(1 << 20))", "wanted": ["f"]}] * 200
        body = json.dumps({"calls": calls}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1)
        head = "POST /v1/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        most = 0
        for _ in range(40):  # far longer than the server's patience
            metrics = await pool.metrics()
            most = max(most, metrics.running + metrics.waiting)
            await asyncio.sleep(0.05)
        assert most <= 4 and metrics.running == 0
        assert sum(metrics.calls.values()) + metrics.cancelled > 0
        with contextlib.suppress(ConnectionResetError):
            assert (await reader.read()).count(b'"index"') < 60  # and the end, which a server that waits would not send
        async with SandboxClient(str(served.make_url(""))) as client:
            assert (await client.run("1")).status is ToolStatus.OK
        writer.close()

    serving(work, peer_seconds=0.5, width=4, calls=200)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the right to make cgroups away from root")
def test_what_the_machine_lacks_is_no_fault_unless_it_was_allowed() -> None:
    """As an ordinary user this machine's groups cannot be written to."""
    script = """
import argparse, asyncio, json
from aiohttp.test_utils import TestServer
from jaxrl.sandbox import RunRequest, SandboxClient, SandboxUnavailable, serve
from jaxrl.sandbox.server import SandboxServer, ServerSettings
CALLS = [RunRequest("echo 7", language="bash"), RunRequest("print(7)", processes=True)]
async def ask(client, calls):
    try:
        return [result.stdout async for _, result in client.run_batch([RunRequest("7"), *calls])]
    except SandboxUnavailable as error:
        return str(error)
async def use(*options):
    parser = argparse.ArgumentParser()
    serve.add_options(parser)
    async with serve._pool(parser.parse_args(["--preload=", "--workers=1", "--cpu-seconds=9", *options])) as pool:
        async with TestServer(SandboxServer(pool, ServerSettings()).application()) as served:
            async with SandboxClient(str(served.make_url(""))) as client:
                found = [await ask(client, [call]) for call in CALLS]
                try:
                    found.append((await client.run("echo 7", language="bash")).stdout)
                except SandboxUnavailable as error:
                    found.append(str(error))
                return found + [(await client.health()).status]
print(json.dumps([asyncio.run(use()), asyncio.run(use("--processes-without-cgroup"))]))"""
    refused, allowed = python(ORDINARY, str(REPOSITORY), script)
    for text in refused[:3]:
        assert "not available here" in text and "jaxrl sandbox serve --processes-without-cgroup" in text, text
    assert [sorted(found) for found in allowed[:3]] == [["7\n", "7\n"]] * 2 + [["\n", "7"]]
    assert refused[3] == allowed[3] == "ok"


@pytest.mark.parametrize("missing", ["aiohttp", "prometheus_client"])
def test_the_missing_extra_is_named(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from jaxrl import cli; sys.exit(cli.main(['sandbox', 'serve']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert missing in done.stderr and "pip install 'jaxrl[serve]'" in done.stderr


def test_help_shows_examples_and_loads_little() -> None:
    program = (
        "import atexit, sys; from jaxrl import cli; "
        "atexit.register(lambda: print('loaded', {'jax', 'flax', 'aiohttp'} & set(sys.modules))); "
        "cli.main(['sandbox', 'serve', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "jaxrl sandbox serve --host" in done.stdout.partition("examples:")[2]
    assert "--token-file" in done.stdout and "--memory-mib" in done.stdout
    assert done.stdout.endswith("loaded set()\n")

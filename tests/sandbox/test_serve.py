"""The pool over HTTP: a real server process, and whoever speaks to it."""

import asyncio
import base64
import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxrl.envs.python_tool import PythonTool
from jaxrl.records import ToolCall, ToolStatus
from jaxrl.sandbox import Limits, Result, RunRequest, SandboxClient, SandboxUnavailable, openapi
from jaxrl.sandbox.bench.processes import descendants, is_alive
from jaxrl.sandbox.grading import Grade, Grader, StdioTest
from tests.sandbox.driver import Driver, wait_until
from tests.sandbox.served import SERVE, Served
from tests.sandbox.test_languages import needs

OK, INFRA = ToolStatus.OK, ToolStatus.INFRA_ERROR
JSON = {"Content-Type": "application/json"}
SLEEP = "import time; time.sleep({})"
BASH = {"code": "tr a-z A-Z < in > out; echo $((6 * 7))", "language": "bash"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served("--slots", "4") as server:
        yield server


def ask(
    served: Served, method: str, path: str, body: Any = None, headers: Mapping[str, str] = JSON
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request; bytes are sent as they are, other bodies as JSON."""
    address = urllib.parse.urlsplit(served.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, dict(headers))
    answer = connection.getresponse()
    try:
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def metrics(served: Served) -> dict[str, float]:
    """Value by name and labels."""
    _, _, text = ask(served, "GET", "/metrics")
    samples = [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]
    return {f"{sample.name}{''.join(sample.labels.values())}": sample.value for sample in samples}


# Calls

CODES = [
    "print('ä', 6 * 7)\n'last'",
    "raise ValueError('x')",
    "while True: pass",
    "x = bytearray(1 << 40)",
    "print('y' * (1 << 26))",
    "print('y' * 10_000)",
    "import os; os.write(1, b'\\xff\\x00ok'); os.write(2, bytes(range(128, 256)));",
    "'\ud800'",
    "import os; os._exit(7)",
    "import os; os.kill(os.getpid(), 9)",
]


def _but_what_is_measured(result: Result) -> Result:
    """Without times and memory, and without how much of an endless output had been read when it was stopped."""
    stdout = result.stdout
    if result.status is ToolStatus.OUTPUT_LIMIT:
        stdout = re.sub(r"\[\d+ bytes left out\]", "[some bytes left out]", stdout)
    measured = dict.fromkeys(("cpu_seconds", "wall_seconds", "queue_seconds", "peak_rss_kib"), 0)
    return dataclasses.replace(result, stdout=stdout, **measured)


def test_calls_end_as_they_do_in_a_pool(served: Served) -> None:
    limits = Limits(cpu_seconds=0.3, disk_mib=8, output_kib=8)

    async def run_all(runner: Any) -> list[Result]:
        return [await runner.run(code, limits=limits) for code in CODES]

    there = served.use(run_all)
    with Driver(workers=1, preload=()) as driver:
        here = driver.wait(run_all(driver.pool))
    assert [_but_what_is_measured(result) for result in there] == [_but_what_is_measured(result) for result in here]
    assert {result.status for result in there} == set(ToolStatus) - {
        INFRA, ToolStatus.PARSE_ERROR, ToolStatus.UNKNOWN_TOOL, ToolStatus.BAD_ARGUMENTS,
    }  # fmt: skip


def test_any_bytes_survive(served: Served) -> None:
    result = served.use(lambda client: client.run(CODES[6]))
    assert (result.stdout, result.stdout_bytes) == ("\ufffd\0ok", b"\xff\0ok")
    assert result.stderr_bytes == bytes(range(128, 256)) and set(result.stderr) == {"\ufffd"}
    _, _, body = ask(served, "POST", "/v1/run", {"code": CODES[6]})
    assert base64.b64decode(json.loads(body)["stdout_bytes"]) == b"\xff\0ok"
    assert served.use(lambda client: client.run("print('ä')")).stdout_bytes is None


def test_input_files_and_wanted_files(served: Served) -> None:
    code = "d = open('in/a', 'rb').read(); open('out.bin', 'wb').write(d[::-1]); print(input(), len(d))"
    given = {"in/a": bytes(range(256)) * 400}
    result = served.use(lambda client: client.run(code, stdin="hello", files=given, wanted=["*.bin"]))
    assert (result.status, result.stdout) == (OK, "hello 102400\n")
    assert result.files == {"out.bin": given["in/a"][::-1]} and result.files_left_out == 0


def test_any_bytes_arrive_on_standard_input(served: Served) -> None:
    code, given = "import sys; print(sys.stdin.buffer.read())", bytes(range(256))
    for stdin, arrives in ((given, given), (b"", b""), ("\u00e4", b"\xc3\xa4"), ("AAEC", b"AAEC")):
        result = served.use(lambda client, stdin=stdin: client.run(code, stdin=stdin))
        assert (result.status, result.stdout) == (OK, f"{arrives}\n")
    body = {"code": code, "stdin": {"base64": base64.b64encode(given).decode()}}
    assert json.loads(ask(served, "POST", "/v1/run", body)[2])["stdout"] == f"{given}\n"

    async def batch(client: SandboxClient) -> Result:
        (answer,) = [result async for _, result in client.run_batch([RunRequest(code, stdin=given)])]
        return answer

    assert served.use(batch).stdout == f"{given}\n"


def test_other_languages(served: Served) -> None:
    needs("bash")
    result = served.use(lambda client: client.run(**BASH, files={"in": b"x"}, wanted=["out"]))
    assert (result.status, result.stdout, result.files) == (OK, "42\n", {"out": b"X"})
    assert "memory cgroup" in result.isolation


def test_a_request_cannot_raise_the_limits_of_the_server(served: Served) -> None:
    generous = Limits(cpu_seconds=50, wall_seconds=50, memory_mib=4096)
    result = served.use(lambda client: client.run("while True: pass", limits=generous))
    assert result.status is ToolStatus.TIMEOUT and 0.5 < result.cpu_seconds < 2
    assert served.use(lambda client: client.run("1", limits=Limits(memory_mib=16))).status is OK


def test_grading_on_a_server_with_less_than_it_needs_blames_no_program(served: Served) -> None:
    expected = "\n".join(map(str, range(5000)))
    program = "print(*range(5000), sep='\\n')"

    async def graded(client: SandboxClient) -> Grade:
        with pytest.raises(ValueError, match="Limits.output_kib=64 but the pool gives no call more than 8"):
            Grader(client, dataclasses.replace(client.limits, output_kib=64))
        grader = Grader(client)
        assert (await grader.grade("print(1)", StdioTest("", "1"))).passed
        return await grader.grade(program, StdioTest("", expected))

    found = served.use(graded)
    assert found.is_infra and "raise the pool's output_kib" in found.detail, found


def test_a_snippet_cannot_reach_the_server(served: Served) -> None:
    address = urllib.parse.urlsplit(served.url)
    code = f"import socket; socket.create_connection(({address.hostname!r}, {address.port}))"
    result = served.use(lambda client: client.run(code))
    assert result.status is ToolStatus.ERROR and "Operation not permitted" in result.stderr


def test_answers_are_as_the_description_says(served: Served) -> None:
    _, _, text = ask(served, "GET", "/openapi.json")
    document = json.loads(text)

    def schema(path: str, status: str, kind: str = "application/json") -> jsonschema.Draft202012Validator:
        described = document["paths"][path]["post"]["responses"][status]["content"][kind]["schema"]
        return jsonschema.Draft202012Validator(described | {"components": document["components"]})

    call = {"code": "print(input())", "stdin": "x", "files": {"f": "AA=="}, "limits": {"cpu_seconds": 0.1}}
    asked = document["paths"]["/v1/run"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator(asked | {"components": document["components"]}).validate(call)
    status, _, body = ask(served, "POST", "/v1/run", call)
    assert status == 200
    schema("/v1/run", "200").validate(json.loads(body))
    status, headers, body = ask(served, "POST", "/v1/batch", {"calls": [call, call]})
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    lines = [json.loads(line) for line in body.splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1]
    for line in lines:
        schema("/v1/batch", "200", "application/x-ndjson").validate(line)
    status, _, body = ask(served, "POST", "/v1/run", {})
    schema("/v1/run", str(status)).validate(json.loads(body))


def test_the_python_tool_takes_a_client_for_a_pool(served: Served) -> None:
    arguments = {"code": "print(input()); open('x')", "input": "hello"}

    async def both(client: SandboxClient) -> ToolCall:
        return await PythonTool(client).call(arguments, seconds=5.0)

    call = served.use(both)
    assert (call.status, call.stdout) == (ToolStatus.ERROR, "hello\n") and "FileNotFoundError" in call.stderr
    assert call.isolation.startswith("jail")


def test_the_server_loads_no_jax(served: Served) -> None:
    served.use(lambda client: client.run("1"))
    assert "jaxlib" not in pathlib.Path(f"/proc/{served.process.pid}/maps").read_text()


# Batches


def test_results_of_a_batch_come_as_they_end(served: Served) -> None:
    """The slow call is the first, is answered last, and still runs when the first answer is here."""
    calls = [RunRequest(SLEEP.format(1))] + [RunRequest(f"print({n})") for n in range(1, 30)]

    async def collect(client: SandboxClient) -> tuple[list[tuple[int, Result]], float]:
        found, running = [], None
        async for item in client.run_batch(calls):
            found.append(item)
            if running is None:
                running = (await asyncio.to_thread(metrics, served))["jaxrl_sandbox_running_calls"]
        return found, running

    found, running = served.use(collect)
    assert running >= 1
    assert found[-1][0] == 0 and found[-1][1].status is OK
    assert {index: result.stdout for index, result in found[:-1]} == {n: f"{n}\n" for n in range(1, 30)}


def test_a_large_batch_is_answered_call_by_call_once(served: Served) -> None:
    calls = [RunRequest(f"print({n})") for n in range(400)]

    async def collect(client: SandboxClient) -> list[tuple[int, Result]]:
        return [item async for item in client.run_batch(calls)]

    found = served.use(collect)
    assert len(found) == 400
    assert {index: result.stdout for index, result in found} == {n: f"{n}\n" for n in range(400)}


def test_an_empty_batch(served: Served) -> None:
    async def collect(client: SandboxClient) -> list[Any]:
        return [item async for item in client.run_batch([])]

    assert served.use(collect) == []
    assert ask(served, "POST", "/v1/batch", {"calls": []})[::2] == (200, b"")


# Refusals


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("POST", "/v1/run", b"{", JSON, 400, "not JSON"),
        ("POST", "/v1/run", b"[" * 100_000, JSON, 400, "not JSON"),
        ("POST", "/v1/run", b"\xff\xfe\xff", JSON, 400, "not JSON"),
        ("POST", "/v1/run", b'{"code": "1", "limits": {"cpu_seconds": NaN}}', JSON, 400, "not JSON"),
        ("POST", "/v1/run", {"code": 1}, JSON, 400, "code is 1 but must be a string"),
        ("POST", "/v1/run", {"code": "1", "language": "C"}, JSON, 400, "language is 'C'"),
        ("POST", "/v1/run", {"code": "1", "files": {"../x": ""}}, JSON, 400, "plain relative path"),
        ("POST", "/v1/batch", {"calls": [{"code": "1", "files": {"/x": ""}}]}, JSON, 400, "plain relative path"),
        ("POST", "/v1/run", {"code": "1", "files": {"x": "A" * (16 << 20)}}, JSON, 400, "do not fit"),
        ("POST", "/v1/run", BASH | {"files": {"main.sh": ""}}, JSON, 400, "names of the program's own"),
        ("POST", "/v1/batch", {"calls": [BASH | {"files": {"main.sh": ""}}]}, JSON, 400, "names of the program's own"),
        ("POST", "/v1/run", {"code": "#" * (9 << 20), "language": "bash"}, JSON, 400, "do not fit"),
        ("POST", "/v1/run", {"code": "1"}, JSON | {"X-Tenant": "x" * 300}, 400, "bad X-Tenant"),
        ("POST", "/v1/batch", {"calls": [{"code": "1", "wanted": ["../*"]}]}, JSON, 400, "out of the working"),
        ("POST", "/v1/run", {"code": "1"}, {"Content-Type": "text/plain"}, 415, "not JSON"),
        ("POST", "/v1/run", None, JSON | {"Content-Length": str(1 << 40)}, 413, "too large"),
        ("POST", "/v1/run", None, JSON | {"Transfer-Encoding": "chunked"}, 411, "unknown length"),
        ("POST", "/v1/batch", {"calls": [{"code": "1"}] * 5000}, JSON, 413, "too many calls"),
        ("GET", "/v1/run", None, {}, 405, "Method Not Allowed"),
        ("GET", "/v2/run", None, {}, 404, "Not Found"),
    ],
)
def test_bad_requests_are_refused_in_words(
    served: Served, method: str, path: str, body: Any, headers: dict[str, str], status: int, words: str
) -> None:
    answered, _, text = ask(served, method, path, body, headers)
    problem = json.loads(text)
    assert answered == status and words in problem["error"], problem
    described = openapi.document()["paths"].get(path, {}).get(method.lower(), {"responses": {"404": "", "405": ""}})
    assert str(status) in described["responses"]
    assert set(problem) == {"error", "value", "limit", "remedy"} and problem["remedy"]
    assert served.use(lambda client: client.run("1")).status is OK


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "localhost:8780"}, 200),
        ({"Host": "[::1]:8780", "Origin": "http://[::1]:8780"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "rebound.example:8780"}, 403),
        ({"Host": "127.0.0.1.rebound.example"}, 403),
        ({"Host": "localhost@rebound.example"}, 403),
        ({"Host": "[rebound"}, 403),
        ({"Host": "localhost", "Origin": "http://page.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost:8780", "Origin": "http://localhost:3000"}, 403),
    ],
)
def test_without_a_token_web_pages_are_refused(served: Served, headers: dict[str, str], status: int) -> None:
    for method, path, body in (("POST", "/v1/run", {"code": "1"}), ("GET", "/v1/health", None)):
        answered, _, text = ask(served, method, path, body, JSON | headers)
        assert answered == status, text
        assert status == 200 or set(json.loads(text)) == {"error", "value", "limit", "remedy"}


def test_what_the_server_refuses_is_the_callers_error_not_the_codes(served: Served) -> None:
    with pytest.raises(ValueError, match="plain relative path"):
        served.use(lambda client: client.run("1", files={"/etc/x": b""}))

    async def batch(client: SandboxClient) -> list[Any]:
        return [item async for item in client.run_batch([RunRequest("1", files={"..": b""})])]

    with pytest.raises(ValueError, match="plain relative path"):
        served.use(batch)


def test_tokens(tmp_path: pathlib.Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("# of two users\nfirst-token\n\nsecond-token\n")
    with Served("--token-file", str(tokens)) as served:
        for headers in (
            {},
            {"Authorization": "Bearer # of two users"},
            {"Authorization": "Bearer third-token"},
            {"Authorization": "Bearer "},
        ):
            status, told, _ = ask(served, "POST", "/v1/run", {"code": "1"}, JSON | headers)
            assert (status, told["www-authenticate"]) == (401, "Bearer")
        assert ask(served, "GET", "/metrics")[0] == 401
        assert [ask(served, "GET", path)[0] for path in ("/v1/health", "/openapi.json")] == [200, 200]
        named = JSON | {"Host": "sandbox.example", "Authorization": "Bearer first-token"}
        assert ask(served, "POST", "/v1/run", {"code": "1"}, named)[0] == 200
        for token in ("first-token", "second-token"):
            assert served.use(lambda client: client.run("1"), token=token).status is OK
        with pytest.raises(PermissionError, match="token"):
            served.use(lambda client: client.run("1"), token="wrong")
        with pytest.raises(PermissionError, match="no token"):
            served.use(lambda client: client.run("1"))


def test_beyond_loopback_only_with_a_token() -> None:
    refused = subprocess.run(
        [*SERVE, "--host", "0.0.0.0", "--port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "--host 0.0.0.0" in refused.stderr and "--token-file" in refused.stderr
    with Served("--host", "0.0.0.0", JAXRL_SANDBOX_TOKEN="from-environment") as served:
        served.url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert ask(served, "POST", "/v1/run", {"code": "1"})[0] == 401
        assert served.use(lambda client: client.run("1"), token="from-environment").status is OK


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--token-file", "/nonexistent"], "cannot be read"),
        (["--token-file", os.devnull], "holds no token"),
        (["--token-file", __file__], "has white space within a line"),
        (["--memory-mib", "3"], "memory_mib=3 is too small"),
        (["--preload", "no_such_module"], "no_such_module"),
        (["--queue", "0"], "--queue 0 must be at least 1"),
        (["--drain-seconds", "-1"], "--drain-seconds -1 must not be negative"),
        (["--port", "65536"], "--port 65536 must lie between 0 and 65535"),
        (["--port", "-1"], "--port -1 must lie between 0 and 65535"),
        (["--slow-slots", "-1"], "slow_slots=-1 must not be negative"),
        (["--wall-seconds", "inf"], "Limits.wall_seconds=inf must be above 0 and below 2**32"),
    ],
)
def test_bad_options_are_bad_usage(options: list[str], words: str) -> None:
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_what_is_no_request_is_a_line_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    with Served() as served:
        for headers in (JSON | {"X-Tenant": "x" * 10_000}, JSON):
            status, _, _ = ask(served, "POST", "/v1/run", {"code": "1"}, headers)
            assert status == (400 if "X-Tenant" in headers else 200)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith("not a request: ") and len(line) < 300


# Load


def test_a_full_server_says_so_and_its_client_waits() -> None:
    with Served("--slots", "1", "--slow-slots", "0", "--queue", "2") as served:

        async def flood(client: SandboxClient) -> tuple[list[Result], int, str]:
            tasks = [asyncio.create_task(client.run(f"{SLEEP.format(0.3)}; print({n})")) for n in range(6)]
            await asyncio.sleep(0.2)
            status, headers, _ = await asyncio.to_thread(ask, served, "POST", "/v1/run", {"code": "1"})
            return await asyncio.gather(*tasks), status, headers["retry-after"]

        results, status, retry_after = served.use(flood)
        counted = metrics(served)
    assert (status, retry_after) == (429, "1")
    assert [(result.status, result.stdout) for result in results] == [(OK, f"{n}\n") for n in range(6)]
    assert counted["jaxrl_sandbox_refused_requests_total429"] >= 2


def test_tenants_take_turns() -> None:
    """Two tenants by header: one's single call does not wait behind the other's sixty."""
    with Served("--slots", "1", "--slow-slots", "0") as served:

        async def race(client: SandboxClient) -> int:
            done = 0

            async def one_of_many() -> None:
                nonlocal done
                await client.run(SLEEP.format(0.05), tenant="many")
                done += 1

            flood = [asyncio.create_task(one_of_many()) for _ in range(60)]
            while not done:
                await asyncio.sleep(0.01)
            await client.run("1", tenant="öne")
            overtaken = done
            await asyncio.gather(*flood)
            return overtaken

        assert served.use(race) < 20


@pytest.mark.parametrize("path", ["/v1/run", "/v1/batch"])
def test_a_client_that_leaves_ends_its_calls(path: str) -> None:
    call = {"code": SLEEP.format(50)}
    with Served("--wall-seconds", "60") as served:
        before = len(descendants(served.process.pid))
        address = urllib.parse.urlsplit(served.url)
        connection = http.client.HTTPConnection(address.hostname, address.port)
        connection.request("POST", path, json.dumps(call if path == "/v1/run" else {"calls": [call] * 3}), JSON)
        started = 1 if path == "/v1/run" else 3
        wait_until(lambda: metrics(served)["jaxrl_sandbox_running_calls"] == started)
        connection.close()
        wait_until(lambda: metrics(served)["jaxrl_sandbox_cancelled_total"] == started)
        wait_until(lambda: len(descendants(served.process.pid)) == before)
        assert metrics(served)["jaxrl_sandbox_running_calls"] == 0


def test_cancelling_a_clients_call_ends_it_on_the_server() -> None:
    with Served("--wall-seconds", "60") as served:

        async def cancel(client: SandboxClient) -> None:
            task = asyncio.create_task(client.run(SLEEP.format(50)))
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.run("1")).status is OK

        served.use(cancel)
        wait_until(lambda: metrics(served)["jaxrl_sandbox_cancelled_total"] == 1)


def test_metrics_add_up() -> None:
    with Served() as served:

        async def some(client: SandboxClient) -> None:
            await asyncio.gather(*(client.run(code) for code in ["1", "2", "3", "1 / 0", "while True: pass"]))

        served.use(some)
        counted = metrics(served)
    assert [counted[f"jaxrl_sandbox_calls_total{status}"] for status in ("ok", "error", "timeout", "infra_error")] == [
        3, 1, 1, 0,
    ]  # fmt: skip
    assert counted["jaxrl_sandbox_latency_seconds_count"] == 5 == counted["jaxrl_sandbox_latency_seconds_bucket+Inf"]
    assert 0 < counted["jaxrl_sandbox_latency_seconds_bucket0.5"] < 5  # the endless loop took longer
    assert counted["jaxrl_sandbox_cpu_seconds_total"] > 0.5
    assert counted["jaxrl_sandbox_resident_byteswarden"] > 5e6
    assert (counted["jaxrl_sandbox_templates"], counted["jaxrl_sandbox_running_calls"]) == (1, 0)


# Ends


def test_sigterm_lets_calls_end_and_takes_no_more() -> None:
    with Served() as served:
        below = descendants(served.process.pid)

        async def end(client: SandboxClient) -> tuple[Result, int, dict[str, str], int]:
            running = asyncio.create_task(client.run(f"{SLEEP.format(1.5)}; print('done')"))
            await asyncio.sleep(0.5)
            served.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            status, headers, _ = await asyncio.to_thread(ask, served, "POST", "/v1/run", {"code": "1"})
            health, _, body = await asyncio.to_thread(ask, served, "GET", "/v1/health")
            assert json.loads(body)["status"] == "draining"
            return await running, status, headers, health

        result, status, headers, health = served.use(end)
        assert (result.status, result.stdout) == (OK, "done\n")
        assert (status, headers["retry-after"], health) == (503, "1", 503)
        assert served.process.wait(20) == 0
    assert not any(is_alive(pid) for pid in below)


@pytest.mark.parametrize("how", ["drain is over", "second signal"])
def test_calls_that_outlast_the_drain_are_faults_of_ours(how: str) -> None:
    patience = "1" if how == "drain is over" else "100"
    with Served("--drain-seconds", patience, "--wall-seconds", "60") as served:
        below = descendants(served.process.pid)

        async def end(client: SandboxClient) -> tuple[tuple[int, Any, bytes], list[tuple[int, Result]]]:
            call = {"code": SLEEP.format(50)}
            running = asyncio.create_task(asyncio.to_thread(ask, served, "POST", "/v1/run", call))
            calls = [RunRequest("print(1)"), RunRequest(SLEEP.format(50))]
            batch = client.run_batch(calls)
            first = await anext(batch)
            served.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            if how == "second signal":
                served.process.send_signal(signal.SIGTERM)
            return await running, [first, *[item async for item in batch]]

        (status, _, body), batch = served.use(end)
        assert served.process.wait(20) == 0
    assert status == 200 and json.loads(body)["status"] == INFRA and "closed" in json.loads(body)["stderr"]
    assert [(index, item.status) for index, item in batch] == [(0, OK), (1, INFRA)]
    assert not any(is_alive(pid) for pid in below)


def test_a_killed_server_is_a_fault_of_ours_and_leaves_nothing() -> None:
    with Served("--wall-seconds", "60") as served:
        below = descendants(served.process.pid)

        async def kill(client: SandboxClient) -> list[Result]:
            running = asyncio.create_task(client.run(SLEEP.format(50)))
            await asyncio.sleep(0.5)
            served.process.kill()
            lost = await running
            await asyncio.sleep(0.2)
            return [lost, await client.run("1")]  # in its course; before it began

        results = served.use(kill, patience_seconds=0.5)
        assert [result.status for result in results] == [INFRA, INFRA]
        assert "takes no calls" in results[1].stderr
        wait_until(lambda: not any(is_alive(pid) for pid in below))


def test_a_server_that_comes_back_in_time_is_waited_for() -> None:
    with Served() as first:
        port = urllib.parse.urlsplit(first.url).port

        async def restart(client: SandboxClient) -> Result:
            await asyncio.to_thread(first.stop)
            waiting = asyncio.create_task(client.run("print('back')"))
            await asyncio.sleep(0.3)
            with Served(port=port):
                return await waiting

        assert first.use(restart).stdout == "back\n"


def test_no_server_is_named_on_entering() -> None:
    async def enter(url: str) -> None:
        async with SandboxClient(url, patience_seconds=0.3):
            pass

    with pytest.raises(SandboxUnavailable, match="http://127.0.0.1:9: .*jaxrl sandbox serve"):
        asyncio.run(enter("http://127.0.0.1:9"))
    with pytest.raises(RuntimeError, match="not open"):
        asyncio.run(SandboxClient("http://127.0.0.1:9").run("1"))


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b'{"status": "ok"}', b'{"status": "ok", "stdout": 3}'])
def test_what_is_no_result_is_a_fault_of_ours(served: Served, answer: bytes) -> None:
    """Something between us and the server answers in its place, in the middle of work."""

    async def use() -> Result:
        async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            body = ask(served, "GET", "/v1/health")[2] if head.startswith(b"GET") else answer
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(speak, "127.0.0.1", 0) as impostor:
            port = impostor.sockets[0].getsockname()[1]
            async with SandboxClient(f"http://127.0.0.1:{port}") as client:
                return await client.run("1")

    assert asyncio.run(asyncio.wait_for(use(), 30)).status is INFRA

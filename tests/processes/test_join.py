"""Processes that meet, talk, and stop together."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import socket
import sys
import time

import pytest
from jax._src import distributed  # its public function refuses where jax has begun, as it has here

from jaxrl.config import ConfigError
from jaxrl.processes import door, service
from jaxrl.processes.join import PATIENCE_SECONDS, VARIABLES, Place, place
from tests.several import REPOSITORY, finished, reserved_port, started, together, together_at

TALKING = pathlib.Path(__file__).with_name("talking.py")
HERE = {VARIABLES[0]: "there:1", VARIABLES[1]: "2", VARIABLES[2]: "1"}


def test_options_come_before_the_environment() -> None:
    assert place(None, None, None, 9, {}) == Place(None, None, None, 9)
    assert place(None, None, None, 9, HERE) == Place("there:1", 2, 1, 9)
    assert place("here:7", 3, 0, 9, HERE) == Place("here:7", 3, 0, 9)
    assert place(None, 1, None, 9, HERE).count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("here:7", 2, None), "JAX_PROCESS_ID is missing"),
        ((None, None, 0), "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is missing"),
        (("here:7", 2, 2), "--process 2 is outside 0 ... 1: --processes is 2"),
        (("here", 2, 1), '--coordinator "here" must be HOST:PORT'),
        (("here:port", 2, 1), '--coordinator "here:port" must be HOST:PORT'),
    ],
)
def test_a_place_that_is_none_is_refused(options: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        place(*options, 9, {})


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID=first must be whole numbers"):
        place(None, None, None, 9, HERE | {VARIABLES[2]: "first"})


@pytest.mark.parametrize("reuse_port", [False, True], ids=["by anything", "by another run, as jax listens"])
def test_a_port_that_is_taken_is_refused(reuse_port: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LINGER_SECONDS", 0)
    with socket.create_server(("", 0), reuse_port=reuse_port) as taken, service.apart():
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"process 0 cannot listen at port {port}: .*; take a free port"):
            distributed.State().initialize(f"127.0.0.1:{port}", 2, 0, cluster_detection_method="deactivate")


def test_processes_tell_each_other_what_they_have() -> None:
    for code, out, err in together(TALKING, 3, 2, "talk"):
        assert code == 0, err
        heard = json.loads(out.splitlines()[-1])
        assert heard["messages"] == ["from 0", "from 1", "from 2"]
        assert heard["sizes"] == [3 << 20] * 3
        assert heard["left"] == []
        assert heard["devices"] == 6


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("fail", 2, "process 1 stopped with exit code 2 (its own message says why)"),
        ("raise", 1, "process 1 stopped with exit code 1 (its own message says why)"),
        ("die", -9, "process 1 is gone (no sign of life for 10 s)"),
    ],
)
def test_one_that_ends_early_stops_the_others_within_seconds(what: str, code: int, message: str) -> None:
    began = time.monotonic()
    (waiting, _, said), (failed, _, own) = together(TALKING, 2, 1, what)
    assert (waiting, failed) == (max(code, 1), code)
    assert f"process 0 stops: {message}; start all processes again" in said
    assert ("a defect" in own) == (what == "raise")
    assert time.monotonic() - began < PATIENCE_SECONDS + 60


def test_the_death_of_the_first_is_told_like_that_of_any_other() -> None:
    """Its coordination service goes on without it for long enough, and then ends."""
    (first, _, _), (waiting, _, said) = together(TALKING, 2, 1, "die first")
    assert (first, waiting) == (-9, 1)
    assert "process 1 stops: process 0 is gone (no sign of life for 10 s); start all processes again" in said


def test_a_service_stays_as_long_as_it_is_told_and_another_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LINGER_SECONDS", 30)
    with reserved_port() as port:
        address = f"[::]:{port}"
    first = service.Service(address, 2, heartbeat_timeout=30)
    began = time.monotonic()
    first.leave(2)
    second = service.Service(address, 2, heartbeat_timeout=30)
    assert time.monotonic() - began > 1
    second.shutdown()
    socket.create_server(("", port)).close()  # free again


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die first", "die"])
def test_a_start_of_more_processes_right_after_a_kill_waits_for_the_end_of_the_run_before(what: str) -> None:
    """Its service is still there, and with process 0 alive its port as well."""
    with reserved_port() as port, concurrent.futures.ThreadPoolExecutor(1) as threads:
        before = [[sys.executable, str(TALKING), str(port), "2", str(process), what] for process in (0, 1)]
        killed = before[0 if what == "die first" else 1]
        with started(killed, 1) as first, started(next(one for one in before if one is not killed), 1) as other:
            assert first.wait(60) == -9
            runs = threads.submit(together_at, port, TALKING, 3, 1, "talk").result()
            assert other.wait(30) == 1
            assert f"process {0 if what == 'die first' else 1} is gone" in other.stderr.read()
    for process, (code, out, said) in enumerate(runs):
        assert code == 0, said
        assert json.loads(out.splitlines()[-1])["messages"] == ["from 0", "from 1", "from 2"]
        waits = "port" if process == 0 else "waits: at 127.0.0.1"
        assert f"process {process} waits" in said and waits in said


def test_at_the_door_others_than_processes_of_the_start_are_turned_away(capsys: pytest.CaptureFixture[str]) -> None:
    def knocked(words: bytes) -> socket.socket:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                visitor = socket.create_connection(("127.0.0.1", port))
                visitor.sendall(words)
                return visitor

    with reserved_port() as port, concurrent.futures.ThreadPoolExecutor(3) as threads:
        gathered = threads.submit(door.gathered, port, 3)
        for wrong in (b"PRI * HTTP/2.0\r\n\r\n", door.KNOCK + b"3\n", door.KNOCK + b"one\n"):
            with knocked(wrong) as visitor, contextlib.suppress(ConnectionResetError):
                assert visitor.recv(1) == b"", "shut"
        with knocked(door.KNOCK + b"1\n") as visitor, knocked(door.KNOCK + b"1\n") as again:  # and once more
            assert visitor.recv(1) == b""
            entered = [threads.submit(door.enter, f"127.0.0.1:{port}", 1)]
            assert again.recv(1) == b""
        entered.append(threads.submit(door.enter, f"127.0.0.1:{port}", 2))
        visitors = gathered.result(10)
        assert not any(one.done() for one in entered), "the service is not there yet"
        door.admit(visitors)
        assert [one.result(10) for one in entered] == [None, None]
    assert capsys.readouterr().err == "jaxrl: process 1 came twice; was --process 1 given twice?\n"


def test_a_former_run_is_spoken_of_where_somebody_else_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Not where the door is shut, as it is to one of two processes with the same number."""
    with socket.create_server(("127.0.0.1", 0)) as listening, concurrent.futures.ThreadPoolExecutor(1) as threads:
        entered = threads.submit(door.enter, f"127.0.0.1:{listening.getsockname()[1]}", 1)
        said = []
        for words in (b"", door.OPEN[:5], b"\0\0\x12\4", b"\0\0\x12\4", door.OPEN):
            visitor, _ = listening.accept()
            said.append(capsys.readouterr().err)
            with visitor:
                visitor.sendall(words)
        entered.result(10)
    assert said[:3] == [""] * 3 and said[4] == ""
    assert "process 1 waits" in said[3] and "perhaps of a former run" in said[3]


def test_a_service_that_does_not_start_says_why(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved_port() as port:
        address = f"[::]:{port}"
    with pytest.raises(OSError, match=r"(?s)did not start at \[::\]:.*unexpected_option"):
        service.Service(address, 2, unexpected_option=1)
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('found where this process finds modules')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(OSError, match="(?s)found where this process finds modules"):
        service.Service(address, 2)


@pytest.mark.parametrize("process", [0, 1])
def test_nobody_at_the_coordinator_is_said_before_long(process: int) -> None:
    with reserved_port() as port:
        place = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process), "--wait", "2"]
        code, _, said = finished([sys.executable, "-m", "jaxrl", "train", "smoke", "--run", "none", *place], 1, 60)
    assert code == 1
    assert f"jaxrl: process {process} of 2 waited 2 s at 127.0.0.1:{port}, but not all came" in said


@pytest.mark.parametrize(
    ("devices", "overrides", "message"),
    [
        (
            1,
            ["MeshConfig.fsdp=4"],
            "MeshConfig asks for 1 x 1 x 4 x 1 x 1 x 1 devices",
        ),
        (
            2,
            ["MeshConfig.tensor=4", "ModelConfig.query_heads=4", "ModelConfig.kv_heads=4"],
            "set MeshConfig.rollout",
        ),
        (
            1,
            ["TrainConfig.packing=tree"],
            "TrainConfig.packing='tree' needs a single process, but this run has 2",
        ),
    ],
    ids=["more devices than there are", "replicas over several processes", "what takes one process"],
)
def test_what_does_not_fit_several_processes_is_refused(
    devices: int, overrides: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    settings = [part for override in overrides for part in ("--set", override)]
    launcher = [sys.executable, str(REPOSITORY / "launch" / "local.py"), "2", "--", "train", "smoke"]
    code, _, said = finished([*launcher, "--run", str(tmp_path / "run"), *settings], devices, 120)
    assert code == 2
    assert message in said
    assert not (tmp_path / "run").exists()

"""One call as the warden sees it: kept output, and verdicts from the kernel's evidence."""

import os
import pathlib
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.sandbox.job import Capture, Job, output_pipe, sealed_memory
from jaxrl.sandbox.orders import STARTED
from jaxrl.sandbox.protocol import Call, Limits, Outcome, Report


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20))
def test_capture_keeps_head_and_tail(pieces: list[bytes], half: int) -> None:
    reader, writer = output_pipe()
    try:
        capture = Capture(reader, 2 * half)
        for piece in pieces:
            os.write(writer, piece)
            capture.drain()
        whole = b"".join(pieces)
        assert capture.total == len(whole)
        assert capture.truncated == (len(whole) > 2 * half)
        if capture.truncated:
            left_out = b"\n... [%d bytes left out] ...\n" % (len(whole) - 2 * half)
            assert capture.kept() == whole[:half] + left_out + whole[-half:]
        else:
            assert capture.kept() == whole
    finally:
        os.close(reader)
        os.close(writer)


def test_sealed_memory_cannot_be_changed() -> None:
    fd = sealed_memory("test", b"text")
    try:
        assert os.read(fd, 10) == b"text"
        with pytest.raises(PermissionError):
            os.write(fd, b"more")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def judge(
    status: int,
    *,
    started: bool = True,
    reason: Outcome | None = None,
    cpu: float = 0.1,
    rss_kib: int = 1000,
    refused: bool = False,
    output: int = 0,
) -> Report | None:
    """The verdict on a call that ended in this way."""
    limits = Limits(cpu_seconds=1.0, memory_mib=100, output_hard_mib=1)
    job = Job(Call(1, b"", b"", True, limits, time.monotonic()), full=False)
    ends = job.open()
    if started:
        os.write(ends[2], STARTED.pack(time.monotonic()))
    for _ in range(0, output, 1 << 15):
        os.write(ends[0], bytes(1 << 15))
        job.stdout.drain()
    for fd in ends:
        os.close(fd)
    job.memory_refused, job.kill_reason = refused, reason
    try:
        return job.verdict(status, cpu, rss_kib, 500)
    finally:
        job.close()


KILLED = signal.SIGKILL
VERDICTS = {
    "exit 0": ({"status": 0}, Outcome.OK),
    "exit 1": ({"status": 1 << 8}, Outcome.ERROR),
    "segfault": ({"status": signal.SIGSEGV}, Outcome.ERROR),
    "deadline": ({"status": KILLED, "reason": Outcome.TIMEOUT}, Outcome.TIMEOUT),
    "ended by itself as the deadline struck": ({"status": 0, "reason": Outcome.TIMEOUT}, Outcome.OK),
    "CPU limit of the kernel": ({"status": KILLED, "cpu": 1.01}, Outcome.TIMEOUT),
    "killed before any limit": ({"status": KILLED}, Outcome.ERROR),
    "refused memory, failed": ({"status": 1 << 8, "refused": True}, Outcome.OUT_OF_MEMORY),
    "refused memory, recovered": ({"status": 0, "refused": True}, Outcome.OK),
    "memory used up": ({"status": signal.SIGABRT, "rss_kib": 95 << 10}, Outcome.OUT_OF_MEMORY),
    "much memory, own error": ({"status": 1 << 8, "rss_kib": 40 << 10}, Outcome.ERROR),
    "flood": ({"status": KILLED, "reason": Outcome.OUTPUT_LIMIT, "output": 2 << 20}, Outcome.OUTPUT_LIMIT),
    "flood that ended by itself": ({"status": 0, "output": 2 << 20}, Outcome.OUTPUT_LIMIT),
    "cancelled": ({"status": KILLED, "reason": Outcome.CANCELLED}, Outcome.CANCELLED),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    evidence, outcome = VERDICTS[name]
    report = judge(**evidence)
    assert report is not None and report.outcome is outcome


@pytest.mark.parametrize("status", [0, 1 << 8, 121 << 8, KILLED])
def test_a_call_that_never_started_is_our_fault(status: int) -> None:
    """Hole 3: it is the missing byte that says so, never an exit code."""
    assert judge(status, started=False) is None


def test_wall_limit_is_stretched_by_waiting_for_a_core(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    job = Job(Call(1, b"", b"", True, Limits(wall_seconds=2.0), 0.0), full=False)
    job.born, job.pidfd = 100.0, os.pidfd_open(os.getpid())
    assert job.pid == os.getpid()

    def waited(seconds: float) -> float:
        schedule = tmp_path / "schedstat"
        schedule.write_text(f"5 {int(seconds * 1e9)} 7\n")
        monkeypatch.setattr("builtins.open", lambda path, mode: schedule.open(mode))
        deadline = job.wall_deadline()
        monkeypatch.undo()
        return deadline

    assert waited(0.0) == 102.0
    assert waited(1.5) == 103.5
    assert waited(1000.0) == 108.0, "never without a bound"
    job.close()
    assert (job.processes(), job.wall_deadline(), job.cpu_seconds()) == ([], 102.0, 0.0), "0 would mean the warden"

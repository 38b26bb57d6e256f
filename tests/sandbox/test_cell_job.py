"""A cell as the warden sees it: what its session's process did before is not its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from jaxrl.sandbox.cell_job import CellJob
from jaxrl.sandbox.inspection import Residence
from jaxrl.sandbox.job import output_pipe
from jaxrl.sandbox.protocol import Call, CellHead, Limits

SOME_SECONDS = 0.3


@pytest.fixture
def process() -> Iterator[SimpleNamespace]:
    """One of two busy processes on one core: it works half of the time, and waits for the other."""
    core = min(os.sched_getaffinity(0))
    hog = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    both = [subprocess.Popen([sys.executable, "-S", "-c", hog]) for _ in range(2)]
    pipes = [output_pipe() for _ in range(2)]
    time.sleep(3 * SOME_SECONDS)
    pid = both[0].pid
    yield SimpleNamespace(
        pid=pid, pidfd=-1, stdout=pipes[0][0], stderr=pipes[1][0], residence=Residence(pid), template_rss_kib=0
    )
    for one in both:
        one.kill()
        one.wait()
    for fd in (*pipes[0], *pipes[1]):
        os.close(fd)


def test_waiting_and_work_before_the_cell_are_not_the_cells(process: SimpleNamespace) -> None:
    call = Call(1, b"", b"", True, Limits(wall_seconds=5.0), time.monotonic())
    job = CellJob(CellHead(1, False, False), call, full=False)
    before = time.monotonic()
    job.begin(process, "/nowhere")
    assert job.cpu_seconds() <= time.monotonic() - before + 0.05
    assert job.waited_seconds() <= time.monotonic() - before, "the first look at it, which a lasting cell gets early"
    time.sleep(2 * SOME_SECONDS)
    assert job.cpu_seconds() < time.monotonic() - before
    assert job.waited_seconds() > 0.1 * SOME_SECONDS
    assert job.wall_deadline() > job.born + 5.0 + 0.1 * SOME_SECONDS

"""What the kernel tells of a process's memory, against memory that a process really took."""

import mmap
import os
import subprocess
import sys

import pytest

from jaxrl.sandbox.inspection import Residence, held, kin, own_memory_kib, process_of

_HOLDS_KIB = 32 << 10


def take_and_give_back() -> None:
    with mmap.mmap(-1, _HOLDS_KIB << 10) as block:  # fresh pages, whatever free memory the process has by now
        for page in range(0, len(block), 4096):
            block[page] = 1


def test_a_peak_is_of_the_time_since_it_was_last_looked_for() -> None:
    mine = Residence(os.getpid())
    mine.begin()
    before = mine.now
    assert before > 4096
    take_and_give_back()
    mine.look()
    assert mine.peak - before > 0.9 * _HOLDS_KIB
    assert mine.now - before < 0.5 * _HOLDS_KIB
    mine.begin()
    mine.look()
    assert mine.peak - before < 0.5 * _HOLDS_KIB, "the earlier peak does not count any more"


def test_nothing_is_resident_of_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    gone = Residence(process.pid)
    gone.begin()
    gone.look()
    assert (gone.now, gone.peak) == (0, 0)
    assert (held(process.pid), kin(process.pid)) == ((0, 0, 0), None)
    assert (process_of(process.pid), own_memory_kib(process.pid)) == (0, 0)


@pytest.mark.parametrize("name", ["VmPeak:\t1 kB", "VmHWM:\t1 kB", "RssAnon:\t1 kB", "Tgid:\t1", "PPid:\t1"])
def test_a_process_says_nothing_of_itself_by_its_name(name: str) -> None:
    code = f"import ctypes\nctypes.CDLL(None).prctl(15, {name.encode()!r})\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"\n"
            found, who, own = held(process.pid), kin(process.pid), own_memory_kib(process.pid)
            thread = process_of(process.pid)
        finally:
            process.kill()
    assert found.space > found.peak >= found.now > own > 1024
    assert who is not None and (who.parent, who.threads, thread) == (os.getpid(), 1, process.pid)

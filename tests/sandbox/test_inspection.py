"""What the kernel tells of a process's memory, against memory that a process really took."""

import os
import subprocess

from jaxrl.sandbox.inspection import Residence

_HOLDS_KIB = 32 << 10


def take_and_give_back() -> None:
    block = bytearray(_HOLDS_KIB << 10)
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

"""Prepared system calls."""

import errno
import os
import resource
import subprocess
import time

import pytest

from jaxrl.sandbox import syscalls


def test_a_prepared_call_that_fails_names_itself_and_the_reason() -> None:
    with pytest.raises(OSError, match=r"chdir\(b'/nowhere',\) gave -1: No such file") as caught:
        syscalls.perform([syscalls.prepare("sched_yield"), syscalls.prepare("chdir", b"/nowhere")])
    assert caught.value.errno == errno.ENOENT


def test_a_prepared_call_must_give_what_is_expected_of_it() -> None:
    expected = os.dup(0)
    os.close(expected)
    syscalls.perform([syscalls.prepare("dup", 0, gives=expected)])
    os.close(expected)
    with pytest.raises(OSError, match=r"dup\(0,\) gave \d+"):
        syscalls.perform([syscalls.prepare("dup", 0, gives=10**6)])


def test_whether_a_process_is_alive() -> None:
    process = subprocess.Popen(["sleep", "60"])
    own, other = os.pidfd_open(os.getpid()), os.pidfd_open(process.pid)
    syscalls.perform([syscalls.prepare_check_alive(own), syscalls.prepare_check_alive(other)])
    process.kill()
    process.wait()
    with pytest.raises(OSError, match="poll.* gave 1"):
        syscalls.perform([syscalls.prepare_check_alive(other)])
    os.close(own)
    os.close(other)


def test_what_is_known_of_a_child_that_has_ended() -> None:
    own_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gate, open_gate = os.pipe()
    child = os.fork()
    if not child:
        os.read(gate, 1)  # not before its parent has seen it alive, however slow that one is
        began = time.process_time()
        while time.process_time() < began + 0.2:
            pass
        held = bytearray((own_kib << 10) + (64 << 20))
        held[::4096] = bytes(len(held) // 4096)  # touch every page
        os._exit(3)
    with pytest.raises(OSError, match="has not ended"):
        syscalls.bury(child)
    os.write(open_gate, b"x")
    os.close(gate)
    os.close(open_gate)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, user, system, peak_kib = syscalls.bury(child)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert os.waitstatus_to_exitcode(status) == 3
    assert user == pytest.approx(after.ru_utime - before.ru_utime, abs=1e-5) and user > 0.05
    assert system == pytest.approx(after.ru_stime - before.ru_stime, abs=1e-5)
    assert peak_kib > own_kib + (64 << 10)
    with pytest.raises(OSError, match="wait4"):
        syscalls.bury(child)

"""How an attack is written down, and what every attack must leave behind."""

import dataclasses

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Result
from tests.sandbox.driver import LIMITS, Driver

# Only what is meant to run out of time has little of it: a busy machine must not turn other verdicts into timeouts.
PATIENT = dataclasses.replace(LIMITS, cpu_seconds=5.0, wall_seconds=10.0)
_WARM_KIB = 128 << 10  # more than any template of the tests holds


def refused(statement: str, imports: str = "") -> str:
    """A snippet that prints "held" only if the statement raises OSError."""
    return (
        f"import os{imports}\ntry:\n    {statement}\n    print('GOT THROUGH')\n"
        "except OSError as error:\n    print('held', error.errno)"
    )


def system_call(number: int, *arguments: str) -> str:
    """A snippet that prints "held" if a raw system call fails with EPERM, EAGAIN or ENOSYS."""
    listed = ", ".join([f"ctypes.c_long({number})", *arguments])
    return (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"answer = libc.syscall({listed})\n"
        "refused = answer == -1 and ctypes.get_errno() in (1, 11, 38)\n"
        "print('held' if refused else ('GOT THROUGH', answer, ctypes.get_errno()))"
    )


def withstand(sandbox: Driver, statuses: tuple[ToolStatus, ...], text: str, code: str) -> Result:
    """Run an attack: one of the statuses, the text in stdout, bounded memory, no survivor, a pool that goes on."""
    before = sandbox.resting()
    result = sandbox.run(code, limits=LIMITS if ToolStatus.TIMEOUT in statuses else PATIENT)
    assert result.status in statuses, result
    assert "GOT THROUGH" not in result.stdout, result
    assert text in result.stdout, result
    assert result.attempts == 1, "a snippet must not look like a fault of ours"
    assert result.peak_rss_kib < _WARM_KIB + (PATIENT.memory_mib << 10), "more of the host's memory than was granted"
    healthy = sandbox.run("print(6 * 7)")
    assert (healthy.status, healthy.stdout, healthy.attempts) == (ToolStatus.OK, "42\n", 1)
    assert sandbox.resting() == before, "a process survived, or a template was lost"
    return result

"""The jailed side of calls that may start processes: into their control groups, and on from Python to a program."""

import contextlib
import os
import signal

_BY_SIGNAL = 128  # exit code of a program that a signal ended, as shells have it, less the signal's number
_CANNOT_START = 127
# Ignored by the interpreter or by the helpers above it; programs expect the usual.
_TO_RESTORE = (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


def join(descriptors: list[int], count: int) -> None:
    """Move this process into its call's groups, whose descriptors are the last ``count``; they are taken off."""
    for _ in range(count):
        door = descriptors.pop()
        os.write(door, b"0")
        os.close(door)


def run(command: bytes) -> int:
    """Run a program to its end and return its exit code.

    It is not the first process of its pid namespace, to which the kernel does not deliver signals like ``abort``'s, but
    a child of it; whatever it leaves running ends with the first.

    Args:
        command: program and arguments, a zero byte between. A program in the working directory is made executable.
    """
    words = command.split(b"\0")
    if not os.path.isabs(words[0]):
        with contextlib.suppress(OSError):
            os.chmod(words[0], 0o700)
    try:
        program = os.fork()
    except OSError as error:
        os.write(2, f"cannot start a process: {error.strerror}\n".encode())
        return _CANNOT_START
    if not program:
        _become(words)
    for stream in (0, 1, 2):
        os.close(stream)
    ended, status = os.wait()
    while ended != program:  # one that the program left to us
        ended, status = os.wait()
    return _BY_SIGNAL + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _become(words: list[bytes]) -> None:
    try:
        for number in _TO_RESTORE:
            signal.signal(number, signal.SIG_DFL)
        os.execv(words[0], words)
    except OSError as error:
        os.write(2, f"cannot start {os.fsdecode(words[0])}: {error.strerror}\n".encode())
    finally:
        os._exit(_CANNOT_START)

"""What the kernel tells, from outside, about a session's process: who it is, what it holds, what it shares.

The process may be hostile, so nothing here asks it. Where the kernel does not tell (the process is gone, or hides),
the functions that judge answer for the worse.
"""

import contextlib
import os
import re
from typing import NamedTuple

_KIN = re.compile(rb"^PPid:\s+(\d+).*?^NSpid:.*?(\d+)$.*?^Threads:\s+(\d+)$", re.MULTILINE | re.DOTALL)
_HELD = re.compile(rb"VmPeak:\s+(\d+) kB\n.*VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB", re.DOTALL)
_STATUS_BYTES = 8192  # of /proc/PID/status, in the first half of which memory stands
_SLACK_KIB = 128  # by which a peak may stand above what is held before it is looked for anew
_SHARED = re.compile(rb" [r-]([w-])[x-]s ([^\n]*)")  # a line of /proc/PID/maps, from its permissions on

Identity = tuple[int, int]  # device and inode of an open file


class Kin(NamedTuple):
    """Who a process is."""

    parent: int
    inner: int  # its process id in its own namespace
    threads: int


def kin(pid: int) -> Kin | None:
    """None if the process is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            found = _KIN.search(file.read())
    except OSError:
        return None
    return Kin(*map(int, found.groups())) if found else None


def children(pid: int) -> set[int] | None:
    """Process ids of its children; None where the kernel does not tell."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return set(map(int, file.read().split()))
    except OSError:
        return None


def identity(fd: int) -> Identity:
    """Of one of our own descriptors; both ends of a pipe have the same, those of a socket pair have not."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def file_identity(path: str) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def holds_exactly(pid: int, wanted: list[Identity]) -> bool:
    """Whether its open descriptors are these and no others, each once."""
    try:
        found = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return sorted((status.st_dev, status.st_ino) for status in found) == sorted(wanted)


def shares_memory(pid: int, original: int, work: str) -> bool:
    """Whether a copy has memory that its original may see: shared, or of a file in the original's directory."""
    try:
        device = os.stat(f"/proc/{original}/root{work}").st_dev
        with open(f"/proc/{pid}/maps", "rb") as file:
            maps = file.read()
    except OSError:
        return True
    if b" %02x:%02x " % (os.major(device), os.minor(device)) in maps:
        return True
    return any(writable == b"w" or rest.endswith(b"(deleted)") for writable, rest in _SHARED.findall(maps))


def stands_in_own_directory(pid: int, original: int, work: str) -> bool:
    """Whether its working directory is another than the original's, and it does not stand in that one either."""
    try:
        device = os.stat(f"/proc/{original}/root{work}").st_dev
        return device not in (os.stat(f"/proc/{pid}/root{work}").st_dev, os.stat(f"/proc/{pid}/cwd").st_dev)
    except OSError:
        return False


def is_stopped(pid: int) -> bool:
    """Whether a process, which has one thread, stands still since it was sent SIGSTOP."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] == b"T"
    except OSError:
        return False


def memory_kib(pid: int, work: str) -> int:
    """Memory that would be free without the process: its share of shared pages, and its files."""
    total = 0
    with contextlib.suppress(OSError, TypeError, ValueError):
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            total = int(re.search(rb"^Pss: +(\d+)", file.read(), re.MULTILINE)[1])
        space = os.statvfs(f"/proc/{pid}/root{work}")
        total += (space.f_blocks - space.f_bfree) * space.f_frsize >> 10
    return total


class Residence:
    """Resident memory of a process in KiB: when last looked at, and at most since ``begin``. Zero once it is gone.

    ``space`` is the largest address space that it ever had.

    One look a cell is enough: the next one begins with what was held then, and the peak is looked for anew only where
    it stands above that.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.now = self.peak = self.space = 0

    def begin(self) -> None:
        """Look for the peak from now on; the process has stood still since the last look."""
        if not self.peak:
            self.look()
        if self.peak - self.now > _SLACK_KIB:
            with contextlib.suppress(OSError), open(f"/proc/{self._pid}/clear_refs", "wb", buffering=0) as file:
                file.write(b"5")

    def look(self) -> None:
        self.peak = self.now = self.space = 0
        with contextlib.suppress(OSError):
            # Not by ``open``, whose own questions to the kernel are five more.
            descriptor = os.open(f"/proc/{self._pid}/status", os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = _HELD.search(os.read(descriptor, _STATUS_BYTES))
            finally:
                os.close(descriptor)
            if found is not None:
                self.space, self.peak, self.now = map(int, found.groups())

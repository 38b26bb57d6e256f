"""What the kernel tells, from outside, about a session's process: who it is, what it holds, what it shares.

The process may be hostile, so nothing here asks it. Where the kernel does not tell (the process is gone, or hides),
the functions that judge answer for the worse.
"""

import contextlib
import os
import re
from typing import NamedTuple

_KIN = re.compile(rb"^PPid:\s+(\d+).*?^NSpid:.*?(\d+)$.*?^Threads:\s+(\d+)$", re.MULTILINE | re.DOTALL)
_PROCESS = re.compile(rb"^Tgid:\s+(\d+)$", re.MULTILINE)
_OWN = re.compile(rb"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
# Each from the beginning of a line: a process may take "VmPeak:\t1 kB" for its name, which stands in the first one.
_HELD = re.compile(rb"^VmPeak:\s+(\d+) kB$.*?^VmHWM:\s+(\d+) kB$.*?^VmRSS:\s+(\d+) kB$", re.MULTILINE | re.DOTALL)
_STATUS_BYTES = 1 << 16  # more than /proc/PID/status has, of a user in thousands of groups too
_SLACK_KIB = 128  # by which a peak may stand above what is held before it is looked for anew
_SHARED = re.compile(rb" [r-]([w-])[x-]s ([^\n]*)")  # a line of /proc/PID/maps, from its permissions on

Identity = tuple[int, int]  # device and inode of an open file


class Kin(NamedTuple):
    """Who a process is."""

    parent: int
    inner: int  # its process id in its own namespace
    threads: int


class Held(NamedTuple):
    """What a process has of memory, in KiB."""

    space: int = 0  # the largest address space that it ever had
    peak: int = 0  # the most that was resident since that was last reset
    now: int = 0  # what is


def kin(pid: int) -> Kin | None:
    """None if the process is gone."""
    found = _KIN.search(_status(pid))
    return Kin(*map(int, found.groups())) if found else None


def held(pid: int) -> Held:
    """Zeros if the process is gone."""
    found = _HELD.search(_status(pid))
    return Held(*map(int, found.groups())) if found else Held()


def process_of(thread: int) -> int:
    """The process a thread belongs to; 0 if it is dead."""
    found = _PROCESS.search(_status(thread))
    return int(found[1]) if found else 0


def own_memory_kib(pid: int) -> int:
    """Resident memory of a process that no file backs; 0 if it is dead."""
    found = _OWN.search(_status(pid))
    return int(found[1]) if found else 0


def _status(pid: int) -> bytes:
    """The kernel's lines about a process; none if it is dead."""
    try:
        # Not by ``open``, whose own questions to the kernel are five more.
        descriptor = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, _STATUS_BYTES)
    except ProcessLookupError:  # it was there when the file was opened
        return b""
    finally:
        os.close(descriptor)


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
        self.space, self.peak, self.now = held(self._pid)

"""One call as the warden sees it: its pipes, what it printed, how long it may run, and what its end means."""

import contextlib
import fcntl
import os
import signal
import socket
import time
from typing import Any

from jaxrl.sandbox import files
from jaxrl.sandbox.cgroups import Group
from jaxrl.sandbox.orders import STARTED, receive_packet
from jaxrl.sandbox.protocol import Call, Outcome, Report

_CHUNK = 1 << 16  # what a pipe holds
_LONGEST_STRETCH = 3  # a wall limit grows with waiting for a core, by at most this multiple of itself
# Of the granted memory, when touched this much at a failed call's end, the call is taken to have run out of it.
_MEMORY_USED_UP = 0.8
WATCH_BYTES = 8 << 20  # single memory requests from this size on are shown to the warden


class Capture:
    """One output stream of a call: the first and the last half of a cap, and a count of all.

    Args:
        fd: of the reader, which does not block.
        cap: bytes.
    """

    def __init__(self, fd: int, cap: int) -> None:
        self.fd = fd
        self.total = 0
        self._half = cap // 2
        self._head = bytearray()
        self._tail = bytearray()

    def read(self) -> bool:
        """Take what is there; False at the end of the stream."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return True
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room > 0 else data
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]
        return bool(data)

    def drain(self) -> None:
        """Take the rest; for when every writer is dead."""
        before = -1
        while self.total != before:
            before = self.total
            self.read()

    @property
    def truncated(self) -> bool:
        return self.total > 2 * self._half

    def kept(self) -> bytes:
        if not self.truncated:
            return bytes(self._head + self._tail)
        tail = self._tail[-self._half :]
        lost = self.total - len(self._head) - len(tail)
        return bytes(self._head + b"\n... [%d bytes left out] ...\n" % lost + tail)


class Job:
    """A call with its fortunes: waiting, running, perhaps tried again, in the end reported once."""

    def __init__(self, call: Call, full: bool) -> None:
        self.call = call
        self.full = full  # wants the template with the modules preloaded
        self.kind = "processes" if call.processes else "full" if full else "bare"  # of the place wanted
        self.has_own_place = False  # which no other job can take; otherwise any template of the kind will do
        self.attempts = call.attempts
        self.template_deaths = 0
        self.lost_on = -1  # number of the template that last failed this job
        self.done = False
        self.fault = b"its template died"  # why the last attempt failed, for whoever looks into an infra_error
        self.memory_refused = False
        self.kill_reason: Outcome | None = None
        self.place = -1  # on the board of running calls
        self.fast = True  # holds a fast slot rather than one of the slow lane
        self.watched = False  # its output is read as it comes
        self.pidfd = -1
        self._pid = 0
        self.born = 0.0
        self.address_space = 0
        self.stdout: Capture | None = None
        self.stderr: Capture | None = None
        self.started_fd = -1
        self.collector: socket.socket | None = None  # where the child shows its working directory
        self.group: Group | None = None  # of all its processes, where it may start some

    def open(self) -> tuple[int, ...]:
        """Make the pipes of one attempt; returns the child's ends, which the caller closes after sending them."""
        self.attempts += 1
        self.memory_refused, self.kill_reason, self.watched, self._pid, self.born = False, None, False, 0, 0.0
        cap = self.call.limits.output_kib << 10
        out_read, out_write = output_pipe()
        err_read, err_write = output_pipe()
        self.started_fd, started_write = output_pipe()
        self.stdout, self.stderr = Capture(out_read, cap), Capture(err_read, cap)
        ends = (out_write, err_write, started_write)
        if self.call.wanted:
            self.collector, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.collector.setblocking(False)
            ends = (*ends, theirs.detach())
        if self.call.stdin:
            return (*ends, sealed_memory("stdin", self.call.stdin))
        return ends

    @property
    def pid(self) -> int:
        """Process id of the child, looked up when first asked for; 0 where it is dead or not born."""
        if self.pidfd < 0:
            return 0
        if not self._pid:
            self._pid = pid_of(self.pidfd)
        return self._pid

    def close(self) -> None:
        for fd in (self.started_fd, self.pidfd, *(stream.fd for stream in (self.stdout, self.stderr) if stream)):
            if fd >= 0:
                os.close(fd)
        if self.collector is not None:
            self.collector.close()
        self.started_fd, self.pidfd, self.collector = -1, -1, None
        self.stdout = self.stderr = None

    def kill(self, reason: Outcome) -> None:
        """End the child and, as it is the first of its pid namespace, all it started."""
        if self.kill_reason is None or reason is Outcome.CANCELLED:
            self.kill_reason = reason
        if self.pidfd >= 0:
            send_signal(self.pidfd, signal.SIGKILL)

    def output_exceeded(self) -> bool:
        assert self.stdout is not None and self.stderr is not None
        return self.stdout.total + self.stderr.total > self.call.limits.output_hard_mib << 20

    def cpu_seconds(self) -> float:
        """CPU time so far, all threads and processes; 0 where the process is already gone."""
        together = self.group.cpu_seconds() if self.group is not None else None
        if together is not None:
            return together
        pid = self.pid
        try:
            # clock_getcpuclockid(3): another process's clock; that of 0 is our own.
            return time.clock_gettime((~pid << 3) | 2) if pid else 0.0
        except OSError:
            return 0.0

    def lasts(self) -> None:
        """It has run for a moment: note what is not worth noting for those that end sooner."""

    def wall_deadline(self) -> float:
        """When the wall limit ends: later by the time for which the code was ready but had no core."""
        wall = self.call.limits.wall_seconds
        return self.born + wall + min(self.waited_seconds(), _LONGEST_STRETCH * wall)

    def waited_seconds(self) -> float:
        """For how long the code was ready to run but had no core."""
        waited = self.group.waited_seconds() if self.group is not None else None
        return max(map(_waited_seconds, self.processes()), default=0.0) if waited is None else waited

    def processes(self) -> list[int]:
        """Process ids of the call, as far as it is alive."""
        if self.group is not None:
            return self.group.processes()
        return [self.pid] if self.pid else []

    def verdict(self, wait_status: int, cpu_seconds: float, peak_rss_kib: int, template_rss_kib: int) -> Report | None:
        """What the end means, from the kernel's evidence alone; None if our own side failed.

        Args:
            wait_status: as from ``waitpid``.
            cpu_seconds: as from ``wait4``; a control group, where there is one, knows better.
            peak_rss_kib: of the child, shared pages of the template included.
        """
        assert self.stdout is not None and self.stderr is not None
        self.stdout.drain()
        self.stderr.drain()
        now = time.monotonic()
        if self.kill_reason is Outcome.CANCELLED:
            return self.unfinished(Outcome.CANCELLED)
        try:
            stamp = os.read(self.started_fd, STARTED.size)
        except BlockingIOError:
            stamp = b""
        if len(stamp) != STARTED.size:
            self.fault = self.stderr.kept()  # written by our own set-up: the snippet never ran
            return None
        if self.group is not None and self.group.starved():
            self.fault = b"the machine, or a control group above the sandbox's, ran out of memory"
            return None
        (started,) = STARTED.unpack(stamp)
        report = self.judge(wait_status, cpu_seconds, peak_rss_kib, template_rss_kib, started, now)
        return report if self.collector is None else report._replace(**self._returned_files())

    def judge(
        self,
        wait_status: int,
        cpu_seconds: float,
        peak_rss_kib: int,
        rss_before_kib: int,
        started: float,
        ended: float,
        survived: bool = False,
    ) -> Report:
        """The outcome of code that ran, all its output being captured.

        Args:
            wait_status: as from ``waitpid``.
            peak_rss_kib: of the process, ``rss_before_kib`` included, which it held before the code began.
            started, ended: by ``time.monotonic()``.
            survived: the process lives on.
        """
        assert self.stdout is not None and self.stderr is not None
        killed = os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else 0
        exit_code = os.WEXITSTATUS(wait_status) if os.WIFEXITED(wait_status) else -1
        together = self.group.cpu_seconds() if self.group is not None else None
        cpu_seconds = cpu_seconds if together is None else together
        return Report(
            id=self.call.id,
            outcome=self._outcome(killed, exit_code, cpu_seconds, peak_rss_kib - rss_before_kib),
            attempts=self.attempts,
            exit_code=exit_code,
            signal=killed,
            cpu_seconds=cpu_seconds,
            wall_seconds=max(ended - started, 0.0),
            queue_seconds=max(started - self.call.submitted, 0.0),
            peak_rss_kib=peak_rss_kib,
            stdout=self.stdout.kept(),
            stderr=self.stderr.kept(),
            stdout_truncated=self.stdout.truncated,
            stderr_truncated=self.stderr.truncated,
            survived=survived,
        )

    def _outcome(self, killed: int, exit_code: int, cpu_seconds: float, own_rss_kib: int) -> Outcome:
        """The first of these that holds: what ended the code comes before how it may have ended by itself."""
        program_signal = exit_code - 128 if self.call.command else 0
        if self.output_exceeded():
            return Outcome.OUTPUT_LIMIT
        if killed == signal.SIGKILL and self.kill_reason is not None:
            return self.kill_reason
        if signal.SIGKILL in (killed, program_signal) and cpu_seconds >= self.call.limits.cpu_seconds:
            return Outcome.TIMEOUT
        if exit_code == 0:
            return Outcome.OK
        return Outcome.OUT_OF_MEMORY if self._memory_ran_out(own_rss_kib) else Outcome.ERROR

    def note_space(self, peak_kib: int) -> None:
        """Its failed code had so much address space at most: was so little left that a request was refused unseen?"""
        left = self.address_space - (peak_kib << 10)
        if left < min(WATCH_BYTES, (1 - _MEMORY_USED_UP) * (self.call.limits.memory_mib << 20)):
            self.memory_refused = True

    def _memory_ran_out(self, own_rss_kib: int) -> bool:
        if self.group is not None:
            return self.group.out_of_memory()
        return self.memory_refused or own_rss_kib > _MEMORY_USED_UP * (self.call.limits.memory_mib << 10)

    def _returned_files(self) -> dict[str, Any]:
        """What the call left in its working directory of what was wanted."""
        assert self.collector is not None
        try:
            _, descriptors = receive_packet(self.collector)
        except BlockingIOError:
            return {}
        returned: dict[str, Any] = {}
        for directory in descriptors:
            returned = self.gather(directory)
            os.close(directory)
        return returned

    def gather(self, directory: int) -> dict[str, Any]:
        """Fields of the report: the wanted files that lie in an open directory."""
        found, left_out = files.gather(directory, self.call.wanted.split("\n"), self.call.limits.files_mib << 20)
        return {"files": files.pack(found), "files_left_out": left_out}

    def unfinished(self, outcome: Outcome) -> Report:
        """A report without a run: cancelled, or given up after faults of ours."""
        fault = self.fault if outcome in (Outcome.INFRA_ERROR, Outcome.LOST, Outcome.PUT_OUT) else b""
        return Report.without_run(self.call, outcome, self.attempts, fault)


def output_pipe() -> tuple[int, int]:
    """A pipe whose reader does not block, and whose writer does."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    return reader, writer


def sealed_memory(name: str, data: bytes) -> int:
    """A descriptor that reads as ``data`` and that nobody can write to or grow."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def _waited_seconds(pid: int) -> float:
    """For how long a process was ready but had no core; 0 if it is dead."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def send_signal(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # already dead
        signal.pidfd_send_signal(pidfd, number)


def pid_of(pidfd: int) -> int:
    """The process id, in this process's own namespace, behind a descriptor; 0 if it is dead."""
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        for line in lines:
            if line.startswith("Pid:"):
                return max(int(line.split()[1]), 0)
    return 0

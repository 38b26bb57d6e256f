"""One cell of a session as the warden sees it: a call whose process was there before and may live on."""

import contextlib
import os
import time
from typing import Protocol

from jaxrl.sandbox.inspection import Residence
from jaxrl.sandbox.job import Capture, Job
from jaxrl.sandbox.protocol import Call, CellHead, Report

_NOTICEABLE = 6  # binary digits: what is less than a 64th of the limit does not make a cell one that ran out of memory


class Process(Protocol):
    """What a cell must know of the process it runs in. The descriptors stay the owner's."""

    pid: int
    pidfd: int
    stdout: int  # our ends of its pipes, which do not block
    stderr: int
    residence: Residence

    @property
    def template_rss_kib(self) -> int: ...


class CellJob(Job):
    """A cell with its fortunes. It has no pipes of its own and is never tried again by the warden."""

    def __init__(self, head: CellHead, call: Call, full: bool) -> None:
        super().__init__(call, full)
        self.head = head
        if not head.fresh:
            self.kind, self.has_own_place = "session", True
        else:
            self.kind = "opening"  # which may have to wait for room, and calls must not wait for it
        self._cpu_before = 0.0
        self._waited_before = -1.0  # not yet known
        self._residence = Residence(0)
        self._template_rss_kib = self._rss_before_kib = self._space_before_kib = 0
        self._directory = -1

    def begin(self, process: Process, work: str) -> None:
        """The session's process is there and is about to be sent the cell.

        Args:
            work: where its working directory is mounted.
        """
        cap = self.call.limits.output_kib << 10
        self.attempts += 1
        self._pid, self.pidfd = process.pid, process.pidfd
        self.stdout, self.stderr = Capture(process.stdout, cap), Capture(process.stderr, cap)
        if self.call.wanted:
            with contextlib.suppress(OSError):  # it hides from an ordinary user
                self._directory = os.open(f"/proc/{self.pid}/root{work}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._cpu_before = super().cpu_seconds()
        self._template_rss_kib = process.template_rss_kib
        self._residence = process.residence
        self._residence.begin()
        self._rss_before_kib, self._space_before_kib = self._residence.now, self._residence.space
        self.born = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id of the session, also when the cell is over."""
        return self._pid

    def close(self) -> None:
        """Let go of descriptors that are the session's."""
        if self._directory >= 0:
            os.close(self._directory)
        self._directory = -1
        self.pidfd, self.stdout, self.stderr = -1, None, None

    def cpu_seconds(self) -> float:
        return max(super().cpu_seconds() - self._cpu_before, 0.0)

    def lasts(self) -> None:
        self.waited_seconds()

    def waited_seconds(self) -> float:
        waited = super().waited_seconds()
        if self._waited_before < 0.0:  # what went by until this first look without being used counts as waited for
            unused = max(time.monotonic() - self.born - self.cpu_seconds(), 0.0)
            self._waited_before = max(waited - unused, 0.0)
        return max(waited - self._waited_before, 0.0)

    def over(self, exit_code: int) -> Report:
        """The cell's own end; its process stands still, and all its output is captured."""
        self._residence.look()
        peak, cpu = self._residence.peak, self.cpu_seconds()
        base = self._base_kib(peak)
        self.note_space(self._residence.space)
        report = self.judge(exit_code << 8, cpu, peak, base, self.born, time.monotonic(), survived=True)
        return self._with_files(report)

    def died(self, wait_status: int, cpu_seconds: float, peak_rss_kib: int) -> Report:
        """The end of the process.

        Args:
            wait_status: as from ``waitpid``.
            cpu_seconds: of its whole life.
        """
        assert self.stdout is not None and self.stderr is not None
        self.stdout.drain()
        self.stderr.drain()
        cpu = max(cpu_seconds - self._cpu_before, 0.0)
        base = self._base_kib(peak_rss_kib)
        report = self.judge(wait_status, cpu, peak_rss_kib, base, self.born, time.monotonic())
        return self._with_files(report)

    def note_space(self, peak_kib: int) -> None:
        if peak_kib > self._space_before_kib:  # the kernel's peak is of a whole life: else it is an earlier cell's
            super().note_space(peak_kib)

    def _with_files(self, report: Report) -> Report:
        return report if self._directory < 0 else report._replace(**self.gather(self._directory))

    def _base_kib(self, peak_kib: int) -> int:
        """From where the cell's use of memory counts: all that the session holds, if the cell added to it at all."""
        added = peak_kib - self._rss_before_kib > self.call.limits.memory_mib << 10 >> _NOTICEABLE
        return self._template_rss_kib if added else peak_kib

"""The warden's second jail, for calls that may start processes: built when the first such call comes.

It has its own view of the host, with programs in it, its own filters, and a control group for every running call.
"""

import dataclasses
from collections.abc import Callable

from jaxrl.sandbox import cgroups
from jaxrl.sandbox.fleet import Fleet, Settings, Template
from jaxrl.sandbox.job import Job
from jaxrl.sandbox.loop import Loop
from jaxrl.sandbox.seccomp import Request, refuse_request

# Beyond what a call is granted: its first process, which is ours, and the kernel's own structures for some processes.
_OURS = 16 << 20  # bytes


def _refuse_copy(template: Template, request: Request) -> None:
    """Only a session's process may have a copy of itself, and there are none here."""
    refuse_request(template.listener, request)


class Annex:
    """A fleet whose calls may start processes.

    Args:
        on_change, on_lost, on_message, on_failure: as of ``Fleet``.

    Raises:
        CgroupsUnavailable, OSError: the calls cannot be given control groups.
    """

    def __init__(
        self,
        loop: Loop,
        settings: Settings,
        on_change: Callable[[], None],
        on_lost: Callable[[Template, list[Job]], None],
        on_message: Callable[[Template, bytes, list[int]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._groups = _groups(settings)
        settings = dataclasses.replace(
            settings,
            view=settings.program_view,
            preload=(),
            processes=True,
            groups=0 if self._groups is None else self._groups.doors,
        )
        self.fleet = Fleet(loop, settings, lambda: None, on_change, on_lost, on_message, _refuse_copy, on_failure)
        self.fleet.start()

    def admit(self, job: Job) -> tuple[int, ...]:
        """Give a call its control group; returns the doors, which the caller closes after sending them.

        Raises:
            OSError: the kernel refuses.
        """
        if self._groups is None:
            return ()
        limits = job.call.limits
        job.group = self._groups.take((limits.memory_mib + limits.disk_mib << 20) + _OURS, limits.processes + 1)
        return job.group.doors()

    def release(self, job: Job) -> None:
        """Its processes are dead or dying, and its verdict is known."""
        if self._groups is not None and job.group is not None:
            self._groups.give_back(job.group)
            job.group = None

    def close(self) -> None:
        """Remove the groups; the fleet is closed and its processes are gone."""
        if self._groups is not None:
            self._groups.close()


def _groups(settings: Settings) -> cgroups.Groups | None:
    if settings.unsafe:
        return None
    try:
        return cgroups.Groups(cgroups.find())
    except cgroups.CgroupsUnavailable:
        if settings.processes_without_cgroup:
            return None
        raise

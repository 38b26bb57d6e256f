"""What a pool is made with: one record, of which a pool on this machine and one on every node of a cluster are made."""

import dataclasses
from typing import Any

from jaxrl.sandbox import arguments, pool_arguments
from jaxrl.sandbox.protocol import Limits


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """The arguments of ``Pool``, which says what each means.

    Raises:
        TypeError, ValueError: no machine could use an argument; names it.
    """

    limits: Limits
    workers: int
    slots: int
    slow_slots: int
    queue: int
    preload: tuple[str, ...]
    unsafe: bool
    heartbeat_seconds: float
    processes_without_cgroup: bool
    program_folders: tuple[str, ...]
    recycle_calls: int
    recycle_growth_mib: int
    session_memory_mib: int

    def __post_init__(self) -> None:
        pool_arguments.check_limits(self.limits)
        arguments.whole("workers", self.workers)
        arguments.whole("slots", self.slots)
        arguments.whole("slow_slots", self.slow_slots, 0, "0 is none")
        arguments.whole("queue", self.queue)
        arguments.texts("preload", self.preload)
        arguments.flag("unsafe", self.unsafe)
        arguments.above_zero("heartbeat_seconds", self.heartbeat_seconds)
        arguments.flag("processes_without_cgroup", self.processes_without_cgroup)
        arguments.texts("program_folders", self.program_folders)
        for folder in self.program_folders:
            pool_arguments.check_shown(folder)
        arguments.whole("recycle_calls", self.recycle_calls)
        arguments.whole("recycle_growth_mib", self.recycle_growth_mib)
        arguments.whole("session_memory_mib", self.session_memory_mib)

    @property
    def running(self) -> int:
        """Calls that run at once."""
        return self.slots + self.slow_slots

    def check_machine(self) -> None:
        """Refuse what this machine cannot give.

        Raises:
            ValueError: naming the argument.
        """
        pool_arguments.check_installed(self.program_folders)
        pool_arguments.check_host(self.limits)
        pool_arguments.check_descriptors(self.workers, self.running)

    def of_warden(self) -> dict[str, Any]:
        """Those that the warden is told, under the names of ``fleet.Settings``."""
        untold = ("limits", "workers", "queue", "program_folders")
        return {name: value for name, value in vars(self).items() if name not in untold} | {"templates": self.workers}

"""The first milliseconds of a call: a fresh fork of the template puts on its walls, then runs snippet or program.

Runs once per call, on pages that it copies by touching them: straight code on prepared values, few objects.
"""

import gc
import os
import resource
import signal
import socket
import time
from typing import NoReturn

from jaxrl.sandbox import files, forks, jail, landlock, seccomp, syscalls
from jaxrl.sandbox.cell import run as run_snippet
from jaxrl.sandbox.orders import STARTED, send_packet
from jaxrl.sandbox.programs import join
from jaxrl.sandbox.programs import run as run_program
from jaxrl.sandbox.protocol import UnpackedCall
from jaxrl.sandbox.start import PENDING_SIGNALS, leave, take_descriptors

_MOUNT_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV
_STARTED, _TEMPLATE, _COLLECTOR, _RULES = 3, 4, 5, 6  # descriptors during the set-up
FIRST_FREE = 8  # from here on up lie the descriptors that a template is handed
_MOST_PLANS = 64  # kept ready, one for each set of limits
_REHEARSALS = 20  # more than the eight runs after which code is specialised
_FAILED = seccomp.FAILED

Plan = tuple[list[syscalls.Prepared], list[syscalls.Prepared]]  # system calls before the files are placed, and after


class Child:
    """What every child of a template does; made before the fork.

    Args:
        template: pidfd of the template.
        work: the directory inside the jail over which the child mounts its own.
        jailed: False runs the snippet with resource limits only.
        processes: the calls may start processes and programs.
        groups: control groups that each call joins.
    """

    def __init__(self, template: int, work: str, jailed: bool, processes: bool, groups: int) -> None:
        os.dup2(template, _TEMPLATE)
        self._work = work
        self._jailed = jailed
        self._processes = processes
        self._groups = groups
        self._filter = seccomp.child_filter(processes)
        writable = (work, jail.SHARED_MEMORY) if processes else (work,)
        file_rules = landlock.Rules(writable, processes) if jailed and landlock.version() else None
        self._file_rules = file_rules.prepare(_RULES) if file_rules is not None else []
        self._plans: dict[tuple[tuple, int, bool], Plan] = {}
        self._rehearse()

    def _rehearse(self) -> None:
        """Run a child's set-up without effect: the interpreter specialises it here rather than in every child."""
        if self._processes or self._groups or not self._jailed:
            return  # these do more, which has an effect
        call, idle = (b"", 0, (), b"", b"", False), [syscalls.prepare("sched_yield")]
        for _ in range(_REHEARSALS):
            os.dup2(2, _STARTED)
            self._set_up(call, (idle, idle), [1, 2, _STARTED], "")
        os.dup2(2, _STARTED)
        gc.disable()  # as ``forks.settle_heap`` left it

    def plan(self, limits: tuple, address_space: int, program: bool) -> Plan:
        """The system calls of a child under these limits; made before the fork.

        Args:
            limits: as in ``protocol.Limits``.
            address_space: bytes; 0 for no limit of its own.
            program: it starts a program, as whose parent one process is ours.
        """
        key = (limits, address_space, program)
        if key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._walls(limits, program), self._limits(limits, address_space)
        return self._plans[key]

    def _walls(self, limits: tuple, program: bool) -> list[syscalls.Prepared]:
        """An own mount namespace with an empty sized directory, an own user for counting, no capability."""
        _, _, _, _, _, disk_mib, _, threads, _, processes = limits
        own_group = syscalls.prepare("setpgid", 0, 0)  # a signal to process group 0 must not reach the template
        walls = [own_group, syscalls.prepare_close_from(FIRST_FREE)]
        if not self._jailed:
            return walls
        walls.append(syscalls.prepare("unshare", syscalls.CLONE_NEWNS))
        size = jail.directory_options(disk_mib)
        if self._processes:
            # There, processes share semaphores.
            shared_flags = _MOUNT_FLAGS | syscalls.MS_NOEXEC
            walls.append(syscalls.prepare_mount("tmpfs", self._work, "tmpfs", _MOUNT_FLAGS, size))
            walls.append(syscalls.prepare_mount("tmpfs", jail.SHARED_MEMORY, "tmpfs", shared_flags, size))
        else:
            walls.append(syscalls.prepare_mount("tmpfs", self._work, "tmpfs", _MOUNT_FLAGS | syscalls.MS_NOEXEC, size))
        # Counted per user of the namespace that is this call's own; elsewhere it would count others' threads.
        most = processes + program if self._processes else threads
        return [
            *walls,
            syscalls.prepare("chdir", self._work.encode()),
            syscalls.prepare("unshare", syscalls.CLONE_NEWUSER),
            syscalls.prepare_capabilities(),
            syscalls.prepare_limit(resource.RLIMIT_NPROC, most),
            *self._file_rules,
        ]

    def _limits(self, limits: tuple, address_space: int) -> list[syscalls.Prepared]:
        """Resource limits, the tie to the template, the filter; only the started pipe and 0 to 2 stay open."""
        cpu_seconds, _, _, _, _, disk_mib, open_files, _, _, _ = limits
        # Soft = hard: the first process of a pid namespace ignores the soft limit's signal. The warden, which
        # knows fractions of seconds, is expected to act first.
        calls = [syscalls.prepare_limit(resource.RLIMIT_CPU, int(cpu_seconds) + 2)]
        if address_space:
            calls.append(syscalls.prepare_limit(resource.RLIMIT_AS, address_space))
        calls += [
            syscalls.prepare_limit(resource.RLIMIT_NOFILE, open_files),
            syscalls.prepare_limit(resource.RLIMIT_FSIZE, disk_mib << 20),
            syscalls.prepare_limit(resource.RLIMIT_SIGPENDING, PENDING_SIGNALS),
            # Die with the template, also where it died before this was asked for.
            syscalls.prepare("prctl", syscalls.PR_SET_PDEATHSIG, signal.SIGKILL.value, 0, 0, 0),
            syscalls.prepare_check_alive(_TEMPLATE),
            syscalls.prepare_close_from(_TEMPLATE),
        ]
        return [*calls, self._filter.prepare()] if self._jailed else calls

    def become(self, call: UnpackedCall, plan: Plan, fds: list[int], directory: str) -> NoReturn:
        """Set up, say that the walls stand, run the call.

        Args:
            plan: of this object, for the call's limits.
            fds: stdout, stderr, started pipe, where files are wanted a socket for the working directory, if there is
                input stdin, and the doors of the control groups; all from ``FIRST_FREE`` on.
            directory: working directory where there is no jail.
        """
        code = 1
        source, flags, _, _, command, _ = call
        try:
            self._set_up(call, plan, fds, directory)
        except BaseException as error:
            os.write(2, f"the sandbox could not prepare a call: {error!r}".encode())
            os._exit(0)
        try:
            code = run_program(command) if command else run_snippet(source, flags)
        finally:
            leave(code | _FAILED if code else 0)

    def _set_up(self, call: UnpackedCall, plan: Plan, fds: list[int], directory: str) -> None:
        _, _, _, given, _, wanted = call
        walls, limits = plan
        if self._groups:
            os.dup2(fds[1], 2)  # what fails is said there
            join(fds, self._groups)  # and what follows is charged there
        _take_descriptors(fds, wanted)
        syscalls.perform(walls)
        if not self._jailed:
            os.chdir(directory)
            os.environ.update(HOME=directory, TMPDIR=directory)
        if self._processes or not self._jailed:
            forks.register_hooks()
        if given:
            files.place(given)
        if wanted:
            _show_directory()
        syscalls.perform(limits)
        gc.enable()
        # Written by us and closed before the snippet begins: without it the fault is ours, with it the snippet's.
        os.write(_STARTED, STARTED.pack(time.monotonic()))
        os.close(_STARTED)


def reserve_descriptors() -> None:
    """Take every number from 3 to below ``FIRST_FREE``, so that what arrives later is never in the way of a child."""
    for number in range(_STARTED, FIRST_FREE):
        os.dup2(0, number)


def _take_descriptors(fds: list[int], wanted: bool) -> None:
    """stdin, stdout, stderr and the started pipe become 0, 1, 2 and 3, the socket for the working directory 5."""
    stdout, stderr, started, *rest = fds
    take_descriptors(stdout, stderr, started)
    if wanted:
        os.dup2(rest.pop(0), _COLLECTOR)
    if rest:
        os.dup2(rest[0], 0)


def _show_directory() -> None:
    """Give the warden a descriptor of the working directory, so that it can read there when the call is over."""
    with socket.socket(fileno=_COLLECTOR) as collector:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        send_packet(collector, b"directory", (directory,))
        os.close(directory)

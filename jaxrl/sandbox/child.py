"""The first milliseconds of a call: a fresh fork of the template puts on its walls, then runs the snippet.

Runs once per call, on pages that it copies by touching them: straight code on prepared values, few objects.
"""

import fcntl
import gc
import os
import resource
import select
import signal
import socket
import time
from typing import NoReturn

from jaxrl.sandbox import cell, files, forks, jail, landlock, programs, seccomp, syscalls
from jaxrl.sandbox.orders import STARTED, send_packet
from jaxrl.sandbox.protocol import unpack_for_child

_MOUNT_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV
_FILES_IN_WORK = 4096
_PENDING_SIGNALS = 256  # queued signals and timers; the kernel counts those of all calls together
_exit = os._exit  # a snippet may replace the name in its place


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
        self._template = template
        self._work = work
        self._jailed = jailed
        self._processes = processes
        self._groups = groups
        self._mount_flags = _MOUNT_FLAGS | (0 if processes else syscalls.MS_NOEXEC)
        self._filter = seccomp.child_filter(processes)
        writable = (work, jail.SHARED_MEMORY) if processes else (work,)
        self._file_rules = landlock.Rules(writable, processes) if jailed and landlock.version() else None

    def become(self, packed: bytes, address_space: int, fds: list[int], directory: str) -> NoReturn:
        """Set up, say that the walls stand, run the call.

        Args:
            packed: the Call.
            address_space: bytes; 0 for no limit of its own.
            fds: stdout, stderr, started pipe, where files are wanted a socket for the working directory, if there is
                input stdin, and the doors of the control groups.
            directory: working directory where there is no jail.
        """
        code = 1
        try:
            source, flags, limits, given, command, wanted = unpack_for_child(packed)
            cpu_seconds, _, _, _, _, disk_mib, open_files, threads, _, processes = limits
            programs.join(fds, self._groups)  # first, for what follows is charged there
            os.setsid()  # a signal to process group 0 must not reach the template
            _take_descriptors(fds, self._template, wanted)
            if self._jailed:
                self._build_walls(disk_mib)
                # Counted per user of the namespace that is this call's own; elsewhere it would count others' threads.
                most = processes + bool(command) if self._processes else threads  # a program's parent is ours
                resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
            else:
                os.chdir(directory)
                os.environ.update(HOME=directory, TMPDIR=directory)
            if self._processes or not self._jailed:
                forks.register_hooks()
            if given:
                files.place(given)
            if wanted:
                _show_directory()
            # Soft = hard: the first process of a pid namespace ignores the soft limit's signal. The warden, which
            # knows fractions of seconds, is expected to act first.
            seconds = int(cpu_seconds) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            if address_space:
                resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk_mib << 20, disk_mib << 20))
            resource.setrlimit(resource.RLIMIT_SIGPENDING, (_PENDING_SIGNALS, _PENDING_SIGNALS))
            _tie_to_template()
            if self._jailed:
                self._filter.install()
            gc.enable()
            # Written by us and closed before the snippet begins: without it the fault is ours, with it the snippet's.
            os.write(3, STARTED.pack(time.monotonic()))
            os.close(3)
        except BaseException as error:
            os.write(2, f"the sandbox could not prepare a call: {error!r}".encode())
            os._exit(0)
        try:
            code = programs.run(command) if command else cell.run(source, flags)
        finally:
            _exit(code)

    def _build_walls(self, disk_mib: int) -> None:
        """An own mount namespace with an empty sized directory, an own user for counting, no capability."""
        syscalls.unshare(syscalls.CLONE_NEWNS)
        size = f"size={disk_mib}m,nr_inodes={_FILES_IN_WORK},mode=700"
        syscalls.mount("tmpfs", self._work, "tmpfs", self._mount_flags, size)
        if self._processes:  # where processes share semaphores
            flags = _MOUNT_FLAGS | syscalls.MS_NOEXEC
            syscalls.mount("tmpfs", jail.SHARED_MEMORY, "tmpfs", flags, size)
        os.chdir(self._work)
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        syscalls.set_capabilities()
        if self._file_rules is not None:
            self._file_rules.confine()


def _take_descriptors(fds: list[int], template: int, wanted: bool) -> None:
    """stdin, stdout, stderr and the started pipe become 0, 1, 2 and 3, the template 4; all others are closed.

    Where files are wanted the socket for the working directory becomes 5.
    """
    stdout, stderr, started, *stdin = fds
    collector = stdin.pop(0) if wanted else -1
    if stdin:
        os.dup2(stdin[0], 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    # Out of the way of the numbers filled next.
    spare = fcntl.fcntl(template, fcntl.F_DUPFD_CLOEXEC, 6)
    if wanted:
        collector = fcntl.fcntl(collector, fcntl.F_DUPFD_CLOEXEC, 6)
    os.dup2(started, 3)
    os.dup2(spare, 4)
    if wanted:
        os.dup2(collector, 5)
    syscalls.close_from(6 if wanted else 5)


def _show_directory() -> None:
    """Give the warden a descriptor of the working directory, so that it can read there when the call is over."""
    with socket.socket(fileno=5) as collector:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        send_packet(collector, b"directory", (directory,))
        os.close(directory)


def _tie_to_template() -> None:
    """Die with the template, also where it died before this was asked for."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([4], [], [], 0)[0]:
        os._exit(0)
    os.close(4)

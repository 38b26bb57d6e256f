"""The first process of a session's pid namespace: forks the session, gives directories, reports who ended and how.

Runs no cell. Its end is the end of the session and of all copies of it, by the kernel's hand.
"""

import contextlib
import os
import resource
import select
import signal
import socket
from typing import NoReturn

from jaxrl.sandbox import copying, jail, orders, syscalls
from jaxrl.sandbox.leaf import Leaf
from jaxrl.sandbox.orders import receive_packet, send_packet

_MOUNT_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


class Keeper:
    """What every keeper of a template does; made before the fork.

    Args:
        template: pidfd of the template.
        work: where working directories are mounted.
    """

    def __init__(self, template: int, work: str) -> None:
        self._template = template
        self._work = work
        self._leaf = Leaf(work)

    def become(self, order: bytes, fds: list[int]) -> NoReturn:
        """Fork the session's first process and keep the family.

        Args:
            order: the FAMILY head.
            fds: own control socket; control, stdout and stderr of the first process.
        """
        self._control = socket.socket(fileno=fds[0])
        try:
            os.setsid()
            syscalls.close_all_but([self._template, *fds])
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            if select.select([self._template], [], [], 0)[0]:
                os._exit(0)
            self._leaves: set[int] = set()  # process ids
            _, address_space, disk_mib, open_files, threads = orders.FAMILY.unpack(order)
            self._threads = threads  # that leaves are allowed now
            self._disk_mib = disk_mib
            pid = os.fork()
            if pid == 0:
                self._leaf.become(address_space, disk_mib, open_files, threads, fds[1:])
            for fd in fds[1:]:
                os.close(fd)
            # By signal, since a copy may end before anybody knows of it. The first process must not inherit this.
            deaths, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
            signal.signal(signal.SIGCHLD, lambda *_: None)
            syscalls.hear_only_ends_of_children()  # each cell ends with a halt and begins with its end
            poller = select.poll()
            poller.register(self._control, select.POLLIN)
            poller.register(deaths, select.POLLIN)
            self._bury()
            while True:
                for fd, _ in poller.poll():
                    if fd == deaths:
                        os.read(deaths, 4096)
                        self._bury()
                    else:
                        self._obey()
        except BaseException as error:
            send_packet(self._control, orders.ANSWER_FAILED + repr(error).encode())
        finally:
            os._exit(1)

    def _obey(self) -> None:
        order, fds = receive_packet(self._control)
        if not order:
            os._exit(0)
        pid, threads = orders.DIRECTORY.unpack_from(order, 1)
        self._leaves.add(pid)
        try:
            self._allow_threads(threads)
            self._give_directory(*fds)
            refusal = ""
        except OSError as error:
            refusal = str(error)
        for fd in fds:
            os.close(fd)
        send_packet(self._control, orders.ORDER_DIRECTORY + refusal.encode())

    def _allow_threads(self, threads: int) -> None:
        if threads > self._threads:
            self._threads = threads
            for pid in self._leaves:
                with contextlib.suppress(ProcessLookupError):  # ended, and about to be collected
                    _, most = resource.prlimit(pid, resource.RLIMIT_NPROC)
                    resource.prlimit(pid, resource.RLIMIT_NPROC, (min(threads, most), most))

    def _give_directory(self, owner: int, original: int | None = None) -> None:
        """Mount a directory of its own for one process, with the files that lie in another's.

        Raises:
            OSError: it cannot be had, or the files do not fit.
        """
        source = -1
        try:
            if original is not None:
                syscalls.enter_mount_namespace(original)
                source = os.open(self._work, os.O_RDONLY | os.O_DIRECTORY)
            syscalls.enter_mount_namespace(owner)
            if original is not None:
                syscalls.detach_mount(self._work)
            syscalls.mount("tmpfs", self._work, "tmpfs", _MOUNT_FLAGS, jail.directory_options(self._disk_mib))
            if original is not None:
                target = os.open(self._work, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    copying.copy_tree(source, target)
                finally:
                    os.close(target)
        finally:
            if source >= 0:
                os.close(source)
            syscalls.enter_mount_namespace(self._template)

    def _bury(self) -> None:
        """Collect everybody that has ended, copies that nobody came to know of included."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._leaves.discard(pid)
            exited = orders.EXITED.pack(pid, status, usage.ru_utime, usage.ru_stime, usage.ru_maxrss)
            send_packet(self._control, orders.ANSWER_DIED + exited)

"""A session's process: puts on its walls, then runs one cell after the other, and copies itself when told to.

Whatever the cells do to this code, the warden believes none of its words beyond "my cell is over, with this exit code":
it halts the process after each cell, and looks at every copy from outside before it lets it run.
"""

import gc
import os
import resource
import socket
from typing import NoReturn

from jaxrl.sandbox import cell, landlock, orders, seccomp, syscalls
from jaxrl.sandbox.orders import receive_packet, send_packet
from jaxrl.sandbox.start import PENDING_SIGNALS, leave, take_descriptors

_MOST_THREADS = 4096  # of a session and its copies together; the warden sets how many of them there may be at present
_CONTROL = 3  # number of the control socket's descriptor


class Leaf:
    """What every first process of a session does; made before the fork.

    Args:
        work: where its working directory will be.
    """

    def __init__(self, work: str) -> None:
        self._work = work
        self._filters = (seccomp.session_filter(), seccomp.child_filter(copies=True))  # the second denies a third
        self._file_rules = landlock.Rules(("/",)) if landlock.version() else None

    def become(self, address_space: int, disk_mib: int, open_files: int, threads: int, fds: list[int]) -> NoReturn:
        """Set up, serve.

        Args:
            address_space: bytes.
            fds: control, stdout, stderr.
        """
        try:
            os.setsid()
            _take_descriptors(fds)
            close_the_rest = syscalls.prepare_close_from(_CONTROL + 1)
            syscalls.perform([close_the_rest])
            control = socket.socket(fileno=_CONTROL)
            # The keeper owns this user namespace and so may mount in the other; nobody inside may.
            syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            syscalls.set_capabilities(keep=(syscalls.CAP_SYS_ADMIN,))  # what a copy's mount namespace asks for
            if self._file_rules is not None:
                syscalls.perform([*self._file_rules.prepare(_CONTROL + 1), close_the_rest])
            resource.setrlimit(resource.RLIMIT_NPROC, (threads, max(threads, _MOST_THREADS)))
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk_mib << 20, disk_mib << 20))
            resource.setrlimit(resource.RLIMIT_SIGPENDING, (PENDING_SIGNALS, PENDING_SIGNALS))
            for filter in self._filters:
                filter.install()
            gc.enable()
            notebook = cell.Notebook()
            _enter(control, self._work, self._work)
        except BaseException as error:
            os.write(2, f"the sandbox could not prepare a session: {error!r}".encode())
            leave(1)
        try:
            _serve(control, notebook, self._work)
        finally:
            leave(1)


def _take_descriptors(fds: list[int]) -> None:
    """Control, stdout and stderr take their places."""
    control, stdout, stderr = fds
    take_descriptors(stdout, stderr, control)


def _enter(control: socket.socket, directory: str, work: str) -> None:
    """Say that this process exists, and go into its working directory once there is one."""
    send_packet(control, orders.ANSWER_EXISTS)
    if receive_packet(control)[0] != orders.ORDER_ENTER:
        leave(0)
    try:
        os.chdir(directory)
    except OSError:
        os.chdir(work)  # what was removed before the copy was made cannot be entered
    send_packet(control, orders.ANSWER_ENTERED)


def _serve(control: socket.socket, notebook: cell.Notebook, work: str) -> NoReturn:
    while True:
        order, fds = receive_packet(control)
        if order[:1] == orders.ORDER_CELL:
            echo, in_memory, length = orders.CELL.unpack_from(order, 1)
            content = order[1 + orders.CELL.size :]
            if in_memory:
                with open(fds.pop(), "rb") as file:
                    content = file.read()
            exit_code = notebook.run(content[length:], bool(echo), content[:length], work)
            send_packet(control, orders.ANSWER_OVER + bytes([exit_code]))
        elif order == orders.ORDER_COPY:
            _copy(control, fds, work)
        else:
            leave(0)


def _copy(control: socket.socket, fds: list[int], work: str) -> None:
    """Two processes return from here: this one, and the copy with its own control socket under the same number."""
    try:
        directory = os.getcwd()
    except OSError:
        directory = work
    try:
        copy = syscalls.copy_process() == 0
        made = True
    except OSError:
        copy = made = False
    if copy:
        _take_descriptors(fds)
    for fd in fds:
        os.close(fd)
    if copy:
        _enter(control, directory, work)
    else:
        send_packet(control, orders.ANSWER_COPIED + bytes([made]))

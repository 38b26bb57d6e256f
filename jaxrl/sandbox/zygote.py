"""The jailed side: a launcher builds the jail, stems load modules, templates fork one child per call.

    launcher ──fork──► bare stem (first process of the jail) ──fork──► stem with the modules preloaded
                            └─fork─► templates                              └─fork─► templates ──fork──► children

A stem never runs a call, so a lost template is replaced by one fork. All orders come from the warden over SEQPACKET
sockets; a closed socket means that the warden is gone and ends the process.
"""

import fcntl
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from typing import NoReturn

from jaxrl.sandbox import cell, jail, seccomp, syscalls
from jaxrl.sandbox.orders import (
    ANSWER_BORN,
    ANSWER_DIED,
    ANSWER_FAILED,
    ANSWER_PONG,
    ANSWER_READY,
    BORN,
    CALL_HEAD,
    DIED,
    ORDER_PING,
    ORDER_TEMPLATE,
    STARTED,
    receive_packet,
    send_packet,
)
from jaxrl.sandbox.protocol import Call

# Typical work, run once in a stem: its caches are then shared by every call instead of filled by each.
_WARM_UP = {
    "numpy": "import numpy as np; a = np.arange(6.0).reshape(2, 3); a @ a.T; repr(a); np.linalg.solve(np.eye(2), [1, 2])",
    "scipy": "import scipy.optimize, scipy.integrate, scipy.linalg, scipy.special",
    "sympy": (
        "import sympy as sp; x, y = sp.symbols('x y'); sp.solve(x**2 - 3*x + 2, x); sp.solve([x + y - 3, x - y - 1], [x, y]); "
        "str(sp.simplify((x**2 - 1)/(x - 1))); sp.factorint(360); str(sp.expand((x + y)**3)); sp.factor(x**2 - 1); "
        "sp.integrate(x**2, (x, 0, 1)); sp.diff(sp.sin(x)*x, x); sp.Rational(1, 3) + sp.sqrt(2); sp.latex(x/2); sp.N(sp.pi)"
    ),
}


def launch(control_fd: int, settings: dict) -> NoReturn:
    """Build the jail, fork its first process, and leave. Failure is reported on the control socket."""
    control = socket.socket(fileno=control_fd)
    jailed = not settings["unsafe"]
    view = jail.View(**settings["view"])
    sys.path[:] = [path for path in sys.path if path != settings["home"]] + list(view.packages)
    try:
        if jailed:
            jail.enter(view)
    except jail.SandboxUnavailable as error:
        send_packet(control, ANSWER_FAILED + str(error).encode())
        os._exit(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 2)  # up to here errors went to the user's terminal
    os.close(null)
    if os.fork():
        os._exit(0)
    order, _ = receive_packet(control)  # sent once the warden has become the parent
    if order:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if jailed:
            jail.confine_template()
        cell.prepare()
        _stem(control, settings["watch_bytes"], view.work, jailed)
    os._exit(0)


def _stem(control: socket.socket, watch_bytes: int, work: str, jailed: bool) -> None:
    """Fork templates and further stems on order."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; the warden watches through pidfds
    gc.collect()
    gc.freeze()
    gc.disable()
    _announce(control, ANSWER_READY)
    while True:
        order, fds = receive_packet(control)
        if not order:
            os._exit(0)
        if os.fork():
            os.close(fds[0])
            continue
        control.close()
        control = socket.socket(fileno=fds[0])
        if order[:1] == ORDER_TEMPLATE:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _Template(control, watch_bytes, work, jailed).serve()
        try:
            _load(json.loads(order[1:]))
        except BaseException as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            send_packet(control, ANSWER_FAILED + f"a template could not load its modules: {text}".encode())
            os._exit(1)
        gc.collect()
        gc.freeze()
        _announce(control, ANSWER_READY)


def _load(modules: list[str]) -> None:
    for name in modules:
        __import__(name)
    for name in modules:
        if name in _WARM_UP:
            exec(compile(_WARM_UP[name], "<warm up>", "exec"), {})
    cell.prepare()


def _announce(control: socket.socket, answer: bytes, *fds: int) -> None:
    own = os.pidfd_open(os.getpid())
    send_packet(control, answer, (own, *fds))
    os.close(own)


class _Template:
    """Forks children and reports their births and deaths."""

    def __init__(self, control: socket.socket, watch_bytes: int, work: str, jailed: bool) -> None:
        self._control = control
        self._jailed = jailed
        self._own = os.pidfd_open(os.getpid())
        self._walls = jail.ChildWalls(work) if jailed else None
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._children: dict[int, tuple[int, int, str]] = {}  # pidfd → (call id, pid, directory to remove)
        self._watch_bytes = watch_bytes

    def serve(self) -> NoReturn:
        watch: tuple[int, ...] = ()
        if self._jailed:
            watch = (seccomp.memory_watch(self._watch_bytes).install(listen=True),)
        _announce(self._control, ANSWER_READY, *watch)
        for fd in watch:
            os.close(fd)
        while True:
            for fd, _ in self._poller.poll():
                if fd == self._control.fileno():
                    self._obey()
                else:
                    self._bury(fd)

    def _obey(self) -> None:
        order, fds = receive_packet(self._control)
        if not order:
            os._exit(0)
        if order[:1] == ORDER_PING:
            send_packet(self._control, ANSWER_PONG)
            return
        id, address_space, in_memory = CALL_HEAD.unpack_from(order, 1)
        packed = order[1 + CALL_HEAD.size :]
        if in_memory:
            with open(fds.pop(), "rb") as file:
                packed = file.read()
        directory = "" if self._jailed else tempfile.mkdtemp(prefix="jaxrl-call-")
        try:
            if self._jailed:
                syscalls.unshare(syscalls.CLONE_NEWPID)
            pid = os.fork()
        except OSError:
            pid = -1  # the closed pipes tell the warden: nothing started
        if pid == 0:
            self._become_child(packed, address_space, fds, directory)
        if self._jailed:
            syscalls.enter_pid_namespace(self._own)
        for fd in fds:
            os.close(fd)
        if pid < 0:
            send_packet(self._control, ANSWER_DIED + DIED.pack(id, 0, 0.0, 0.0, 0))
            return
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (id, pid, directory)
        self._poller.register(pidfd, select.POLLIN)
        send_packet(self._control, ANSWER_BORN + BORN.pack(id), (pidfd,))

    def _bury(self, pidfd: int) -> None:
        id, pid, directory = self._children.pop(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        if directory:
            shutil.rmtree(directory, ignore_errors=True)
        send_packet(self._control, ANSWER_DIED + DIED.pack(id, status, usage.ru_utime, usage.ru_stime, usage.ru_maxrss))

    def _become_child(self, packed: bytes, address_space: int, fds: list[int], directory: str) -> NoReturn:
        """Descriptors, walls, limits; then the byte that separates our failures from the snippet's; then the snippet."""
        try:
            call = Call.unpack(packed)
            self._control.detach()
            os.setsid()  # a signal to process group 0 must not reach the template
            own = _take_descriptors(fds, self._own)
            orphaned = select.poll()
            orphaned.register(own, select.POLLIN)
            if self._walls is not None:
                self._walls.close(call.limits.disk_mib)
            else:
                os.chdir(directory)
                os.environ.update(HOME=directory, TMPDIR=directory)
            jail.limit_resources(call.limits, address_space, self._jailed)
            # The template's death ends the child. Where it came first, nobody else would.
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            if orphaned.poll(0):
                os._exit(0)
            os.close(own)
            if self._walls is not None:
                self._walls.seal()
            gc.enable()
            os.write(3, STARTED.pack(time.monotonic()))
            os.close(3)
        except BaseException as error:
            os.write(2, f"the sandbox could not prepare a call: {error!r}".encode())
            os._exit(0)
        code = 1
        try:
            code = cell.run(call)
        finally:
            os._exit(code)


def _take_descriptors(fds: list[int], template: int) -> int:
    """stdin, stdout, stderr and the started pipe become 0, 1, 2 and 3; all others close but the template's, returned."""
    stdout, stderr, started, *stdin = fds
    if stdin:
        os.dup2(stdin[0], 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    own = fcntl.fcntl(template, fcntl.F_DUPFD_CLOEXEC, 5)  # out of the way of the two numbers filled next
    os.dup2(started, 3)
    os.dup2(own, 4)
    syscalls.close_from(5)
    return 4

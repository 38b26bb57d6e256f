"""The jailed side: a launcher builds the jail, stems load modules, templates fork a child a call, a keeper a session.

    launcher ──fork──► bare stem (first process of the jail) ──fork──► stem with the modules preloaded
                            └─fork─► templates                              └─fork─► templates ──fork──► children
                                                                                         └─fork─► keepers ──► sessions

A stem never runs a call, so a lost template is replaced by one fork. All orders come from the warden over SEQPACKET
sockets; a closed socket means that the warden is gone and ends the process.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

from jaxrl.sandbox import cell, forks, jail, mappings, orders, seccomp, syscalls
from jaxrl.sandbox.child import FIRST_FREE, Child, reserve_descriptors
from jaxrl.sandbox.keeper import Keeper
from jaxrl.sandbox.orders import receive_packet, send_packet
from jaxrl.sandbox.protocol import unpack_for_child

# Typical work, run once in a stem: its caches are then shared by every call instead of filled by each.
_WARM_UP = {
    "numpy": """
import numpy as np
a = np.arange(6.0).reshape(2, 3)
repr(a @ a.T), np.linalg.solve(np.eye(2), [1, 2]), np.random.rand(2)
""",
    "scipy": """
import scipy.integrate, scipy.linalg, scipy.optimize, scipy.special
""",
    "sympy": """
import sympy as sp
x, y = sp.symbols("x y")
sp.solve(x**2 - 3*x + 2, x), sp.solve([x + y - 3, x - y - 1], [x, y])
str(sp.simplify((x**2 - 1) / (x - 1))), sp.factor(x**2 - 1), str(sp.expand((x + y)**3))
sp.integrate(x**2, (x, 0, 1)), sp.diff(sp.sin(x) * x, x), sp.latex(sp.Rational(1, 3) + sp.sqrt(2)), sp.N(sp.pi)
sp.factorint(360), sp.isprime(97), list(sp.primerange(10)), sp.gcd(12, 18), sp.binomial(5, 2)
sp.Matrix([[1, 2], [3, 4]]).det()
""",
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
        send_packet(control, orders.ANSWER_FAILED + str(error).encode())
        os._exit(1)
    mappings.merge()
    mappings.enlarge_code_pages()
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
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))  # some hosts grant it without bound
        cell.prepare()
        if settings["processes"]:
            sys.executable = settings["interpreter"]  # the path within a virtual environment does not exist here
        _stem(control, settings, jailed)
    os._exit(0)


def _stem(control: socket.socket, settings: dict, jailed: bool) -> NoReturn:
    """Fork templates and further stems on order."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; the warden watches through pidfds
    forks.settle_heap()
    _announce(control)
    while True:
        order, fds = receive_packet(control)
        if not order:
            os._exit(0)
        if os.fork():
            os.close(fds[0])
            continue
        control.close()
        control = socket.socket(fileno=fds[0])
        if order[:1] == orders.ORDER_TEMPLATE:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _Template(control, settings, jailed).serve()
        try:
            load(json.loads(order[1:]))
        except BaseException as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            send_packet(control, orders.ANSWER_FAILED + f"a template could not load its modules: {text}".encode())
            os._exit(1)
        forks.settle_heap()
        _announce(control)


def load(modules: list[str]) -> None:
    """Import modules and run what is typical for them; everything a fork is to find ready is ready then."""
    for name in modules:
        __import__(name)
    for name in modules:
        exec(compile(_WARM_UP.get(name, ""), "<warm up>", "exec"), {})
    mappings.merge()
    cell.prepare()


def _announce(control: socket.socket, *fds: int) -> None:
    own = os.pidfd_open(os.getpid())
    send_packet(control, orders.ANSWER_READY, (own, *fds))
    os.close(own)


# Bytes of a call up to which the next order takes the place of what it leaves in freed memory.
_SOON_OVERWRITTEN = 256


class _Template:
    """Forks children and keepers, and reports their births and deaths."""

    def __init__(self, control: socket.socket, settings: dict, jailed: bool) -> None:
        self._control = socket.socket(fileno=fcntl.fcntl(control, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE))
        control.close()
        reserve_descriptors()
        self._watch_bytes = settings["watch_bytes"]
        self._jailed = jailed
        self._work = settings["view"]["work"]
        self._own = os.pidfd_open(os.getpid())
        self._into_new_namespace = [syscalls.prepare("unshare", syscalls.CLONE_NEWPID)]
        self._back = [syscalls.prepare("setns", self._own, syscalls.CLONE_NEWPID)]  # for the next one to be made
        self._child = Child(self._own, self._work, jailed, settings["processes"], settings["groups"])
        self._keeper = Keeper(self._own, self._work) if jailed and not settings["processes"] else None
        self._poller = select.poll()
        self._poller.register(self._control, select.POLLIN)
        self._children: dict[int, tuple[int, int, str]] = {}  # pidfd → (call id, pid, directory to remove)

    def serve(self) -> NoReturn:
        forks.restore_registration()
        watch: tuple[int, ...] = ()
        if self._jailed and self._watch_bytes:
            watch = (seccomp.memory_watch(self._watch_bytes).install(listen=True),)
        _announce(self._control, *watch)
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
        if order[:1] == orders.ORDER_PING:
            send_packet(self._control, orders.ANSWER_PONG)
            return
        if order[:1] == orders.ORDER_FAMILY:
            self._found_family(order[1:], fds)
            return
        id, address_space, in_memory = orders.CALL_HEAD.unpack_from(order, 1)
        packed = order[1 + orders.CALL_HEAD.size :]
        if in_memory:
            with open(fds.pop(), "rb") as file:
                packed = file.read()
        call = unpack_for_child(packed)
        _, _, limits, _, command, wanted = call
        plan = self._child.plan(limits, address_space, program=bool(command))
        directory = "" if self._jailed else _scratch(self._work)
        # Starred below: any other call the interpreter would specialise, in every child anew.
        become, arguments = self._child.become, (call, plan, fds, directory)
        try:
            if self._jailed:
                syscalls.perform(self._into_new_namespace)
            pid = os.fork()
        except OSError:
            pid = -1  # the closed pipes tell the warden that nothing started
        if pid == 0:
            become(*arguments)
        if self._jailed:
            syscalls.perform(self._back)
        for fd in fds:
            os.close(fd)
        if len(packed) > _SOON_OVERWRITTEN:
            for secret in (order, packed, *call):
                _wipe(secret)
        if pid < 0:
            send_packet(self._control, orders.ANSWER_DIED + orders.DIED.pack(id, 0, 0.0, 0.0, 0))
            return
        pidfd = os.pidfd_open(pid)
        if wanted:
            directory = ""  # the warden has yet to read there; it goes with the pool
        self._children[pidfd] = (id, pid, directory)
        self._poller.register(pidfd, select.POLLIN)
        send_packet(self._control, orders.ANSWER_BORN + orders.BORN.pack(id), (pidfd,))

    def _found_family(self, order: bytes, fds: list[int]) -> None:
        """Fork the keeper of a session, first process of a namespace of its own."""
        assert self._keeper is not None, "sessions are kept in a jail, and not beside calls that start processes"
        id, *_ = orders.FAMILY.unpack(order)
        try:
            syscalls.perform(self._into_new_namespace)
            pid = os.fork()
        except OSError:
            pid = -1  # its closed control socket tells the warden
        if pid == 0:
            self._keeper.become(order, fds)
        syscalls.perform(self._back)
        for fd in fds:
            os.close(fd)
        if pid > 0:
            pidfd = os.pidfd_open(pid)
            self._children[pidfd] = (id, pid, "")
            self._poller.register(pidfd, select.POLLIN)
            send_packet(self._control, orders.ANSWER_BORN + orders.BORN.pack(id), (pidfd,))

    def _bury(self, pidfd: int) -> None:
        id, pid, directory = self._children.pop(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        if not self._jailed:
            # What it started and left behind; in a jail the kernel has done this.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        ended = syscalls.bury(pid)
        if directory:
            _remove(directory)
        died = orders.DIED.pack(id, *ended)
        send_packet(self._control, orders.ANSWER_DIED + died)


def _wipe(secret: object) -> None:
    """Zero what later children would find in freed memory: bytes that nobody else holds."""
    if isinstance(secret, bytes) and len(secret) > 1:  # shorter ones the interpreter shares
        ctypes.memset(id(secret) + bytes.__basicsize__ - 1, 0, len(secret))


def _scratch(folder: str) -> str:
    """A new directory for a call without a jail."""
    import tempfile  # not above: its libraries would be copied by every fork of a jailed template

    return tempfile.mkdtemp(dir=folder)


def _remove(directory: str) -> None:
    import shutil  # as with ``tempfile``

    shutil.rmtree(directory, ignore_errors=True)

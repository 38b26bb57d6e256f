"""The warden's processes inside the jail: one bare stem, one stem with modules, and templates of both kinds.

Keeps the wanted number of templates alive: a dead one is noticed through its pidfd, a halted one by its silence,
and either is replaced by a fork of its stem. Where the jail's first process dies, the kernel ends everything in
it, and the whole jail is built anew.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

from jaxrl.sandbox import orders
from jaxrl.sandbox.inspection import held, own_memory_kib, process_of
from jaxrl.sandbox.job import WATCH_BYTES, Job, pid_of, send_signal
from jaxrl.sandbox.loop import Loop
from jaxrl.sandbox.outgoing import Outgoing
from jaxrl.sandbox.seccomp import Request, receive_request, release_request

_PAGE = os.sysconf("SC_PAGE_SIZE")
_REBUILDS = 3  # jails built in vain, one after the other, before giving up

# Everything the jailed interpreter finds in its environment. One heap, since each further one reserves address space
# that counts against a call's memory; library threads would only contend for the one core that a call gets.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
    "LD_BIND_NOW": "1",  # else each child looks up the functions it calls
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_LAUNCH = (
    "import json, sys; settings = json.loads(sys.argv[2]); sys.path.append(settings['home']); "
    "from jaxrl.sandbox import forks; forks.defer_hooks(); "
    "from jaxrl.sandbox.zygote import launch; launch(int(sys.argv[1]), settings)"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pool tells its warden at start."""

    view: dict  # fields of jail.View
    home: str  # folder that holds the jaxrl package
    preload: tuple[str, ...]
    templates: int  # of each kind
    slots: int  # calls that run at once
    slow_slots: int  # further calls that may run on once they have proved long
    heartbeat_seconds: float  # a template silent for so long is taken for dead
    recycle_calls: int  # a template that has run so many is replaced
    recycle_growth_mib: int  # and one whose own memory has grown by so much
    unsafe: bool
    session_memory_mib: int  # of live sessions together
    program_view: dict  # fields of jail.View, for calls that may start processes
    program_environment: dict  # what those find in their environment besides
    interpreter: str  # real path of the interpreter, as they see it
    processes_without_cgroup: bool  # where none can be had, each process is bounded by itself
    processes: bool = False  # this fleet is for such calls
    groups: int = 0  # control groups that each of them joins


class Member:
    """A process of ours inside the jail, with its control socket; ``hear`` is called when there is an answer."""

    def __init__(self, loop: Loop, control: socket.socket, hear: Callable[[], None]) -> None:
        self.control = control
        self.outgoing = Outgoing(loop, control, hear)
        self.pidfd = -1
        self.pid = 0
        self.ready = False
        self.alive = True


class Template(Member):
    """Forks calls. ``jobs`` are those it was ordered to run and has not reported dead."""

    def __init__(self, loop: Loop, control: socket.socket, hear: Callable[[], None], number: int, full: bool) -> None:
        super().__init__(loop, control, hear)
        self.number = number
        self.full = full
        self.jobs: dict[int, Job] = {}
        self.listener = -1
        self.address_space = 0  # bytes
        self.rss_kib = 0
        self.own_kib = 0  # memory of its own when it was new
        self.calls = 0  # that ended here
        self.retiring = False  # takes no further calls once its successor is ready
        self.on_trial = False  # failed to start a call, and has yet to show that it starts any
        self.asked = 0.0  # when the unanswered ping was sent; 0 where none is open
        self.halted: list[Request] = []  # memory requests of children whose birth is not yet known
        self.residents: set[int] = set()  # processes of sessions, at work or at rest


class Fleet:
    """Builds the jail and keeps its templates.

    Args:
        on_ready: every template is warm, for the first time.
        on_change: a template became ready: there may be work for it.
        on_lost: these jobs were on a template that died; their children are dead.
        on_message: an answer of a template about one of its jobs.
        on_copy: a session's process asks for a copy of itself; to be released or refused.
        on_failure: no jail can be had; the text says why.
    """

    def __init__(
        self,
        loop: Loop,
        settings: Settings,
        on_ready: Callable[[], None],
        on_change: Callable[[], None],
        on_lost: Callable[[Template, list[Job]], None],
        on_message: Callable[[Template, bytes, list[int]], None],
        on_copy: Callable[[Template, Request], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._on_ready, self._on_change, self._on_lost = on_ready, on_change, on_lost
        self._on_message, self._on_copy, self._on_failure = on_message, on_copy, on_failure
        self._stems: dict[bool, Member] = {}  # by "has the modules"
        self._launches_in_vain = 0
        self._numbers = 0
        self._announced = False
        self._closing = False
        self.templates: list[Template] = []
        self.restarts: Counter[str] = Counter()  # templates replaced, by reason

    def start(self) -> None:
        self._launch()
        self._loop.at(time.monotonic() + self._settings.heartbeat_seconds / 4, self._beat)

    def choose(self, full: bool, avoid: int) -> Template | None:
        """The ready template of this kind with the fewest calls; where there is another, not number ``avoid``, nor
        one that is to be replaced.
        """
        fitting = [t for t in self.templates if t.ready and t.full == full]
        if not fitting:
            return None
        return min(fitting, key=lambda t: (t.retiring, t.number == avoid or t.on_trial, len(t.jobs)))

    def close(self) -> None:
        """Kill everything; ``reap`` waits for it."""
        self._closing = True
        members = [*self.templates, *self._stems.values()]
        for template in self.templates:
            for job in template.jobs.values():
                if job.pidfd >= 0:
                    send_signal(job.pidfd, signal.SIGKILL)
        for member in reversed(members):
            self._drop(member)

    def _launch(self) -> None:
        """Start a fresh interpreter that builds the jail and leaves its first process, the bare stem, to us."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "view": self._settings.view,
            "home": self._settings.home,
            "unsafe": self._settings.unsafe,
            "watch_bytes": 0 if self._settings.processes else WATCH_BYTES,  # a process of a process would be unknown
            "processes": self._settings.processes,
            "groups": self._settings.groups,
            "interpreter": self._settings.interpreter,
        }
        environment = ENVIRONMENT | (self._settings.program_environment if self._settings.processes else {})
        work = self._settings.view["work"]
        launcher = subprocess.run(
            [sys.executable, "-s", "-S", "-P", "-c", _LAUNCH, str(theirs.fileno()), json.dumps(settings)],
            env=environment | {"HOME": work, "TMPDIR": work, "MPLCONFIGDIR": work},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
        )
        theirs.close()
        if launcher.returncode:
            answer, _ = orders.receive_packet(ours)
            ours.close()
            status = f"the jail's launcher ended with status {launcher.returncode}; see its standard error"
            self._on_failure(answer[1:].decode() or status)
            return
        orders.send_packet(ours, b"go")  # we are its parent now
        self._add_stem(ours, full=False)

    def _add_stem(self, control: socket.socket, full: bool) -> None:
        stem = self._stems[full] = Member(self._loop, control, lambda: self._hear_stem(stem, full))

    def _hear_stem(self, stem: Member, full: bool) -> None:
        try:
            answer, fds = orders.receive_packet(stem.control, wait=False)
        except BlockingIOError:  # no news after all
            return
        if answer[:1] == orders.ANSWER_READY:
            self._identify(stem, fds[0])
            self._loop.watch(stem.pidfd, lambda _: self._lose_stem(stem, full))
            if not full and self._settings.preload:
                modules = json.dumps(self._settings.preload).encode()
                self._add_stem(self._order(stem, orders.ORDER_STEM + modules), full=True)
            there = sum(template.full == full and not template.retiring for template in self.templates)
            for _ in range(self._settings.templates - there):
                self._add_template(full)
        elif answer[:1] == orders.ANSWER_FAILED:
            self._on_failure(answer[1:].decode())
        else:
            self._lose_stem(stem, full)

    def _order(self, stem: Member, order: bytes) -> socket.socket:
        """Have a stem fork; returns our end of the new process's control socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):  # the stem is dying; its own loss is handled where it is heard
            stem.outgoing.send(order, (theirs.detach(),))
        return ours

    def _add_template(self, full: bool) -> None:
        stem = self._stems.get(full)
        if stem is None or not stem.ready:
            return  # the stem brings its templates when it comes
        self._numbers += 1
        control = self._order(stem, orders.ORDER_TEMPLATE)
        template = Template(self._loop, control, lambda: self.hear(template), self._numbers, full)
        template.asked = time.monotonic()  # its first words are awaited like a pong
        self.templates.append(template)

    def hear(self, template: Template) -> None:
        """Take one message of a template."""
        try:
            answer, fds = orders.receive_packet(template.control, wait=False)
        except BlockingIOError:  # no news after all
            return
        if answer[:1] == orders.ANSWER_READY:
            self._identify(template, fds[0])
            self._loop.watch(template.pidfd, lambda _: self.lose(template, "died"))
            template.address_space, template.rss_kib = memory(template.pid)
            template.own_kib = own_memory_kib(template.pid)
            template.asked = 0.0
            if len(fds) > 1:
                template.listener = fds[1]
                self._loop.watch(template.listener, lambda _: self._weigh_request(template))
            self._launches_in_vain = 0
            self._end_retired()
            if not self._announced and self._complete():
                self._announced = True
                self._on_ready()
            self._on_change()
        elif answer[:1] == orders.ANSWER_PONG:
            template.asked = 0.0
        elif answer:
            self._on_message(template, answer, fds)
        else:
            self.lose(template, "died")

    def _complete(self) -> bool:
        kinds = 2 if self._settings.preload else 1
        return sum(t.ready for t in self.templates) >= kinds * self._settings.templates

    def _identify(self, member: Member, pidfd: int) -> None:
        member.pidfd, member.pid, member.ready = pidfd, pid_of(pidfd), True

    def lose(self, template: Template, reason: str) -> None:
        """A template is gone or no longer to be trusted: end it and its children, replace it, give its jobs back."""
        if not template.alive:
            return
        for job in template.jobs.values():
            if job.pidfd >= 0:
                send_signal(job.pidfd, signal.SIGKILL)
        self._drop(template)
        self.templates.remove(template)
        if not template.retiring:
            self.restarts[reason] += 1
            if not self._closing:
                self._add_template(template.full)
        jobs = list(template.jobs.values())
        template.jobs.clear()
        self._on_lost(template, jobs)

    def ended(self, template: Template) -> None:
        """A call ended on this template, which may be due for replacement."""
        template.calls += 1
        if template.calls >= self._settings.recycle_calls:
            self._retire(template, "calls")
        if template.retiring:
            self._end_retired()

    def _retire(self, template: Template, reason: str) -> None:
        """Replace a template without hurting its calls."""
        if not template.retiring and not self._closing:
            template.retiring = True
            self.restarts[reason] += 1
            self._add_template(template.full)

    def _end_retired(self) -> None:
        """End the templates that have no calls any more and are not needed for the next."""
        fresh = {template.full for template in self.templates if template.ready and not template.retiring}
        for template in [t for t in self.templates if t.retiring and not (t.jobs or t.residents) and t.full in fresh]:
            self._drop(template)
            self.templates.remove(template)

    def _lose_stem(self, stem: Member, full: bool) -> None:
        if not stem.alive or self._closing:
            return
        self._drop(stem)
        if self._stems.get(full) is stem:
            del self._stems[full]
        if full:
            root = self._stems.get(False)
            if root is not None and root.ready:
                modules = json.dumps(self._settings.preload).encode()
                self._add_stem(self._order(root, orders.ORDER_STEM + modules), full=True)
            return
        # The jail's first process: everything inside is dying with it.
        child = self._stems.pop(True, None)
        if child is not None:
            self._drop(child)
        for template in list(self.templates):
            self.lose(template, "jail died")
        self._launches_in_vain += 1
        if self._launches_in_vain > _REBUILDS:
            self._on_failure(f"the sandbox's jail died {_REBUILDS} times before it was ready")
        else:
            self._launch()

    def _drop(self, member: Member) -> None:
        """Kill a process and close what we hold of it."""
        member.alive = member.ready = False
        if member.pidfd >= 0:
            send_signal(member.pidfd, signal.SIGKILL)
            self._loop.forget(member.pidfd)
            os.close(member.pidfd)
        if isinstance(member, Template) and member.listener >= 0:
            self._loop.forget(member.listener)
            os.close(member.listener)
        member.outgoing.close()

    def _beat(self) -> None:
        """Ask every template whether it is there; drop those that have not answered the last question."""
        now = time.monotonic()
        for template in list(self.templates):
            if template.asked and now - template.asked > self._settings.heartbeat_seconds:
                stem = self._stems.get(template.full)
                if not template.ready and stem is not None:
                    self._lose_stem(stem, template.full)  # it does not fork
                self.lose(template, "silent")
            elif not template.asked and template.ready:
                try:
                    template.outgoing.send(orders.ORDER_PING)
                    template.asked = now
                except OSError:
                    self.lose(template, "died")
                    continue
                grown = own_memory_kib(template.pid) - template.own_kib
                if grown > self._settings.recycle_growth_mib << 10:
                    self._retire(template, "growth")
        self._end_retired()
        reap()
        self._loop.at(now + self._settings.heartbeat_seconds / 4, self._beat)

    def _weigh_request(self, template: Template) -> None:
        """A child asks for much memory, or ends: note whether its limit refuses that or did, then let it go on."""
        request = receive_request(template.listener)
        if request is None:
            return
        if request.copies:
            self._on_copy(template, request)
            return
        if request.thread != template.pid and not self._note_request(template, request):
            template.halted.append(request)  # its birth has not been reported yet
            return
        release_request(template.listener, request)

    def _note_request(self, template: Template, request: Request) -> bool:
        process = process_of(request.thread)
        if process == 0:
            return True  # dead already
        for job in template.jobs.values():
            if job.pid == process:
                if request.ends:
                    job.note_space(held(process).space)
                elif memory(process)[0] + request.size > job.address_space:
                    job.memory_refused = True
                return True
        return process in template.residents  # of a session that runs no cell

    def born(self, template: Template) -> None:
        """A birth became known: its early memory requests can be weighed."""
        halted, template.halted = template.halted, []
        for request in halted:
            if self._note_request(template, request):
                release_request(template.listener, request)
            else:
                template.halted.append(request)


def reap(wait_seconds: float = 0.0) -> None:
    """Collect processes that the kernel handed to us, for at most this long."""
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            if time.monotonic() >= deadline:
                return
            time.sleep(0.005)


def resident_kib(pid: int) -> int:
    """Resident memory of a process; 0 if it is dead."""
    return memory(pid)[1]


def memory(pid: int) -> tuple[int, int]:
    """(address space in bytes, resident KiB) of a process; zeros if it is dead."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            total, resident, *_ = (int(word) for word in file.read().split())
    except (OSError, ValueError):
        return 0, 0
    return total * _PAGE, resident * _PAGE >> 10

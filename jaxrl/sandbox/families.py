"""All sessions of a warden: opened with a first cell, given cells, copied, ended, put out when memory is short."""

import itertools
import os
import time
from collections.abc import Callable

from jaxrl.sandbox import inspection, orders
from jaxrl.sandbox.branching import Copying
from jaxrl.sandbox.cell_job import CellJob
from jaxrl.sandbox.fleet import Template
from jaxrl.sandbox.job import pid_of, sealed_memory
from jaxrl.sandbox.leaves import Family, Leaf
from jaxrl.sandbox.loop import Loop
from jaxrl.sandbox.protocol import Outcome, Report
from jaxrl.sandbox.seccomp import Request, refuse_request, release_request

_SWEEP_SECONDS = 0.5
_MEASURED_AT_ONCE = 10  # sessions; each takes a millisecond or two
_UNTOUCHED_KIB = 1024  # about what a copy costs that has run no cell yet: page tables
_SPARE = 0  # id of a copy that stands by


class Families:
    """The sessions.

    Args:
        work: where working directories are mounted.
        memory_mib: for all sessions together; beyond, those that were not used for longest are put out.
        most: sessions at once; beyond, the same.
        spared: of those being rebuilt, so many are never put out: some get to what they are rebuilt for.
        patience_seconds: within which a session is opened, and a killed one reported dead.
        on_begin: the cell is about to run; its pipes and process are known.
        on_end: the cell is over, as the report says.
        on_lost: the cell's process was lost, by a fault of ours or with its template.
        on_change: there may be a place for a waiting cell.
    """

    def __init__(
        self,
        loop: Loop,
        work: str,
        memory_mib: int,
        most: int,
        spared: int,
        patience_seconds: float,
        on_begin: Callable[[CellJob], None],
        on_end: Callable[[CellJob, Report], None],
        on_lost: Callable[[CellJob], None],
        on_change: Callable[[], None],
    ) -> None:
        self._loop, self._work = loop, work
        self._memory_kib, self._patience = memory_mib << 10, patience_seconds
        self._most, self._spared = most, min(spared, most // 2)
        self._on_begin, self._on_end, self._on_lost, self._on_change = on_begin, on_end, on_lost, on_change
        self._numbers = itertools.count(orders.FIRST_FAMILY)
        self._families: dict[int, Family] = {}
        self._leaves: dict[int, Leaf] = {}  # by the session's id
        self._copying: dict[Leaf, Copying] = {}  # by the original
        self._dying: dict[int, Family] = {}  # whose keepers have been killed and are not yet reported dead
        self._leaving: set[Leaf] = set()  # ended, copies that stood by too, and still with all their descriptors
        self._put_out: set[int] = set()  # sessions that were, of which nobody has asked
        self._sweeping = False

    # Cells

    @property
    def count(self) -> int:
        """Sessions that have a process."""
        return len(self._leaves)

    def has(self, session: int) -> bool:
        """Whether a session has a process."""
        return session in self._leaves

    def was_put_out(self, session: int) -> bool:
        """Whether a session has no process since it was put out; tells it once."""
        there = session in self._put_out
        self._put_out.discard(session)
        return there

    def resting(self, session: int) -> Leaf | None:
        """The session's process if it can be given a cell now."""
        leaf = self._leaves.get(session)
        return leaf if leaf is not None and leaf.resting else None

    def open(self, job: CellJob, template: Template) -> None:
        """Fork a process for a new session, and have it run the cell."""
        family = Family(next(self._numbers), template, job.call.limits)
        leaf = self._leaf(job.head.session, family)
        leaf.job, family.first = job, leaf
        self._families[family.number] = family
        self._leaves[leaf.id] = leaf
        self._loop.watch(family.control.fileno(), lambda _: self._hear_keeper(family))
        leaf.expect(orders.ANSWER_EXISTS, lambda _, pid: self._meet(leaf, pid))
        self._loop.at(time.monotonic() + self._patience, lambda: self._check_begun(leaf))
        if not self._sweeping:
            self._sweeping = True
            self._loop.at(time.monotonic() + _SWEEP_SECONDS, self._sweep)
        try:
            family.found(leaf)
        except OSError:
            self._loop.at(time.monotonic(), lambda: self._lose(family))

    def _check_begun(self, leaf: Leaf) -> None:
        if not leaf.last_used:
            self._lose(leaf.family)

    def start(self, job: CellJob, leaf: Leaf) -> None:
        """Have a resting session run the cell."""
        leaf.job = job
        leaf.resting = False
        self._prepare(leaf)

    def _prepare(self, leaf: Leaf) -> None:
        """Make the copy that a cell asks for, then begin it."""
        if leaf.job is not None and leaf.job.head.checkpoint:
            self._copy(leaf, _SPARE, lambda spare: self._begin(leaf, spare))
        else:
            self._begin(leaf, None)

    def _begin(self, leaf: Leaf, spare: Leaf | None) -> None:
        job = leaf.job
        if not leaf.alive or job is None:
            return
        leaf.spare = spare
        if spare is not None:
            spare.resting = False
        leaf.resting = leaf.measured = False
        leaf.last_used = time.monotonic()
        job.begin(leaf, self._work)
        leaf.expect(orders.ANSWER_OVER, lambda answer, _: self._hear_over(leaf, answer))
        content = job.call.files + job.call.code
        in_memory = len(content) > orders.PACKET_LIMIT
        head = orders.ORDER_CELL + orders.CELL.pack(job.call.echo, in_memory, len(job.call.files))
        if in_memory:
            memory = sealed_memory("cell", content)
            leaf.order(head, (memory,))
            os.close(memory)
        else:
            leaf.order(head + content)
        self._on_begin(job)
        if job.kill_reason is not None:
            leaf.kill()

    def _hear_over(self, leaf: Leaf, answer: bytes) -> None:
        leaf.halt()
        job = leaf.job
        if job is None or job.kill_reason is not None or len(answer) != 1:
            leaf.kill()  # its end will be reported
            return
        assert job.stdout is not None and job.stderr is not None
        job.stdout.drain()
        job.stderr.drain()
        if job.output_exceeded():
            job.kill(Outcome.OUTPUT_LIMIT)
            return
        report = job.over(answer[0])
        if leaf.spare is not None:
            leaf.spare.kill()
            self._leaving.add(leaf.spare)
        leaf.job = leaf.spare = None
        leaf.last_used = time.monotonic()
        leaf.resting, leaf.awaited = True, job.head.followed
        self._on_end(job, report)

    # Births

    def _leaf(self, id: int, family: Family) -> Leaf:
        leaf = Leaf(id, family)
        self._loop.watch(leaf.control.fileno(), lambda _: self._hear(leaf))
        return leaf

    def _hear(self, leaf: Leaf) -> None:
        control = leaf.control.fileno()
        if leaf.hear():
            return
        self._loop.forget(control)
        if leaf.pid:
            return
        if leaf.copying is not None:
            leaf.copying.hear_nobody()
        else:  # it ended before it could say who it is
            if leaf.job is not None:
                leaf.job.fault = os.read(leaf.stderr, 1000)  # written by our own set-up
            self._lose(leaf.family)

    def _meet(self, leaf: Leaf, pid: int) -> None:
        """The first leaf of a family exists; its keeper's birth may not have been heard of yet."""
        family = leaf.family
        if family.pid == 0:
            family.claim = lambda: self._meet(leaf, pid)
        elif leaf.identify(pid):
            family.furnish(leaf, None, lambda refusal: self._invite(leaf, refusal))
        else:
            self._lose(family)

    def _invite(self, leaf: Leaf, refusal: str) -> None:
        if refusal:
            if leaf.job is not None:
                leaf.job.fault = refusal.encode()
            self._lose(leaf.family)
            return
        leaf.expect(orders.ANSWER_ENTERED, lambda _, __: self._prepare(leaf))
        leaf.order(orders.ORDER_ENTER)

    def hear_template(self, answer: bytes, fds: list[int]) -> None:
        """A keeper was born, or is dead."""
        (number,) = orders.BORN.unpack_from(answer, 1)
        family = self._families.get(number)
        if answer[:1] != orders.ANSWER_BORN:
            if family is not None:
                self._lose(family)
            dead = self._dying.pop(number, None)
            if dead is not None:
                dead.template.residents.discard(dead.pid)
                dead.tell_end()
        elif family is None:
            os.close(fds[0])
        else:
            family.pidfd, family.pid = fds[0], pid_of(fds[0])
            family.template.residents.add(family.pid)
            if family.claim is not None:
                family.claim()

    # Copies

    def fork(self, session: int, copies: list[int], forked: Callable[[list[int]], None]) -> None:
        """Make copies of a session, one after the other; ``forked`` gets the ids of those that live."""
        leaf = self.resting(session)
        living: list[int] = []
        if leaf is not None:
            leaf.awaited = False

        def go_on() -> None:
            # The copies beyond what there is room for are made when they are used.
            if leaf is None or not leaf.resting or len(living) == len(copies) or self._lacking > 0:
                forked(living)
                self._on_change()
            else:
                leaf.resting, leaf.last_used = False, time.monotonic()
                self._copy(leaf, copies[len(living)], made)

        def made(copy: Leaf | None) -> None:
            if copy is None:  # and so it would be with the next one
                forked(living)
                self._on_change()
            else:
                copy.last_used = time.monotonic()
                copy.memory_kib, copy.measured = _UNTOUCHED_KIB, True
                self._leaves[copy.id] = copy
                living.append(copy.id)
                go_on()

        go_on()

    def _copy(self, leaf: Leaf, id: int, finished: Callable[[Leaf | None], None]) -> None:
        copy = self._leaf(id, leaf.family)

        def end(made: Leaf | None) -> None:
            del self._copying[leaf]
            if made is None and copy.pid == 0:
                self._release(copy)
                if copying.at_large and leaf.family.alive and not leaf.family.kill_strangers():
                    self._lose(leaf.family)
            finished(made)

        self._copying[leaf] = copying = Copying(self._loop, self._work, leaf, copy, end)

    def weigh(self, template: Template, request: Request) -> None:
        """A process asks the kernel for a copy of itself, which only one that was told to may have."""
        process = inspection.process_of(request.thread)
        for leaf, copying in self._copying.items():
            if leaf.pid == process and copying.grant():
                release_request(template.listener, request)
                return
        refuse_request(template.listener, request)

    # Deaths

    def end(self, session: int, ended: Callable[[], None]) -> None:
        """A session is over; ``ended`` is called when nothing is left of it."""
        leaf = self._leaves.pop(session, None)
        self._put_out.discard(session)
        if leaf is None:
            ended()
        else:
            leaf.ended = ended
            self._leaving.add(leaf)
            leaf.kill()

    def _hear_keeper(self, family: Family) -> None:
        try:
            answer, _ = orders.receive_packet(family.control, wait=False)
        except BlockingIOError:  # no news after all
            return
        if answer[:1] == orders.ORDER_DIRECTORY:
            family.heard_furnished(answer[1:].decode())
        elif answer[:1] == orders.ANSWER_DIED:
            inner, status, user, system, rss = orders.EXITED.unpack_from(answer, 1)
            leaf = family.leaves.get(inner)
            if leaf is not None:
                self._bury(leaf, status, user + system, rss)
        else:
            for leaf in family.leaves.values():
                if leaf.job is not None:
                    leaf.job.fault = answer[1:] or leaf.job.fault
            self._lose(family)

    def _bury(self, leaf: Leaf, status: int, cpu_seconds: float, rss_kib: int) -> None:
        family, job, spare = leaf.family, leaf.job, leaf.spare
        report = job.died(status, cpu_seconds, rss_kib) if job is not None and job.stdout is not None else None
        leaf.job = leaf.spare = None
        self._release(leaf)
        if spare is not None and spare.alive and leaf.id in self._leaves:
            spare.id, spare.last_used, spare.resting = leaf.id, time.monotonic(), True
            self._leaves[leaf.id] = spare
        else:
            if self._leaves.get(leaf.id) is leaf:
                del self._leaves[leaf.id]
            if spare is not None:
                spare.kill()
        if leaf.copying is not None:
            leaf.copying.give_up()
        if leaf.ended is not None:
            family.endings.append(leaf.ended)
        if not family.leaves and family.alive:
            self._lose(family)
        elif family.alive:
            family.tell_end()
        if report is not None:
            self._on_end(job, report)
        elif job is not None:
            self._on_lost(job)
        self._on_change()

    def _release(self, leaf: Leaf) -> None:
        for fd in (leaf.control.fileno(), leaf.stdout, leaf.stderr):
            self._loop.forget(fd)
        leaf.release()
        self._leaving.discard(leaf)

    def _lose(self, family: Family) -> None:
        """A family is over: end what is left of it."""
        if not family.alive:
            return
        for leaf in self._drop(family):
            if leaf.job is not None:
                self._on_lost(leaf.job)
        self._on_change()

    def lose_template(self, template: Template) -> None:
        """A template is dead, and its families with it; their cells are given back with its other jobs."""
        for family in [family for family in self._families.values() if family.template is template]:
            self._drop(family)
        for family in [family for family in self._dying.values() if family.template is template]:
            del self._dying[family.number]
            family.tell_end()

    def _drop(self, family: Family) -> list[Leaf]:
        """Forget a family; returns its leaves, those included of which there is no process yet."""
        self._families.pop(family.number, None)
        unborn = [family.first] if family.first is not None and family.first.pid == 0 else []
        leaves = [*family.leaves.values(), *unborn]
        for leaf in leaves:
            if self._leaves.get(leaf.id) is leaf:
                del self._leaves[leaf.id]
            self._release(leaf)
            if leaf.ended is not None:
                family.endings.append(leaf.ended)
        self._loop.forget(family.control.fileno())
        family.drop()
        if family.pid and family.template.alive:
            self._dying[family.number] = family  # a resident of its template until that says that it is dead
        else:
            family.tell_end()
        for leaf in leaves:
            if leaf.copying is not None:
                leaf.copying.give_up()
        return leaves

    # Room

    @property
    def _lacking(self) -> int:
        """How many processes there are too many for one more."""
        return len(self._leaves) + len(self._leaving) + len(self._copying) + 1 - self._most

    def make_room(self) -> bool:
        """Whether one more session can be opened now; otherwise others are put out, whose ends will be told."""
        lacking = self._lacking
        if lacking > len(self._leaving):
            for leaf in self._evictable()[: lacking - len(self._leaving)]:
                self._evict(leaf)
        return lacking <= 0

    @property
    def may_copy(self) -> bool:
        """Whether a cell may have a copy that stands by; otherwise so many are ending that it had better wait."""
        return len(self._leaving) < max(self._spared, 1)

    def _evictable(self) -> list[Leaf]:
        """Resting sessions, those to be put out first: unused for longest, and last those rebuilt last."""
        resting = sorted((leaf for leaf in self._leaves.values() if leaf.resting), key=lambda leaf: leaf.last_used)
        awaited = [leaf for leaf in resting if leaf.awaited]
        return [*(leaf for leaf in resting if not leaf.awaited), *reversed(awaited[self._spared :])]

    def _evict(self, leaf: Leaf) -> None:
        self.end(leaf.id, lambda: None)
        self._put_out.add(leaf.id)

    def _sweep(self) -> None:
        """Measure what was used since the last time, and put out those unused for longest while all is too much."""
        now = time.monotonic()
        used = [leaf for leaf in self._leaves.values() if leaf.resting and not leaf.measured]
        for leaf in used[:_MEASURED_AT_ONCE]:
            leaf.memory_kib, leaf.measured = inspection.memory_kib(leaf.pid, self._work), True
            if not leaf.family.memory_kib:
                leaf.family.memory_kib = inspection.memory_kib(leaf.family.pid, self._work)
        total = sum(one.memory_kib for one in (*self._leaves.values(), *self._families.values()))
        for leaf in self._evictable() if total > self._memory_kib else ():
            if total <= self._memory_kib:
                break
            total -= leaf.memory_kib
            self._evict(leaf)
        for leaf in list(self._leaves.values()):
            if leaf.job is None or leaf.job.kill_reason is None:
                leaf.doomed = 0.0
            elif not leaf.doomed:
                leaf.doomed = now
            elif now - leaf.doomed > self._patience:
                self._lose(leaf.family)  # its keeper does not report
        self._sweeping = bool(self._leaves)
        if self._sweeping:
            pause = _SWEEP_SECONDS if len(used) <= _MEASURED_AT_ONCE else _SWEEP_SECONDS / 10
            self._loop.at(now + pause, self._sweep)

"""The trusted process between pool and jail: which call runs where and when, how long, and how it ended.

Slots, not submitted calls, decide what runs. A call that outlives a moment moves to the slow lane, at lower
priority, so that short calls need not wait for long ones. Calls that met a fault of ours are tried again on another
template; a session's cells are given back, since the pool has what its process must be rebuilt from.
"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import sys
import time
from collections import Counter, deque
from typing import Any

from jaxrl.sandbox import descriptors, orders, syscalls
from jaxrl.sandbox.annex import Annex
from jaxrl.sandbox.board import Board
from jaxrl.sandbox.cell_job import CellJob
from jaxrl.sandbox.cgroups import CgroupsUnavailable
from jaxrl.sandbox.families import Families
from jaxrl.sandbox.fleet import Fleet, Settings, Template, reap, resident_kib
from jaxrl.sandbox.job import Capture, Job, sealed_memory
from jaxrl.sandbox.leaves import Leaf
from jaxrl.sandbox.loop import Loop
from jaxrl.sandbox.protocol import (
    ATTEMPTS,
    READ_BYTES,
    Call,
    CellHead,
    FrameReader,
    Kind,
    Limits,
    Outcome,
    Report,
    frame,
    pack_ids,
    unpack_ids,
)
from jaxrl.sandbox.turns import Turns

_DEATHS_TO_QUARANTINE = 2  # a call that was there when so many templates died runs alone
_FAST_SECONDS = 0.25  # a call that runs longer moves to the slow lane
_SLOW_NICENESS = 10  # added in the slow lane: about a tenth of a core that the trainer wants too
_COLLECT_SECONDS = 0.01  # a call that runs longer has its output read as it comes
_CHECK_SECONDS = 0.02  # shortest time between two looks at a running call
_MAY_RAISE_PRIORITY = os.geteuid() == 0
_CORES = os.cpu_count() or 1
_SELF_TEST = 1 << 63  # plus a template's number: the id of the call that shows whether it works


class Warden:
    """Serves one pool until its socket closes.

    Args:
        channel: socket to the pool.
        memory: descriptor of the board's memory.
    """

    def __init__(self, channel: socket.socket, memory: int) -> None:
        self._loop = Loop()
        self._channel = channel
        self._memory = memory
        self._board: Board | None = None
        self._scratch = ""  # folder of the calls' directories where there is no jail
        channel.setblocking(False)
        self._frames = FrameReader()
        self._room = memoryview(bytearray(READ_BYTES))
        self._outgoing = bytearray()
        self._blocked = False  # the pool does not take what is outgoing
        self._fleet: Fleet | None = None
        self._annex: Annex | None = None
        self._annex_refusal = b""  # why calls that may start processes cannot be had
        self._mentions: re.Pattern[bytes] | None = None  # of a preloaded module, in a call's text
        self._waiting = Turns()
        self._quarantine: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, tuple[Job, Template]] = {}
        self._fast = self._slow = 0
        self._collecting = False  # the timer of _watch_outputs is set
        self._loop.watch(channel.fileno(), self._serve_pool)

    def run(self) -> None:
        self._loop.run()
        for fleet in self._fleets():
            fleet.close()
        reap(wait_seconds=5.0)
        if self._annex is not None:
            self._annex.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)  # the pool's process may have been killed
        self._channel.setblocking(True)
        with contextlib.suppress(OSError):  # the pool is gone
            self._channel.sendall(self._outgoing)

    def _fleets(self) -> list[Fleet]:
        annex = None if self._annex is None else self._annex.fleet
        return [fleet for fleet in (self._fleet, annex) if fleet is not None]

    # The pool's side

    def _serve_pool(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if not events & ~select.EPOLLOUT:
            return
        try:
            length = self._channel.recv_into(self._room)
        except BlockingIOError:
            return
        except OSError:
            length = 0
        if not length:
            self._loop.stop()
            return
        for kind, body in self._frames.feed(self._room[:length]):
            if kind is Kind.SUBMIT:
                self._submit(Call.unpack(body))
            elif kind is Kind.CELL:
                self._submit_cell(body)
            elif kind is Kind.FORK:
                self._fork(*unpack_ids(body))
            elif kind is Kind.END:
                self._end(*unpack_ids(body))
            elif kind is Kind.CANCEL:
                self._cancel(int.from_bytes(body, "little"))
            elif kind is Kind.SETUP:
                self._set_up(Settings(**json.loads(body)))
            elif kind is Kind.PING:
                self._send(frame(Kind.PONG))
            elif kind is Kind.STATS:
                self._send(frame(Kind.STATS, json.dumps(self._stats()).encode()))
            elif kind is Kind.CLOSE:
                self._loop.stop()
        self._dispatch()

    def _stats(self) -> dict[str, Any]:
        """The fields of ``metrics.WardenMetrics``."""
        templates = [template for fleet in self._fleets() for template in fleet.templates if template.ready]
        return {
            "waiting": len(self._jobs) - len(self._running),
            "oldest_submitted": self._waiting.oldest(),
            "running": len(self._running),
            "rss_kib": resident_kib(os.getpid()),
            "template_rss_kib": [resident_kib(template.pid) for template in templates],
            "sessions": self._families.count,
            "template_restarts": sum((fleet.restarts for fleet in self._fleets()), Counter()),
        }

    def _set_up(self, settings: Settings) -> None:
        self._settings = settings
        self._board = Board(self._memory, settings.slots + settings.slow_slots)
        os.close(self._memory)
        if settings.unsafe:
            self._scratch = settings.view["work"]
            os.makedirs(self._scratch, mode=0o700, exist_ok=True)  # the warden before this one may have removed it
        if settings.preload:
            names = "|".join(re.escape(name.partition(".")[0]) for name in settings.preload)
            self._mentions = re.compile(rf"\b({names})\b".encode())
        self._fleet = Fleet(
            self._loop,
            settings,
            on_ready=lambda: self._send(frame(Kind.READY)),
            on_change=self._dispatch,
            on_lost=self._give_back,
            on_message=self._hear,
            on_copy=lambda template, request: self._families.weigh(template, request),
            on_failure=self._fail,
        )
        self._families = Families(
            self._loop,
            settings.view["work"],
            settings.session_memory_mib,
            most=descriptors.sessions(settings.templates, settings.slots + settings.slow_slots),
            spared=settings.slots,
            patience_seconds=settings.heartbeat_seconds,
            on_begin=self._watch,
            on_end=self._finish,
            on_lost=self._lose_cell,
            on_change=self._dispatch,
        )
        self._fleet.start()

    def _fail(self, text: str) -> None:
        self._send(frame(Kind.UNAVAILABLE, text.encode()))
        self._loop.stop()

    def _send(self, data: bytes) -> None:
        """Frames of one round of the event loop leave in one write."""
        if not self._outgoing:
            self._loop.afterwards(self._flush)
        self._outgoing += data

    def _flush(self) -> None:
        try:
            while self._outgoing:
                sent = self._channel.send(memoryview(self._outgoing)[:READ_BYTES])
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._loop.stop()
            return
        if self._blocked != bool(self._outgoing):
            self._blocked = not self._blocked
            events = select.EPOLLIN | (select.EPOLLOUT if self._blocked else 0)
            self._loop.watch(self._channel.fileno(), self._serve_pool, events)

    def _report(self, job: Job, report: Report) -> None:
        if not job.done:
            job.done = True
            del self._jobs[job.call.id]
            self._send(frame(Kind.REPORT, report.pack()))

    # Waiting and starting

    def _submit(self, call: Call) -> None:
        job = Job(call, full=self._mentions is not None and self._mentions.search(call.code) is not None)
        self._jobs[call.id] = job
        self._waiting.add(job)
        if call.processes:
            self._open_annex()

    def _open_annex(self) -> None:
        if self._annex_refusal:
            self._refuse_processes(self._annex_refusal.decode())
        elif self._annex is None:
            try:
                self._annex = Annex(
                    self._loop,
                    self._settings,
                    on_change=self._dispatch,
                    on_lost=self._give_back,
                    on_message=self._hear,
                    on_failure=self._refuse_processes,
                )
            except (OSError, CgroupsUnavailable) as error:
                self._refuse_processes(str(error))

    def _refuse_processes(self, text: str) -> None:
        """No jail for such calls can be had; those that ask for it are told, the others go on."""
        self._annex_refusal = text.encode()
        for job in list(self._jobs.values()):
            if job.call.processes and job.call.id not in self._running:
                job.fault = self._annex_refusal
                self._report(job, job.unfinished(Outcome.INFRA_ERROR))

    def _submit_cell(self, body: bytes) -> None:
        head, packed = CellHead.unpack(body)
        job = CellJob(head, Call.unpack(packed), full=self._mentions is not None)
        self._jobs[job.call.id] = job
        self._waiting.add(job)

    def _fork(self, question: int, session: int, *copies: int) -> None:
        self._families.fork(
            session, list(copies), lambda living: self._send(frame(Kind.DONE, pack_ids([question, *living])))
        )

    def _end(self, question: int, session: int) -> None:
        self._families.end(session, lambda: self._send(frame(Kind.DONE, pack_ids([question]))))

    def _cancel(self, id: int) -> None:
        job = self._jobs.get(id)
        if job is None:
            return
        if id in self._running:
            job.kill(Outcome.CANCELLED)
        else:
            self._report(job, job.unfinished(Outcome.CANCELLED))  # skipped when its turn comes

    def _dispatch(self) -> None:
        """Fill the free slots, tenants in turn, with calls whose kind of template is ready."""
        while self._fast < self._settings.slots and (self._waiting or self._quarantine):
            chosen = self._next()
            if chosen is None:
                return
            self._start(*chosen)

    def _next(self) -> tuple[Job, Template | Leaf] | None:
        while self._quarantine and self._quarantine[0].done:
            self._quarantine.popleft()
        if self._quarantine:
            template = None if self._running else self._choose(self._quarantine[0])
            return None if template is None else (self._quarantine.popleft(), template)
        if any(job.template_deaths >= _DEATHS_TO_QUARANTINE for job, _ in self._running.values()):
            return None
        return self._waiting.take(self._place)

    def _place(self, job: Job) -> Template | Leaf | None:
        """Where a job can run now: on a template, or in its session's process."""
        if not isinstance(job, CellJob):
            return self._choose(job)
        if job.head.fresh:
            template = self._choose(job)
            return template if template is not None and self._families.make_room() else None
        if self._families.was_put_out(job.head.session):
            job.fault = b"its session's process was put out; Pool(session_memory_mib=...) or ulimit -Hn allows more"
            self._report(job, job.unfinished(Outcome.PUT_OUT))
        elif not self._families.has(job.head.session):
            job.fault = b"its session's process was lost while it waited"
            self._report(job, job.unfinished(Outcome.LOST))
        elif job.head.checkpoint and not self._families.may_copy:
            return None
        return self._families.resting(job.head.session)

    def _choose(self, job: Job) -> Template | None:
        if job.call.processes:
            return None if self._annex is None else self._annex.fleet.choose(full=False, avoid=job.lost_on)
        assert self._fleet is not None
        return self._fleet.choose(job.full, job.lost_on)

    def _start(self, job: Job, place: Template | Leaf) -> None:
        template = place.family.template if isinstance(place, Leaf) else place
        try:
            doors = self._annex.admit(job) if job.call.processes and self._annex is not None else ()
        except OSError as error:
            self._annex.release(job)
            job.attempts += 1
            job.fault = f"no control group could be had: {error}".encode()
            self._retry(job, template)
            return
        self._running[job.call.id] = (job, template)
        assert self._board is not None
        job.place = self._board.enter(job.call.id)
        template.jobs[job.call.id] = job
        self._fast += 1
        job.fast = True
        job.address_space = template.address_space + (job.call.limits.memory_mib << 20)
        if job.group is not None:
            job.address_space = 0  # bounded together with the others, not by itself
        if not isinstance(job, CellJob):
            self._start_call(job, template, doors)
        elif isinstance(place, Leaf):
            self._families.start(job, place)
        else:
            self._families.open(job, place)

    def _start_call(self, job: Job, template: Template, doors: tuple[int, ...]) -> None:
        ends = (*job.open(), *doors)
        packed = job.call.pack()
        in_memory = len(packed) > orders.PACKET_LIMIT
        head = orders.CALL_HEAD.pack(job.call.id, job.address_space, in_memory)
        if in_memory:
            ends = (*ends, sealed_memory("call", packed))
            packed = b""
        self._collect_soon()
        try:
            template.outgoing.send(orders.ORDER_CALL + head + packed, ends)
        except OSError:
            self._loop.at(time.monotonic(), lambda: self._fleet_of(job).lose(template, "died"))

    def _fleet_of(self, job: Job) -> Fleet:
        fleet = self._annex.fleet if job.call.processes and self._annex is not None else self._fleet
        assert fleet is not None
        return fleet

    # Running

    def _watch_streams(self, job: Job) -> None:
        assert job.stdout is not None and job.stderr is not None
        job.watched = True
        for stream in (job.stdout, job.stderr):
            self._loop.watch(stream.fd, lambda _, stream=stream: self._collect(job, stream))

    def _watch(self, job: Job) -> None:
        """A session's process is about to run a cell."""
        self._collect_soon()
        self._watch_time(job)

    def _watch_time(self, job: Job) -> None:
        attempt = job.attempts
        self._loop.at(job.born + min(_FAST_SECONDS, *self._limits(job)), lambda: self._check(job, attempt))

    def _hear(self, template: Template, answer: bytes, fds: list[int]) -> None:
        if orders.FIRST_FAMILY <= orders.BORN.unpack_from(answer, 1)[0] < _SELF_TEST:
            self._families.hear_template(answer, fds)
        elif answer[:1] == orders.ANSWER_BORN:
            (id,) = orders.BORN.unpack_from(answer, 1)
            job = template.jobs[id]
            job.pidfd, job.born = fds[0], time.monotonic()
            if job.kill_reason is not None:
                job.kill(job.kill_reason)
            self._fleet.born(template)
            self._watch_time(job)
        else:
            id, status, user, system, rss = orders.DIED.unpack_from(answer, 1)
            job = template.jobs.pop(id)
            self._end_attempt(job)
            report = job.verdict(status, user + system, rss, template.rss_kib)
            self._close(job)
            self._fleet_of(job).ended(template)
            if id & _SELF_TEST:
                self._judge(template, report)
            elif report is None:
                self._retry(job, template)
                if not job.call.processes:
                    self._try(template)
            else:
                self._report(job, report)
            self._dispatch()

    def _try(self, template: Template) -> None:
        """A call did not start on this template: does any?"""
        if template.alive and not template.on_trial:
            template.on_trial = True
            now = time.monotonic()
            call = Call(_SELF_TEST | template.number, b"6 * 7", b"", True, Limits(wall_seconds=60.0), now)
            job = Job(call, full=template.full)
            self._jobs[call.id] = job
            self._start(job, template)

    def _judge(self, template: Template, report: Report | None) -> None:
        del self._jobs[_SELF_TEST | template.number]
        template.on_trial = False
        if report is None or report.stdout != b"42\n":
            assert self._fleet is not None
            self._fleet.lose(template, "failed its self-test")

    def _limits(self, job: Job) -> tuple[float, float]:
        return job.call.limits.cpu_seconds, job.call.limits.wall_seconds

    def _check(self, job: Job, attempt: int) -> None:
        """Look at a call that may have used up its time, or may have to leave the fast lane."""
        if job.attempts != attempt or job.call.id not in self._running or job.kill_reason is not None:
            return
        now = time.monotonic()
        cpu_limit, wall_limit = self._limits(job)
        cpu = job.cpu_seconds()
        if cpu >= cpu_limit:
            job.kill(Outcome.TIMEOUT)
            return
        deadline = job.born + wall_limit
        if now >= deadline:
            deadline = job.wall_deadline()
            if now >= deadline:
                job.kill(Outcome.TIMEOUT)
                return
        cores = min(job.call.limits.processes, _CORES) if job.call.processes else 1  # that it may keep busy at once
        upcoming = min(deadline, now + (cpu_limit - cpu) / cores)
        if job.fast:
            if now - job.born >= _FAST_SECONDS and self._slow < self._settings.slow_slots:
                self._demote(job)
            else:
                upcoming = min(upcoming, max(job.born, now) + _FAST_SECONDS)
        self._loop.at(max(upcoming, now + _CHECK_SECONDS), lambda: self._check(job, attempt))

    def _demote(self, job: Job) -> None:
        job.fast = False
        self._fast -= 1
        self._slow += 1
        if _MAY_RAISE_PRIORITY or not isinstance(job, CellJob):  # a session must get its own back
            for pid in job.processes():
                with contextlib.suppress(OSError):  # already dead
                    niceness = os.getpriority(os.PRIO_PROCESS, pid) + _SLOW_NICENESS
                    os.setpriority(os.PRIO_PROCESS, pid, min(niceness, 19))
        self._dispatch()

    def _collect_soon(self) -> None:
        if not self._collecting:
            self._collecting = True
            self._loop.at(time.monotonic() + _COLLECT_SECONDS, self._watch_outputs)

    def _watch_outputs(self) -> None:
        """Begin to read what running calls print. One that ends sooner fits its output into the pipes, most often."""
        self._collecting = False
        for job, _ in self._running.values():
            if not job.watched and job.stdout is not None:
                self._watch_streams(job)
                job.lasts()

    def _collect(self, job: Job, stream: Capture) -> None:
        if not stream.read():
            self._loop.forget(stream.fd)  # closed by the snippet; its end is reported separately
        elif job.kill_reason is None and job.output_exceeded():
            job.kill(Outcome.OUTPUT_LIMIT)

    # Ending

    def _end_attempt(self, job: Job) -> None:
        del self._running[job.call.id]
        assert self._board is not None
        self._board.leave(job.place)
        if job.fast:
            self._fast -= 1
        else:
            self._slow -= 1
        for stream in (job.stdout, job.stderr):
            if stream is not None:
                self._loop.forget(stream.fd)

    def _finish(self, job: CellJob, report: Report) -> None:
        """A cell came to its end."""
        self._leave(job)
        if report.survived and not job.fast and _MAY_RAISE_PRIORITY:
            with contextlib.suppress(OSError):  # dead since it spoke, or this root has no right to raise priorities
                os.setpriority(os.PRIO_PROCESS, job.pid, os.getpriority(os.PRIO_PROCESS, 0))
        self._report(job, report)
        self._dispatch()

    def _lose_cell(self, job: CellJob) -> None:
        """A cell's process is gone by a fault of ours; the pool, which has the session's history, sees to the rest."""
        self._leave(job)
        self._report(job, job.unfinished(Outcome.LOST))

    def _leave(self, job: CellJob) -> None:
        _, template = self._running[job.call.id]
        template.jobs.pop(job.call.id, None)
        self._end_attempt(job)
        job.close()

    def _close(self, job: Job) -> None:
        job.close()
        if self._annex is not None:
            self._annex.release(job)

    def _give_back(self, template: Template, jobs: list[Job]) -> None:
        """The calls of a lost template: each is tried again elsewhere."""
        self._families.lose_template(template)
        for job in jobs:
            self._end_attempt(job)
            self._close(job)
            if job.call.id & _SELF_TEST:
                del self._jobs[job.call.id]
                continue
            job.template_deaths += 1
            self._retry(job, template)
        self._dispatch()

    def _retry(self, job: Job, template: Template) -> None:
        job.lost_on = template.number
        if job.kill_reason is Outcome.CANCELLED:
            self._report(job, job.unfinished(Outcome.CANCELLED))
        elif isinstance(job, CellJob):
            self._report(job, job.unfinished(Outcome.LOST))
        elif job.attempts >= ATTEMPTS:
            self._report(job, job.unfinished(Outcome.INFRA_ERROR))
        elif job.template_deaths >= _DEATHS_TO_QUARANTINE:
            self._quarantine.append(job)
        else:
            self._waiting.add(job, first=True)


def main() -> None:
    """Entry point of the warden's process; arguments: its socket to the pool, a folder, the board's memory."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # the jail's first process falls to us when its launcher leaves
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # live sessions hold several each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the pool's to handle; it closes the socket
    Warden(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[3])).run()

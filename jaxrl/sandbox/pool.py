"""The sandbox's front: an asynchronous pool of jailed interpreters.

Safe to start in a process that already runs threads or jax: helpers are fresh interpreters, never forks of this one.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from jaxrl.sandbox import cgroups, jail, languages, pool_arguments
from jaxrl.sandbox import files as file_bytes
from jaxrl.sandbox.admission import Admission, Starts, UnderWay, check_loop
from jaxrl.sandbox.builds import Builds
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.link import WardenLink, WardenLost
from jaxrl.sandbox.metrics import Metrics, Recorder, WardenMetrics
from jaxrl.sandbox.pool_settings import PoolSettings
from jaxrl.sandbox.protocol import ATTEMPTS, VAIN_LOSSES, Call, CellHead, Limits, Outcome, Report
from jaxrl.sandbox.result import Result, result_of
from jaxrl.sandbox.session import Backend, Session, Terms
from jaxrl.statuses import ToolStatus

_PROGRAMS_KEPT = 64 << 20  # bytes of compiled programs


class Pool:
    """Runs snippets, each in its own fork of a warm, jailed interpreter; those in other languages become its program.

    Args:
        limits: what one call may use, unless ``run`` is given others; None takes the defaults of ``Limits``.
        workers: template processes, of each kind (bare, and with the modules of ``preload``).
        slots: calls that run at once.
        slow_slots: further calls that may run on, at lower priority, once they have lasted a quarter second.
            Memory needed at worst: (slots + slow_slots) x (memory_mib + disk_mib).
        queue: calls that may wait beyond those; then ``run`` waits before submitting.
        preload: modules that calls which mention them find already imported.
        unsafe: no isolation at all, named in every result.
        heartbeat_seconds: a template that is silent for so long is replaced.
        processes_without_cgroup: let calls start processes also where no memory cgroup can be had. Each process is then
            bounded by ``memory_mib``, all of a call together are not; named in their results.
        program_folders: further folders of the host, by absolute path, that such calls can read and run programs in,
            for languages of the caller's own. Whatever lies there can be read by the code.
        recycle_calls: a template that has run so many calls is replaced, without hurting those it still runs.
        recycle_growth_mib: and one whose own memory has grown by so much.
        session_memory_mib: for live sessions together, beyond what their templates share with them; sessions that were
            not used for longest are put out, and rebuilt when they are used again.

    Raises:
        SandboxUnavailable (on entering): the machine refuses a layer of the jail; names it and the remedy.
        ValueError: a number is out of range, a module of ``preload`` or a folder of ``program_folders`` is not there,
            or such a folder would show code what it must not see.
        TypeError: an argument is of a wrong kind.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int = 2,
        slots: int = 4,
        slow_slots: int = 8,
        queue: int = 4096,
        preload: tuple[str, ...] = ("numpy", "scipy", "sympy"),
        unsafe: bool = False,
        heartbeat_seconds: float = 8.0,
        processes_without_cgroup: bool = False,
        program_folders: tuple[str, ...] = (),
        recycle_calls: int = 100_000,
        recycle_growth_mib: int = 64,
        session_memory_mib: int = 4096,
    ) -> None:
        settings = PoolSettings(
            limits=Limits() if limits is None else limits,
            workers=workers,
            slots=slots,
            slow_slots=slow_slots,
            queue=queue,
            preload=preload,
            unsafe=unsafe,
            heartbeat_seconds=heartbeat_seconds,
            processes_without_cgroup=processes_without_cgroup,
            program_folders=program_folders,
            recycle_calls=recycle_calls,
            recycle_growth_mib=recycle_growth_mib,
            session_memory_mib=session_memory_mib,
        )
        settings.check_machine()
        self.limits = settings.limits
        self.most: Limits | None = None
        self.isolation = jail.UNSAFE if unsafe else jail.JAILED
        self._unsafe = unsafe
        self._processes_without_cgroup = processes_without_cgroup
        self._isolation_of_processes = ""  # "" until a call has asked for it
        self._builds: Builds[Result] = Builds(_PROGRAMS_KEPT, _weight)
        self._scratch = ""  # folder of the calls' directories where there is no jail
        self._settings = _views(preload, program_folders) | settings.of_warden()
        self._admission = Admission(settings.running + queue)
        self._ids = itertools.count(1)
        self._link: WardenLink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # in which the pool was started, and not closed yet
        self._starts = Starts()
        self._starting = asyncio.Lock()  # of a warden
        self._open = False
        self._draining = False
        self._under_way = UnderWay()  # calls, cells and forks that were taken, and what they are made of
        self._recorder = Recorder()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Build the jail and warm the templates (a second or two). Needed once, unless used as a context manager."""
        check_loop(self._loop)
        async with self._starts.turn():
            if not self._open:
                self._loop, self._starting = asyncio.get_running_loop(), asyncio.Lock()
                if self._unsafe:
                    # Without a jail nothing hides the calls' directories; at least they lie together, and go together.
                    self._scratch = tempfile.mkdtemp(prefix="jaxrl-unsafe-")
                    self._settings["view"]["work"] = self._settings["program_view"]["work"] = self._scratch
            self._open, self._draining = True, False
            try:
                await self._warden()
            except BaseException as error:
                await self._shut()
                if isinstance(error, WardenLost):
                    raise jail.SandboxUnavailable("the sandbox's warden process ended while starting") from error
                raise

    @property
    def warden_pid(self) -> int:
        """Process id of the trusted helper; everything of this pool runs below it. 0 while the pool is closed."""
        return self._link.process_id if self._link is not None else 0

    async def metrics(self) -> Metrics:
        """What the pool has done and is doing. What only the warden knows is zero while there is none."""
        warden = WardenMetrics()
        check_loop(self._loop)
        if self._link is not None:
            with contextlib.suppress(WardenLost):
                warden = await self._link.metrics()
        return self._recorder.snapshot(warden, *self._admission.waiting(), now=time.monotonic())

    async def drain(self) -> None:
        """Take no more calls, and wait until those under way are over. The next ``start`` opens the pool again."""
        check_loop(self._loop)
        self._draining = True
        await self._under_way.over()

    async def close(self) -> None:
        """Kill what still runs; its callers get a RuntimeError. Leaves no process, mount, descriptor or file."""
        check_loop(self._loop)
        self._starts.close()
        await self._shut()

    async def _shut(self) -> None:
        self._open = False
        async with self._starting:
            link, self._link = self._link, None
        self._loop = None
        if link is not None:
            await link.close()
        if self._isolation_of_processes and not self._unsafe:
            with contextlib.suppress(cgroups.CgroupsUnavailable):
                cgroups.sweep(cgroups.find())  # where a warden was killed
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = ""

    async def run(
        self,
        code: str,
        stdin: str | bytes = "",
        echo: bool = True,
        limits: Limits | None = None,
        tenant: str = "",
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
        language: str | Language = "python",
        processes: bool = False,
    ) -> Result:
        """Run a snippet to its end. Never raises for what the snippet does; cancelling this kills it.

        Args:
            code: source text.
            stdin: what the snippet reads from standard input; text as UTF-8.
            echo: print the repr of a trailing expression of Python, as a notebook does.
            limits: for this call alone.
            tenant: on whose behalf; waiting tenants take turns, each one's calls in their order.
            files: content by relative path, laid into the working directory before the code begins.
            wanted: patterns (``fnmatch``, relative paths) of files there to return when the code has ended, however.
            language: "python", a name of ``languages.LANGUAGES``, or a record of your own.
            processes: let Python start processes and programs; other languages always may.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: a file's path is not a plain relative one, or the files are larger than the directory; there
                is no such language; or ``limits`` are beyond those of this process.
            RuntimeError: the pool is not open, closed meanwhile, being drained, or of another event loop.
            SandboxUnavailable: the jail was lost and could not be built again; the language is not installed; or
                processes are to be started and there is no memory cgroup to bound them.
        """
        pool_arguments.check_call(code, stdin, echo, limits, tenant, files, wanted, language, processes)
        self._check_taking()
        limits = limits or self.limits
        given = files or {}
        self.check(limits, given, language, processes)
        source = code.encode("utf-8", "surrogatepass")
        if language == "python":
            # Made in passing: tens of thousands may wait here, each with what this frame holds.
            return await self._submit(self._call(source, stdin, limits, tenant, given, wanted, echo, processes))
        with self._under_way:
            return await self._run_program(language, source, stdin, limits, tenant, given, wanted)

    def check(
        self, limits: Limits, files: Mapping[str, bytes], language: str | Language = "python", processes: bool = False
    ) -> None:
        """Whether ``run`` would take a call, without running it.

        Raises:
            ValueError, SandboxUnavailable: as ``run`` does, but for a jail that was lost.
        """
        if limits is not self.limits:
            pool_arguments.check_host(limits)
        file_bytes.check(files, limits.disk_mib << 20)
        if language != "python":
            chosen = languages.named(language)
            taken = chosen.own_files & {name.partition("/")[0] for name in files}
            if taken:
                raise ValueError(f"files {sorted(taken)} have the names of the program's own; give them others")
        if processes or language != "python":
            self._check_processes()

    async def _run_program(
        self,
        language: str | Language,
        source: bytes,
        stdin: str | bytes,
        limits: Limits,
        tenant: str,
        given: Mapping[str, bytes],
        wanted: Sequence[str],
    ) -> Result:
        """A program of another language than Python, built first where it has to be."""
        chosen = languages.named(language)
        own = {chosen.source: source}
        if chosen.build:
            built = await self._builds.get((chosen, source), lambda: self._build(chosen, source, tenant))
            if built.status is not ToolStatus.OK:
                return built
            own = dict(built.files)
        call = self._call(b"", stdin, limits, tenant, given, wanted)
        result = await self._submit(self._with_program(call, chosen.run, own))
        kept = {name: data for name, data in result.files.items() if name not in chosen.own_files}
        return dataclasses.replace(result, files=kept)

    async def _build(self, language: Language, source: bytes, tenant: str) -> Result:
        """The compiled program, the one file of the result where that is ok."""
        call = self._call(b"", "", language.build_limits, tenant, {}, (language.program,))
        result = await self._submit(self._with_program(call, language.build, {language.source: source}))
        result = dataclasses.replace(result, stage="build")
        if result.status is not ToolStatus.OK:
            return dataclasses.replace(result, files={})
        if language.program in result.files:
            return result
        most = language.build_limits.files_mib
        text = f"{result.stderr}{language.build[0]} left no file {language.program!r} of at most files_mib={most}\n"
        return dataclasses.replace(result, status=ToolStatus.ERROR, stderr=text)

    def _call(
        self,
        code: bytes,
        stdin: str | bytes,
        limits: Limits,
        tenant: str,
        files: Mapping[str, bytes],
        wanted: Sequence[str],
        echo: bool = False,
        processes: bool = False,
    ) -> Call:
        return Call(
            id=next(self._ids),
            code=code,
            stdin=stdin if isinstance(stdin, bytes) else stdin.encode("utf-8", "surrogatepass"),
            echo=echo,
            limits=limits,
            submitted=time.monotonic(),
            tenant=zlib.crc32(tenant.encode()),
            files=file_bytes.pack(files),
            wanted="\n".join(wanted),
            processes=processes,
        )

    def _with_program(self, call: Call, words: tuple[str, ...], files: Mapping[str, bytes]) -> Call:
        """The call as one of a program that finds these files besides its own."""
        file_bytes.check(dict(file_bytes.unpack(call.files)) | dict(files), call.limits.disk_mib << 20)
        packed = call.files + file_bytes.pack(files)
        return call._replace(command=languages.command(words), files=packed, processes=True)

    def _check_processes(self) -> None:
        """Raise SandboxUnavailable where processes cannot be bounded, unless that was allowed."""
        if self._isolation_of_processes:
            return
        if self._unsafe:
            self._isolation_of_processes = self.isolation
            return
        try:
            words = f"processes in a memory cgroup (version {cgroups.find().version})"
        except cgroups.CgroupsUnavailable as error:
            if not self._processes_without_cgroup:
                raise jail.SandboxUnavailable(f"calls that may start processes are refused: {error}") from error
            words = "each process's memory bounded by itself, not all together"
        self._isolation_of_processes = f"{self.isolation}; {words}"

    def _check_taking(self) -> None:
        """Raise RuntimeError where no calls are taken now, or not here."""
        if not self._open:
            raise RuntimeError("the sandbox pool is not open: use it inside `async with Pool(...)`")
        check_loop(self._loop)
        if self._draining:
            raise RuntimeError("the sandbox pool is being drained and takes no more calls: start it again, or another")

    def session(
        self, *, limits: Limits | None = None, tenant: str = "", checkpoint: bool = False, live: bool = True
    ) -> Session:
        """A notebook: cells that share their state, in a process of their own. Costs nothing before its first cell.

        Args:
            limits: time and output for every cell; memory, disk, threads and files for the session.
            tenant: as for ``run``.
            checkpoint: copy the process before every cell (some milliseconds), so that a cell that is killed costs
                nothing but itself; otherwise the earlier cells are run again before the next.
            live: False keeps no process: each cell runs in a fresh one after all earlier cells, silently run again,
                which count towards the same limits. Without a jail every session is of this kind.

        Raises:
            ValueError: live sessions are granted less memory together than this one may use alone.
        """
        pool_arguments.check_session(limits, tenant, checkpoint, live)
        pool_arguments.check_host(limits or self.limits)
        terms = Terms(limits or self.limits, zlib.crc32(tenant.encode()), checkpoint, live and not self._unsafe)
        terms.check_memory(self._settings["session_memory_mib"])
        return Session(self.backend(), terms)

    def backend(self) -> Backend:
        """What sessions are made of, those included whose histories are kept elsewhere."""
        return Backend(
            check=self._check_taking,
            taken=self._under_way,
            next_id=functools.partial(next, self._ids),
            run=self._submit,
            submit=self._submit_cell,
            fork=self._fork_session,
            end=self._end_session,
            result=self._finished_cell,
            cancelled=self._cancelled,
        )

    async def _fork_session(self, session: int, copies: list[int]) -> list[int]:
        try:
            link = await self._warden()
        except WardenLost:
            return []
        return await link.fork(next(self._ids), session, copies)

    def _end_session(self, session: int) -> asyncio.Future[list[int]] | None:
        return None if self._link is None else self._link.end_session(next(self._ids), session)

    async def _submit(self, call: Call) -> Result:
        """Run a call on a living warden, on another where that one dies, and count it."""
        attempts = in_vain = 0
        self._under_way.enter()  # a with would keep a bound method for each of them
        try:
            while attempts < ATTEMPTS and in_vain < VAIN_LOSSES:
                await self._admission.enter(call.tenant)
                try:
                    link = await self._warden()
                except WardenLost:
                    self._admission.leave()
                    in_vain += 1
                    continue
                except BaseException:
                    self._admission.leave()
                    raise
                try:
                    return self._finished(call, await link.submit(call))
                except asyncio.CancelledError:
                    link.cancel(call.id)
                    raise
                except WardenLost as lost:
                    attempts += lost.running
                    call = call._replace(attempts=attempts)
                    in_vain = 0 if lost.served else in_vain + 1
        except asyncio.CancelledError:
            self._cancelled()
            raise
        finally:
            self._under_way.leave()
        return self._finished(call, Report.without_run(call, Outcome.INFRA_ERROR, attempts))

    async def _submit_cell(self, call: Call, cell: CellHead) -> Report:
        """Run a session's cell, which may be one of a replay; where process or warden is lost the report says so."""
        try:
            await self._admission.enter(call.tenant)
            try:
                link = await self._warden()
            except BaseException:
                self._admission.leave()
                raise
            try:
                return await link.submit(call, cell)
            except asyncio.CancelledError:
                link.cancel(call.id)
                raise
        except WardenLost as lost:
            return Report.without_run(call, Outcome.LOST, call.attempts + lost.running, b"its warden died")

    def _finished(self, call: Call, report: Report) -> Result:
        isolation = self._isolation_of_processes if call.processes else self.isolation
        return self._count(result_of(report, isolation), call.submitted)

    def _finished_cell(self, report: Report, submitted: float, rebuilt: bool, replay_differs: bool) -> Result:
        result = result_of(report, self.isolation, rebuilt=rebuilt, replay_differs=replay_differs)
        return self._count(result, submitted)

    def _count(self, result: Result, submitted: float) -> Result:
        latency = time.monotonic() - submitted
        self._recorder.finished(result.status, latency, result.cpu_seconds, result.wall_seconds, result.queue_seconds)
        return result

    def _cancelled(self) -> None:
        self._recorder.cancelled += 1

    async def _warden(self) -> WardenLink:
        """The living warden; a lost one is replaced.

        Raises:
            WardenLost: the new one ended while starting.
        """
        if self._open and self._link is not None and self._link.alive:
            return self._link
        async with self._starting:
            if not self._open:
                raise RuntimeError("the sandbox pool was closed before this call had ended")
            if self._link is None or not self._link.alive:
                if self._link is not None:
                    await self._link.close()
                    self._recorder.warden_restarts += 1
                link = WardenLink(on_slot_free=self._admission.leave)
                await link.start(self._settings)
                self._link = link
            return self._link


def _views(preload: tuple[str, ...], program_folders: tuple[str, ...]) -> dict[str, Any]:
    """Settings of the warden: what the two jails see of this machine."""
    program_view = languages.plan_view(preload, program_folders)
    return {
        "view": dataclasses.asdict(jail.plan_view(preload)),
        "program_view": dataclasses.asdict(program_view),
        "program_environment": languages.environment(program_view),
        "interpreter": languages.interpreter(),
    }


def _weight(built: Result) -> int | None:
    """Bytes for which to remember how building ended; None where it might end otherwise another time."""
    if built.status not in (ToolStatus.OK, ToolStatus.ERROR):
        return None
    return len(built.stdout) + len(built.stderr) + sum(map(len, built.files.values())) + 1024

"""Sessions: cells that share their state, kept in a live process while there is one, and in a history always.

The pool's side. The warden knows processes only; it says whether one survived a cell and whether it still has it. What
is lost (killed, put out for want of memory, gone with a template or a warden) is rebuilt here, by running the history.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from jaxrl.sandbox import files as file_bytes
from jaxrl.sandbox import pool_arguments
from jaxrl.sandbox.cell import LEFT_AT_ONCE
from jaxrl.sandbox.protocol import ATTEMPTS, VAIN_LOSSES, Call, CellHead, Limits, Outcome, Report, pack_cells
from jaxrl.sandbox.result import Result
from jaxrl.statuses import ToolStatus

_COPIES_AT_ONCE = 16  # that the warden is asked for: what it was asked for, it makes
_MOST_PUT_OUT = 50  # times that a cell's session is put out before the cell can run
_CELL_BYTES = 512  # of a remembered cell, besides its code and files


class Backend(NamedTuple):
    """What a session needs of its pool."""

    check: Callable[[], None]  # raises RuntimeError where no more is taken
    taken: contextlib.AbstractContextManager[None]  # around what was taken: draining waits for its end
    next_id: Callable[[], int]
    run: Callable[[Call], Awaitable[Result]]  # a call
    submit: Callable[[Call, CellHead], Awaitable[Report]]  # a cell
    fork: Callable[[int, list[int]], Awaitable[list[int]]]  # a process's id and those of its copies; which of them live
    end: Callable[[int], Awaitable[object] | None]  # of a process; to be awaited by who must know that it is gone
    # Counts a cell that is over: when it was submitted, was its session rebuilt, and otherwise than it had been.
    result: Callable[[Report, float, bool, bool], Result]
    cancelled: Callable[[], None]  # counts a cell that nobody waits for any more


class Cell(NamedTuple):
    """A cell as it was run, and what came of it."""

    code: bytes
    echo: bool
    files: bytes
    digest: bytes = b""
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Terms:
    """What holds for a session and all its copies; see ``Pool.session``."""

    limits: Limits
    tenant: int
    checkpoint: bool
    live: bool

    def check_memory(self, most: int) -> None:
        """Refuse a live session that would be put out by itself, where all together are granted so many MiB.

        Raises:
            ValueError: saying what to change.
        """
        needed = self.limits.memory_mib + self.limits.disk_mib
        if self.live and needed > most:
            raise ValueError(
                f"a session of memory_mib + disk_mib = {needed} may outgrow session_memory_mib={most}, and then be put "
                "out after each cell; raise Pool(session_memory_mib=...), lower its limits, or take live=False"
            )


class _Losses:
    """What a cell has lost its session's process to, and whether that is to be borne any longer."""

    def __init__(self) -> None:
        self.attempts = 0
        self.fault = b""
        self._in_vain = self._put_out = 0  # losses before the cell could run: of no doing of ours, and by our own

    @property
    def bearable(self) -> bool:
        return self.attempts < ATTEMPTS and self._in_vain < VAIN_LOSSES and self._put_out < _MOST_PUT_OUT

    def add(self, report: Report) -> None:
        """The cell's own."""
        if report.outcome is Outcome.PUT_OUT:
            self._put_out += 1
        elif report.attempts > self.attempts:
            self._in_vain = 0
        else:
            self._in_vain += 1
        self.attempts, self.fault = report.attempts, report.stderr

    def add_rebuilding(self, report: Report) -> None:
        """One of the cells before it, which was run again."""
        self._put_out += report.outcome is Outcome.PUT_OUT
        self._in_vain += report.outcome is Outcome.LOST
        self.fault = b"its session could not be rebuilt: " + report.stderr


class _Closed(RuntimeError):
    """Closing the session ended what it was doing."""


class _Turn:
    """Around a cell or fork, in the task that asked for it: stopped, it is cancelled and ends in ``_Closed``.

    As asyncio.timeout does, it tells its own cancellation from others'; that costs too much for every cell.
    """

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._before = task, task.cancelling()
        self._stopped = self._over = False
        return self

    def stop(self) -> None:
        """Nothing happens if it was stopped before, or is over."""
        if not self._stopped and not self._over:
            self._stopped = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        if self._stopped and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise _Closed("the session was closed before this had ended") from None


class Session:
    """A notebook in a process of its own. Made by ``Pool.session`` and by ``fork``; close it, or use ``async with``."""

    def __init__(
        self,
        backend: Backend,
        terms: Terms,
        history: Sequence[Cell] = (),
        process: int = 0,
        rebuilt: bool = False,
        replay_differs: bool = False,
    ) -> None:
        self._backend = backend
        self._terms = terms
        self._history = list(history)
        self._process = process  # id under which the warden has it; 0 where it has none
        self._begun = bool(history) or process > 0
        self._rebuilt, self._replay_differs = rebuilt, replay_differs  # what no result has told yet
        self._turn = asyncio.Lock()
        self._doing: _Turn | None = None
        self._ended: Awaitable[object] | None = None  # done when the process that was given up last is gone
        self._open = True
        self._loop: asyncio.AbstractEventLoop | None = None  # in which it was used last

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def replays(self) -> bool:
        """Whether no process is kept, so that the whole history goes with each cell."""
        return not self._terms.live

    @property
    def history_bytes(self) -> int:
        """About what is kept to rebuild it: code and files of its cells."""
        return sum(len(cell.code) + len(cell.files) + _CELL_BYTES for cell in self._history)

    async def close(self) -> None:
        """End the process, which is gone when this returns, and forget the history. Copies live on.

        A cell or fork that is under way is ended too, and whoever waits for it gets a RuntimeError.

        Raises:
            RuntimeError: it is used in another event loop, and stays as it is.
        """
        if self._loop not in (None, asyncio.get_running_loop()) and not self._loop.is_closed():
            raise RuntimeError("the session was used in another event loop: close it there")
        self._open = False
        if self._doing is not None:
            self._doing.stop()
        async with self._turn:
            if self._process:
                self._give_up()
            self._history.clear()
            ended, self._ended = self._ended, None
            if ended is not None:
                await ended

    def _give_up(self) -> None:
        """End the process, whatever it does."""
        self._ended = self._backend.end(self._process)
        self._process = 0

    async def run(
        self,
        code: str,
        echo: bool = True,
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
    ) -> Result:
        """Run a cell; one at a time, in the order of the calls. Status and limits are as for ``Pool.run``.

        A cell that ends by itself, with an error or without, keeps what it did. One that is killed, or ends the
        process, leaves the session as it was before; its next result says ``rebuilt``, if it lost its process by that.
        Cancelling this kills the cell.

        Args:
            code: Python source.
            echo: print the repr of a trailing expression.
            files: content by path, laid into the session's directory before the code begins.
            wanted: patterns of files there to return when the cell has ended.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: a file's path is not a plain relative one, or the files are larger than the directory.
            RuntimeError: the session or its pool is closed, or was while this ran.
            SandboxUnavailable: the jail was lost and could not be built again.
        """
        return await self.run_numbered(0, code, echo, files, wanted)

    async def run_numbered(
        self, number: int, code: str, echo: bool, files: Mapping[str, bytes] | None, wanted: Sequence[str]
    ) -> Result:
        """``run``, of a cell with a number above 0, by which it may be taken back."""
        pool_arguments.check_cell(code, echo, files, wanted)
        file_bytes.check(files or {}, self._terms.limits.disk_mib << 20)
        cell = Cell(code.encode("utf-8", "surrogatepass"), echo, file_bytes.pack(files or {}), number=number)
        submitted = time.monotonic()
        self._backend.check()
        self._loop = asyncio.get_running_loop()
        with self._backend.taken:
            try:
                async with self._turn:
                    self._check_open()
                    with _Turn() as self._doing:
                        if not self._terms.live:
                            return await self._run_all(cell, wanted, submitted)
                        return await self._run_live(cell, wanted, submitted)
            except (asyncio.CancelledError, _Closed):
                if self._terms.live:  # otherwise the pool has counted it as the call it is
                    self._backend.cancelled()
                raise

    async def take_back(self, after: int) -> None:
        """Be as if no cell with a larger number had been run; waits for what is under way."""
        async with self._turn:
            kept = [cell for cell in self._history if cell.number <= after]
            if len(kept) < len(self._history):
                self._history = kept
                if self._process:
                    self._give_up()

    async def fork(self, copies: int) -> "list[Session]":
        """Copies of this session: the same past, and from here on futures of their own.

        A live session is copied by copy-on-write: a few milliseconds each, memory shared until written, files copied. A
        session that then holds open files, pipes, threads or shared mappings cannot be copied so: its copies begin
        without a process and are rebuilt from the history with their first cell, which says so (``rebuilt``).

        Raises:
            ValueError: ``copies`` is not positive, or more than ``protocol.MOST_COPIES``.
            RuntimeError: the session or its pool is closed, or was while this ran.
        """
        pool_arguments.check_copies(copies)
        self._backend.check()
        self._loop = asyncio.get_running_loop()
        with self._backend.taken:
            async with self._turn:
                self._check_open()
                ids = [0] * copies
                if self._terms.live and self._history:
                    with _Turn() as self._doing:
                        if self._process == 0:
                            await self._rebuild(time.monotonic())
                        ids = await self._copy(copies)
                untold = self._rebuilt, self._replay_differs
                made = [Session(self._backend, self._terms, self._history, id, *untold) for id in ids]
                for copy in made:
                    copy._loop = self._loop
                return made

    async def _copy(self, copies: int) -> list[int]:
        """Ids of copies of the process, 0 for each that did not come to be."""
        made: list[int] = []
        while len(made) < copies:
            wanted = [self._backend.next_id() for _ in range(min(copies - len(made), _COPIES_AT_ONCE))]
            copying = asyncio.ensure_future(self._backend.fork(self._process, wanted))
            try:
                living = await asyncio.shield(copying)
            except asyncio.CancelledError:
                for id in made:
                    self._backend.end(id)
                copying.add_done_callback(self._end_copies)  # the warden has been asked, and will make them
                raise
            made += [id for id in wanted if id in living]
            if len(living) < len(wanted):  # and so it would be with the next ones
                break
        return [*made, *[0] * (copies - len(made))]

    def _end_copies(self, copying: asyncio.Future[list[int]]) -> None:
        if not copying.cancelled() and copying.exception() is None:
            for id in copying.result():
                self._backend.end(id)

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the session is closed: use it inside `async with`, or close it later")

    async def _run_live(self, cell: Cell, wanted: Sequence[str], submitted: float) -> Result:
        """In the session's process, which is rebuilt first where it is lost; into the history unless it cost that."""
        losses = _Losses()
        while losses.bearable:
            lost = await self._rebuild(submitted) if self._process == 0 and self._begun else None
            if lost is not None:
                losses.add_rebuilding(lost)
                continue
            call = self._call(cell.code, cell, wanted, submitted, attempts=losses.attempts)
            report = await self._run_cell(call, self._terms.checkpoint)
            if not report.lost:
                break
            self._begun = True
            losses.add(report)
        else:
            call = self._call(cell.code, cell, wanted, submitted)
            report = Report.without_run(call, Outcome.INFRA_ERROR, losses.attempts, losses.fault)
        if report.survived:
            self._history.append(cell._replace(digest=_digest(report)))
        result = self._backend.result(report, submitted, self._rebuilt, self._replay_differs)
        self._rebuilt = self._replay_differs = False
        return result

    async def _run_cell(self, call: Call, checkpoint: bool, followed: bool = False) -> Report:
        """One cell in the process, which is forked if there is none."""
        fresh = self._process == 0
        if fresh:
            self._process = self._backend.next_id()
        try:
            report = await self._backend.submit(call, CellHead(self._process, fresh, checkpoint, followed))
        except BaseException:
            self._give_up()  # whether the cell ran, and what it did, is not known
            self._begun = True
            raise
        if report.lost or not (report.survived or checkpoint):
            self._process = 0
        if not report.lost:
            self._begun = True
        return report

    async def _rebuild(self, submitted: float) -> Report | None:
        """Run the history in a new process, of which the next result tells; if that was lost, the report of it.

        Args:
            submitted: when what it is needed for was, so that its cells are as old as that.
        """
        self._rebuilt = True
        while True:
            for index, cell in enumerate(self._history):
                call = self._call(cell.code, cell, (), submitted)
                report = await self._run_cell(call, checkpoint=False, followed=True)
                if report.lost:
                    return report
                if not report.survived:
                    del self._history[index]
                    self._replay_differs = True
                    break
                self._replay_differs |= _digest(report) != cell.digest
            else:
                return None

    async def _run_all(self, cell: Cell, wanted: Sequence[str], submitted: float) -> Result:
        """Replay-only: history and cell in one fresh process."""
        cells = [*self._history, cell]
        code = pack_cells([part for one in cells for part in (one.files, one.code, bytes([one.echo]))])
        call = self._call(code, cell._replace(files=b""), (*wanted, LEFT_AT_ONCE), submitted, replay=True)
        result = await self._backend.run(call)
        files = dict(result.files)
        left = files.pop(LEFT_AT_ONCE, None) is not None  # which ends a live session's process
        if result.status in (ToolStatus.OK, ToolStatus.ERROR) and result.signal is None and not left:
            self._history.append(cell)
        return dataclasses.replace(result, files=files)

    def _call(
        self,
        code: bytes,
        cell: Cell,
        wanted: Sequence[str],
        submitted: float,
        *,
        replay: bool = False,
        attempts: int = 0,
    ) -> Call:
        return Call(
            id=self._backend.next_id(),
            code=code,
            stdin=b"",
            echo=cell.echo,
            limits=self._terms.limits,
            submitted=submitted,
            attempts=attempts,
            tenant=self._terms.tenant,
            files=cell.files,
            wanted="\n".join(wanted),
            replay=replay,
        )


def _digest(report: Report) -> bytes:
    """Of how a cell ended and of what it printed."""
    hash = hashlib.blake2b(bytes([report.outcome, report.exit_code & 0xFF]), digest_size=16)
    for text in (report.stdout, report.stderr):
        hash.update(len(text).to_bytes(8, "little") + text)
    return hash.digest()

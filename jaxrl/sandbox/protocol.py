"""What crosses between pool, warden and zygote: limits, calls, outcomes, and their bytes.

Pool and warden talk over a stream socket in length-prefixed frames. Nothing here is ever read from a process that
runs user code.
"""

import dataclasses
import enum
import functools
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxrl.sandbox import arguments

ATTEMPTS = 3  # tries of a call or cell before a fault of ours is reported
VAIN_LOSSES = 5  # and losses, one after the other, of what was to run it and never came to that
LEAST_MEMORY_MIB = 16
MOST_COPIES = 4096  # of a session at once

_FRAME = struct.Struct("<IB")
_LENGTH = struct.Struct("<I")
READ_BYTES = 1 << 18  # of frames at once, into memory that is kept: new memory would be faulted in each time
_BEYOND_LIMITS = 1 << 32  # the least that ``_LIMITS`` cannot hold
_FRACTIONAL = ("cpu_seconds", "wall_seconds")
_LIMITS = struct.Struct("<ddIIIIIIII")
_CALL = struct.Struct("<QdBBIIIIII")
_ECHO, _REPLAY, _PROCESSES = 1, 2, 4  # flags of a call
_CELL = struct.Struct("<QBBB")
_OUTCOME = struct.Struct("<QBBBBBiidddQIIII")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one call may use. Exceeding CPU or wall time gives ``timeout``, memory ``out_of_memory``."""

    cpu_seconds: float = 4.0
    """CPU time, user and system, of all threads together: the main limit, since it does not depend on load."""
    wall_seconds: float = 8.0
    """Wall time for code that sleeps; stretched by the time the code was ready to run but had no core."""
    memory_mib: int = 512
    """Address space the call may add to that of the warm interpreter. A call that may start processes is bounded by
    what all of them use together instead, its files included: this and ``disk_mib``."""
    output_kib: int = 64
    """Kept of stdout and of stderr each: the first and the last half of this."""
    output_hard_mib: int = 16
    """Output beyond this ends the call with ``output_limit``."""
    disk_mib: int = 64
    """Size of the call's private working directory, which lives in memory."""
    open_files: int = 64
    """Descriptors that the code has at once, its three streams among them."""
    threads: int = 128
    """At once, the first among them, of a call that may start no processes. Each takes 3 MiB of ``memory_mib``."""
    files_mib: int = 16
    """Returned files together; those beyond it are left out and counted."""
    processes: int = 32
    """Processes and threads at once of a call that may start processes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            arguments.number(f"Limits.{name}", value)
            if not 0 < value < _BEYOND_LIMITS:
                raise ValueError(f"Limits.{name}={value} must be above 0 and below 2**32")
            if name not in _FRACTIONAL:
                arguments.integer(f"Limits.{name}", value)
        if self.memory_mib < LEAST_MEMORY_MIB:
            least = f"{LEAST_MEMORY_MIB} are needed to start a call"
            raise ValueError(f"Limits.memory_mib={self.memory_mib} is too small: {least}")


# Nearly all calls of a pool have the same limits.
@functools.lru_cache(256)
def _pack_limits(limits: Limits) -> bytes:
    return _LIMITS.pack(*dataclasses.astuple(limits))


@functools.lru_cache(256)
def _unpack_limits(data: bytes) -> Limits:
    return Limits(*_LIMITS.unpack(data))


class Outcome(enum.IntEnum):
    """How a call ended, as the warden saw it."""

    OK = 0
    ERROR = 1
    TIMEOUT = 2
    OUT_OF_MEMORY = 3
    OUTPUT_LIMIT = 4
    INFRA_ERROR = 5
    CANCELLED = 6
    LOST = 7  # a cell whose session's process is gone; it did not run, or its template was lost under it
    PUT_OUT = 8  # the same, where the warden itself ended that process, for want of room


class Call(NamedTuple):  # half the cost of a dataclass, and tens of thousands may wait at once
    """One snippet on its way to a child process."""

    id: int
    code: bytes  # UTF-8, lone surrogates passed through
    stdin: bytes
    echo: bool  # print the repr of a trailing expression
    limits: Limits
    submitted: float  # time.monotonic() of the submission; one clock for all processes of the machine
    attempts: int = 0  # tries already spent
    tenant: int = 0  # calls of different tenants take turns
    files: bytes = b""  # given, as ``files.pack`` lays them out
    wanted: str = ""  # patterns of the files to return, a line each
    processes: bool = False  # may start processes and programs
    command: str = ""  # program and arguments, "\0" between; empty: ``code`` is Python
    replay: bool = False  # ``code`` is a row of cells (``pack_cells``), all but the last one silent

    def pack(self) -> bytes:
        limits = _pack_limits(self.limits)
        words = (text.encode("utf-8", "surrogatepass") for text in (self.wanted, self.command))
        parts = (self.code, self.stdin, self.files, *words)
        lengths = map(len, parts)
        flags = self.echo * _ECHO | self.processes * _PROCESSES | self.replay * _REPLAY
        head = _CALL.pack(self.id, self.submitted, self.attempts, flags, self.tenant, *lengths)
        return b"".join((head, limits, *parts))

    @staticmethod
    def unpack(data: bytes) -> "Call":
        id, submitted, attempts, flags, tenant, *lengths = _CALL.unpack_from(data)
        limits = _unpack_limits(data[_CALL.size : _CALL.size + _LIMITS.size])
        code, stdin, files, *words = _cut(data, _CALL.size + _LIMITS.size, lengths)
        wanted, command = (word.decode("utf-8", "surrogatepass") for word in words)
        echo, replay, processes = (bool(flags & flag) for flag in (_ECHO, _REPLAY, _PROCESSES))
        return Call(
            id, code, stdin, echo, limits, submitted, attempts, tenant, files, wanted, processes, command, replay
        )


def pack_cells(cells: Sequence[bytes]) -> bytes:
    """Cells in a row, each behind its length."""
    return b"".join(_LENGTH.pack(len(cell)) + cell for cell in cells)


def unpack_cells(data: bytes) -> list[bytes]:
    """What ``pack_cells`` was given."""
    cells, start = [], 0
    while start < len(data):
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size + length
        cells.append(data[start - length : start])
    return cells


# (code, flags, limits in the order of their fields, files, command, whether files are wanted)
UnpackedCall = tuple[bytes, int, tuple, bytes, bytes, bool]


def unpack_for_child(data: bytes) -> UnpackedCall:
    """What a child needs of a packed Call. Flags: 1 to echo a trailing expression, 2 if the code is a row of cells."""
    _, _, _, flags, _, code, stdin, files, wanted, command = _CALL.unpack_from(data)
    start = _CALL.size + _LIMITS.size
    given = data[start + code + stdin : start + code + stdin + files]
    words = data[len(data) - command :]
    flags &= _ECHO | _REPLAY
    return data[start : start + code], flags, _LIMITS.unpack_from(data, _CALL.size), given, words, wanted > 0


def _cut(data: bytes, start: int, lengths: Sequence[int]) -> Iterator[bytes]:
    for length in lengths:
        yield data[start : start + length]
        start += length


class Report(NamedTuple):
    """One finished call on its way back to the pool."""

    id: int
    outcome: Outcome
    attempts: int
    exit_code: int  # -1 where the call did not exit by itself
    signal: int  # 0 where no signal ended it
    cpu_seconds: float
    wall_seconds: float
    queue_seconds: float
    peak_rss_kib: int
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool
    files: bytes = b""  # returned, as ``files.pack`` lays them out
    files_left_out: int = 0
    survived: bool = False  # a cell's: the session's process, with all that the cell did, is there
    node: str = ""  # of the cluster, where it ran; known to who asked that node, and not packed

    @property
    def lost(self) -> bool:
        """Whether it is of a cell whose session's process is gone by no doing of its own."""
        return self.outcome in (Outcome.LOST, Outcome.PUT_OUT)

    @staticmethod
    def without_run(call: Call, outcome: Outcome, attempts: int, fault: bytes = b"") -> "Report":
        """Of a call that was cancelled, lost, or given up; ``fault`` says why, as its stderr."""
        return Report(
            id=call.id,
            outcome=outcome,
            attempts=attempts,
            exit_code=-1,
            signal=0,
            cpu_seconds=0.0,
            wall_seconds=0.0,
            queue_seconds=time.monotonic() - call.submitted,
            peak_rss_kib=0,
            stdout=b"",
            stderr=fault,
            stdout_truncated=False,
            stderr_truncated=False,
        )

    def pack(self) -> bytes:
        return (
            _OUTCOME.pack(
                self.id,
                self.outcome,
                self.attempts,
                self.stdout_truncated,
                self.stderr_truncated,
                self.survived,
                self.exit_code,
                self.signal,
                self.cpu_seconds,
                self.wall_seconds,
                self.queue_seconds,
                self.peak_rss_kib,
                self.files_left_out,
                len(self.stdout),
                len(self.stderr),
                len(self.files),
            )
            + self.stdout
            + self.stderr
            + self.files
        )

    @staticmethod
    def unpack(data: bytes) -> "Report":
        fields = _OUTCOME.unpack_from(data)
        id, outcome, attempts, stdout_cut, stderr_cut, survived, exit_code, signal, *fields = fields
        cpu, wall, queue, rss, left_out, *lengths = fields
        stdout, stderr, files = _cut(data, _OUTCOME.size, lengths)
        return Report(
            id=id,
            outcome=Outcome(outcome),
            attempts=attempts,
            exit_code=exit_code,
            signal=signal,
            cpu_seconds=cpu,
            wall_seconds=wall,
            queue_seconds=queue,
            peak_rss_kib=rss,
            stdout=stdout,
            stderr=stderr,
            stdout_truncated=bool(stdout_cut),
            stderr_truncated=bool(stderr_cut),
            files=files,
            files_left_out=left_out,
            survived=bool(survived),
        )


class CellHead(NamedTuple):
    """What goes before a Call that is a session's cell."""

    session: int
    fresh: bool  # a process is forked for it; otherwise there must be one
    checkpoint: bool  # a copy is made first, and takes over where the cell ends the process
    followed: bool = False  # another cell or a fork comes at once, until which the process had better not be put out

    def pack(self) -> bytes:
        return _CELL.pack(*self)

    @staticmethod
    def unpack(data: bytes) -> "tuple[CellHead, bytes]":
        """The head and what lies behind it."""
        session, *flags = _CELL.unpack_from(data)
        return CellHead(session, *map(bool, flags)), data[_CELL.size :]


def pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}Q", *ids)


def unpack_ids(data: bytes) -> list[int]:
    return [id for (id,) in struct.iter_unpack("<Q", data)]


@enum.unique
class Kind(enum.IntEnum):
    """Frames between pool and warden."""

    SETUP = 1  # pool → warden: JSON settings
    READY = 2  # warden → pool: the jail stands and every template is warm
    UNAVAILABLE = 3  # warden → pool: text, why there is no jail
    SUBMIT = 4  # pool → warden: a Call
    CANCEL = 5  # pool → warden: a call id
    REPORT = 6  # warden → pool: a Report
    CLOSE = 7  # pool → warden: end everything
    PING = 8  # pool → warden: are you there
    PONG = 9  # warden → pool
    STATS = 10  # pool → warden: a question; warden → pool: JSON, the fields of metrics.WardenMetrics
    CELL = 20  # pool → warden: a CellHead and a Call; answered by a REPORT
    FORK = 21  # pool → warden: ids of this question, of a session, of each copy it shall have
    END = 22  # pool → warden: ids of this question, of a session that is over
    DONE = 23  # warden → pool: id of the question that is dealt with; after FORK, ids of the copies that live


def frame(kind: Kind, body: bytes = b"") -> bytes:
    return _FRAME.pack(len(body), kind) + body


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Kind, bytes]]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _FRAME.size:
            length, kind = _FRAME.unpack_from(self._buffer, start)
            end = start + _FRAME.size + length
            if len(self._buffer) < end:
                break
            body = bytes(memoryview(self._buffer)[start + _FRAME.size : end])
            start = end
            yield Kind(kind), body
        del self._buffer[:start]

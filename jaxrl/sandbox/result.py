"""How a call or a cell ended, as its caller is told."""

import dataclasses
from collections.abc import Mapping

from jaxrl.sandbox import files as file_bytes
from jaxrl.sandbox.protocol import Outcome, Report
from jaxrl.statuses import ToolStatus

_STATUS = {
    Outcome.OK: ToolStatus.OK,
    Outcome.ERROR: ToolStatus.ERROR,
    Outcome.TIMEOUT: ToolStatus.TIMEOUT,
    Outcome.OUT_OF_MEMORY: ToolStatus.OUT_OF_MEMORY,
    Outcome.OUTPUT_LIMIT: ToolStatus.OUTPUT_LIMIT,
    Outcome.INFRA_ERROR: ToolStatus.INFRA_ERROR,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """How one call ended. ``status`` rests on what the kernel reported, never on what the code printed."""

    status: ToolStatus  # ok, error, timeout, out_of_memory, output_limit or infra_error
    stdout: str
    stderr: str
    exit_code: int | None  # None where a signal ended the call, or it never ran
    signal: int | None
    cpu_seconds: float
    wall_seconds: float  # of the code alone
    queue_seconds: float  # from submission to the code's first instruction; never part of a limit
    peak_rss_kib: int  # resident memory, pages shared with the warm interpreter included
    attempts: int
    stdout_truncated: bool
    stderr_truncated: bool
    isolation: str  # which walls stood around the code
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # that were wanted and written, by path
    files_left_out: int = 0  # wanted and written, but not returned; see ``files.gather``
    stage: str = "run"  # "build" where the compiler refused the code, and everything above is about the compiler
    stdout_bytes: bytes | None = None  # where stdout is not UTF-8: what was printed, before bytes were replaced
    stderr_bytes: bytes | None = None
    node: str = ""  # of the cluster, where it ran; "" in a pool of this machine
    rebuilt: bool = False  # a session's process was lost, and its earlier cells ran again before this one
    replay_differs: bool = False  # and they ended or printed otherwise than the first time


def fault(text: str, *, isolation: str = "", queue_seconds: float = 0.0, attempts: int = 0) -> Result:
    """The result of a call that failed on our side, outside any pool."""
    return Result(
        status=ToolStatus.INFRA_ERROR,
        stdout="",
        stderr=text,
        exit_code=None,
        signal=None,
        cpu_seconds=0.0,
        wall_seconds=0.0,
        queue_seconds=queue_seconds,
        peak_rss_kib=0,
        attempts=attempts,
        stdout_truncated=False,
        stderr_truncated=False,
        isolation=isolation,
    )


def result_of(report: Report, isolation: str, *, rebuilt: bool = False, replay_differs: bool = False) -> Result:
    """What the caller is given of a warden's report."""
    stdout, stdout_bytes = _text(report.stdout)
    stderr, stderr_bytes = _text(report.stderr)
    return Result(
        status=_STATUS[report.outcome],
        stdout=stdout,
        stderr=stderr,
        exit_code=report.exit_code if report.exit_code >= 0 else None,
        signal=report.signal or None,
        cpu_seconds=report.cpu_seconds,
        wall_seconds=report.wall_seconds,
        queue_seconds=report.queue_seconds,
        peak_rss_kib=report.peak_rss_kib,
        attempts=report.attempts,
        stdout_truncated=report.stdout_truncated,
        stderr_truncated=report.stderr_truncated,
        isolation=isolation,
        files=dict(file_bytes.unpack(report.files)),
        files_left_out=report.files_left_out,
        stdout_bytes=stdout_bytes,
        stderr_bytes=stderr_bytes,
        node=report.node,
        rebuilt=rebuilt,
        replay_differs=replay_differs,
    )


def _text(output: bytes) -> tuple[str, bytes | None]:
    """Output as text, and as it was where that is not the same."""
    try:
        return output.decode(), None
    except UnicodeDecodeError:
        return output.decode("utf-8", "replace"), output

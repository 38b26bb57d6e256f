"""What users of a pool may count on, be it of this machine, of a cluster or behind a server."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from jaxrl.sandbox.protocol import Limits

if TYPE_CHECKING:
    from jaxrl.sandbox.languages import Language
    from jaxrl.sandbox.result import Result


class RunnerSession(Protocol):
    """A session of a ``Runner``: cells that share their state. Close it, or use ``async with``."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def run(
        self,
        code: str,
        echo: bool = True,
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
    ) -> "Result":
        """Run a cell, as ``Session.run`` says."""
        ...

    async def fork(self, copies: int) -> "Sequence[RunnerSession]":
        """Copies of this session, as ``Session.fork`` says."""
        ...

    async def close(self) -> None:
        """End the session; its copies live on."""
        ...


class Runner(Protocol):
    """``Pool``, ``ClusterPool`` or ``SandboxClient``, open."""

    limits: Limits
    """What a call gets that names no limits of its own."""
    most: Limits | None
    """What no call gets more of, whatever it asks for; None: each gets what it asks for."""
    isolation: str
    """Which walls stand around the code."""

    async def run(
        self,
        code: str,
        stdin: str | bytes = "",
        echo: bool = True,
        limits: Limits | None = None,
        tenant: str = "",
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
        language: "str | Language" = "python",
        processes: bool = False,
    ) -> "Result":
        """Run a snippet to its end, as ``Pool.run`` says."""
        ...

    def session(
        self, *, limits: Limits | None = None, tenant: str = "", checkpoint: bool = False, live: bool = True
    ) -> RunnerSession:
        """A notebook, as ``Pool.session`` says."""
        ...

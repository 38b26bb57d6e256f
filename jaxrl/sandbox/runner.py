"""What users of a pool may count on, be it of this machine, of a cluster or behind a server."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from jaxrl.sandbox.protocol import Limits

if TYPE_CHECKING:
    from jaxrl.sandbox.languages import Language
    from jaxrl.sandbox.result import Result


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

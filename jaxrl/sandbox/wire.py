"""What travels over HTTP, as dataclasses: requests, answers, refusals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxrl.sandbox.languages import LANGUAGES, Language
from jaxrl.sandbox.protocol import LEAST_MEMORY_MIB, MOST_COPIES, Limits
from jaxrl.sandbox.result import Result


def _about(description: str) -> dict[str, str]:
    return {"description": description}


def _number() -> Any:
    """Field of a request that may be taken back."""
    words = "Of the client's own, rising from 1 over cells and forks of a session, so that it can be taken back."
    return dataclasses.field(metadata=_about(words) | {"minimum": 0}, default=0)


_MOST_PATTERNS = 64
_LEAST = {"memory_mib": {"minimum": LEAST_MEMORY_MIB}}

PartialLimits = dataclasses.make_dataclass(
    "PartialLimits",
    [
        (
            limit.name,
            limit.type | None,
            dataclasses.field(default=None, metadata=_LEAST.get(limit.name, {"exclusiveMinimum": 0})),
        )
        for limit in dataclasses.fields(Limits)
    ],
    frozen=True,
    namespace={
        "__doc__": "Limits of one call. What is absent, null, or beyond the server's own limit is the server's."
    },
)


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """One call: a snippet and what it is given. The arguments of ``Pool.run``."""

    code: str = dataclasses.field(metadata=_about("Source text."))
    stdin: str | bytes = dataclasses.field(
        metadata=_about("What the snippet reads from standard input: text, or bytes as base64."), default=""
    )
    echo: bool = dataclasses.field(
        metadata=_about("Print the repr of a trailing expression of Python, as a notebook does."), default=True
    )
    limits: PartialLimits | None = None
    files: Mapping[str, bytes] = dataclasses.field(
        metadata=_about("Content by relative path, laid out before the code begins."), default_factory=dict
    )
    wanted: Sequence[str] = dataclasses.field(
        metadata=_about("Patterns (fnmatch, relative paths) of files to return at the end.")
        | {"maxItems": _MOST_PATTERNS},
        default=(),
    )
    language: Literal["python", "bash", "c++"] = "python"
    processes: bool = dataclasses.field(
        metadata=_about("Let Python start processes and programs; other languages always may."), default=False
    )


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """Calls whose results are streamed as they finish."""

    calls: Sequence[RunRequest]


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """One line of a batch's answer."""

    index: int = dataclasses.field(metadata=_about("Which call of the batch, from 0."))
    result: Result


@dataclasses.dataclass(frozen=True)
class SessionRequest:
    """A new session. The arguments of ``Pool.session``."""

    limits: PartialLimits | None = None
    checkpoint: bool = dataclasses.field(
        metadata=_about("Copy the process before every cell, so that one that is killed costs nothing but itself."),
        default=False,
    )
    live: bool = dataclasses.field(
        metadata=_about("Keep a process; otherwise each cell runs behind all earlier ones."), default=True
    )


@dataclasses.dataclass(frozen=True)
class CellRequest:
    """A cell of a session. The arguments of ``Session.run``."""

    code: str = dataclasses.field(metadata=_about("Python source."))
    echo: bool = dataclasses.field(
        metadata=_about("Print the repr of a trailing expression, as a notebook does."), default=True
    )
    files: Mapping[str, bytes] = dataclasses.field(
        metadata=_about("Content by relative path, laid out before the code begins."), default_factory=dict
    )
    wanted: Sequence[str] = dataclasses.field(
        metadata=_about("Patterns (fnmatch, relative paths) of files to return at the end.")
        | {"maxItems": _MOST_PATTERNS},
        default=(),
    )
    number: int = _number()


@dataclasses.dataclass(frozen=True)
class ForkRequest:
    """Copies of a session."""

    copies: int = dataclasses.field(metadata=_about("How many.") | {"minimum": 1, "maximum": MOST_COPIES})
    number: int = _number()


@dataclasses.dataclass(frozen=True)
class TakeBackRequest:
    """To be as if numbered cells and forks of which the client has had no answer had never been asked for."""

    answered: int = dataclasses.field(
        metadata=_about("All with larger numbers are taken back: cells undone, copies ended.") | {"minimum": 0}
    )
    given: int = dataclasses.field(
        metadata=_about("The largest number given so far; up to this, none is taken any more.") | {"minimum": 0}
    )


@dataclasses.dataclass(frozen=True)
class OpenSession:
    """A session that is there, for who knows its id."""

    id: str
    idle_seconds: float = dataclasses.field(metadata=_about("It ends when it is not used for so long."))


@dataclasses.dataclass(frozen=True)
class Copies:
    """What a fork made."""

    sessions: Sequence[OpenSession]


@dataclasses.dataclass(frozen=True)
class TakenBack:
    """What no answer was had of is undone."""

    answered: int


@dataclasses.dataclass(frozen=True)
class ClosedSession:
    """A session that was ended; nothing is left of it."""

    id: str


@dataclasses.dataclass(frozen=True)
class Health:
    """What a server is, and whether it takes calls."""

    status: Literal["ok", "draining", "unavailable"]
    isolation: str = dataclasses.field(metadata=_about("Which walls stand around the code."))
    limits: Limits = dataclasses.field(metadata=_about("What a call gets, and the most that it may ask for."))
    most_calls: int = dataclasses.field(metadata=_about("In one batch, and under way at once."))
    most_bytes: int = dataclasses.field(metadata=_about("In one request."))
    version: str = dataclasses.field(metadata=_about("Of jaxrl."))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a request was refused. Nothing of it was run."""

    error: str
    value: str = dataclasses.field(metadata=_about("What was refused, shortened."))
    limit: str = dataclasses.field(metadata=_about("What is accepted."))
    remedy: str


def request(
    code: str,
    stdin: str | bytes,
    echo: bool,
    limits: Limits | None,
    files: Mapping[str, bytes] | None,
    wanted: Sequence[str],
    language: str | Language,
    processes: bool,
) -> RunRequest:
    """The request for a call with the arguments of ``Pool.run``.

    Raises:
        ValueError: a language that no server knows.
    """
    if language != "python" and (isinstance(language, Language) or language not in LANGUAGES):
        known = ", ".join(["python", *LANGUAGES])
        raise ValueError(f"a sandbox server runs {known}, not {language!r}; take a Pool for languages of your own")
    return RunRequest(code, stdin, echo, partial(limits), files or {}, wanted, language, processes)


def partial(limits: Limits | None) -> Any:
    """Limits as they are asked for: a PartialLimits, or None."""
    return None if limits is None else PartialLimits(**dataclasses.asdict(limits))


def capped(asked: Any, most: Limits) -> Limits:
    """What a call gets that asks for ``asked``, a PartialLimits or None, where no limit may exceed ``most``."""
    given = {} if asked is None else {name: value for name, value in vars(asked).items() if value is not None}
    return dataclasses.replace(most, **{name: min(value, getattr(most, name)) for name, value in given.items()})

"""Checks of single arguments, made before anything starts: messages name the value, the limit and the remedy.

All raise TypeError where the value is of a wrong kind, and ValueError where it is out of range.
"""

import types
from collections.abc import Mapping, Sequence

_SHOWN = 80  # characters of a bad value in a message


def kind(name: str, value: object, wanted: type | tuple[type, ...] | types.UnionType, words: str) -> None:
    """Refuse a value that is no instance.

    Args:
        words: what it must be, for the message.
    """
    if not isinstance(value, wanted):
        raise _wrong_kind(name, value, words)


def flag(name: str, value: object) -> None:
    """Refuse what is not True or False."""
    kind(name, value, bool, "True or False")


def integer(name: str, value: object) -> None:
    """Refuse what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_kind(name, value, "a whole number")


def whole(name: str, value: object, least: int = 1, remedy: str = "") -> None:
    """Refuse what is no whole number of at least ``least``, which is 1 or 0."""
    integer(name, value)
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name}={value} must {bound}{remedy and f'; {remedy}'}")


def number(name: str, value: object) -> None:
    """Refuse what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_kind(name, value, "a number")


def above_zero(name: str, value: object) -> None:
    """Refuse what is no number above 0."""
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name}={value} must be above 0")


def texts(name: str, value: object) -> None:
    """Refuse what is no sequence of strings; above all a single string, which is one too."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name}={_shown(value)} is a single {type(value).__name__}; give a sequence, ({value!r},)")
    kind(name, value, Sequence, "a sequence of str")
    for item in value:
        kind(f"an entry of {name}", item, str, "str")


def files(value: object) -> None:
    """Refuse files that are neither None nor bytes by path."""
    if value is None:
        return
    kind("files", value, Mapping, "a mapping from relative path to bytes")
    for path, content in value.items():
        kind("a path in files", path, str, "str")
        kind(f"files[{path!r}]", content, bytes, "bytes; for text give text.encode()")


def _wrong_kind(name: str, value: object, words: str) -> TypeError:
    return TypeError(f"{name}={_shown(value)} is of type {type(value).__name__}; it must be {words}")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"

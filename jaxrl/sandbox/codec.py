"""Dataclasses as JSON: read strictly, written, and described in JSON Schema, all by a walk over the type hints.

What validates and what describes is the same class, so the two cannot differ; and it is the class that the library
itself uses, which processes without any web library load too. Strings may hold lone surrogates, which model-written
code does. Bytes travel as base64.

Types known: str, bool, int, float, bytes, string enums, Literal, Mapping[str, X], Sequence[X], X | None, dataclasses;
and as a field of a dataclass str | bytes: a string, or bytes as ``{"base64": "..."}``.
A dataclass field's metadata are further keywords of its schema, of which those in ``_BOUNDS`` are enforced.
"""

import base64
import dataclasses
import enum
import functools
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

_BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_TEXT_OR_BYTES = str | bytes
_CODED = "base64"  # the key of bytes where there may be text too
_SHOWN = 80  # characters of a bad value in a complaint
_BOUNDS = {
    "minimum": (operator.ge, "at least {}"),
    "maximum": (operator.le, "at most {}"),
    "exclusiveMinimum": (operator.gt, "greater than {}"),
    "maxItems": (lambda value, limit: len(value) <= limit, "at most {} of them"),
}
_SCALARS = {
    str: ({"type": "string"}, "a string"),
    bool: ({"type": "boolean"}, "true or false"),
    int: ({"type": "integer"}, "a whole number"),
    float: ({"type": "number"}, "a number"),
    bytes: ({"type": "string", "contentEncoding": "base64", "pattern": _BASE64}, "a string of base64"),
}


class Malformed(ValueError):
    """JSON that does not fit.

    Attributes:
        where: the place, such as ``calls[3].files.a``.
        value: what stands there, shortened.
        expected: what may stand there.
    """

    def __init__(self, where: str, value: Any, expected: str) -> None:
        shown = repr(value)
        self.where, self.expected = where or "the body", expected
        self.value = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
        super().__init__(f"{self.where} is {self.value} but must be {expected}")


def write(value: Any) -> Any:
    """A record, or what one holds, as JSON values."""
    if dataclasses.is_dataclass(value):
        hints = _hints(type(value))
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: write(_marked(item) if hints[name] == _TEXT_OR_BYTES else item) for name, item in found.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {name: write(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [write(item) for item in value]
    return value


def read(hint: Any, value: Any, where: str = "", *, closed: bool = True) -> Any:
    """JSON values as the type that ``hint`` names.

    Args:
        where: place of the value, for complaints.
        closed: fields that a record does not have are refused; otherwise ignored, as of a newer server's answer.

    Raises:
        Malformed: naming the first place that does not fit.
    """
    if dataclasses.is_dataclass(hint):
        return _read_record(hint, value, where, closed)
    if hint == _TEXT_OR_BYTES:
        return _read_text_or_bytes(value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else read(_without_none(inner), value, where, closed=closed)
    if origin is Mapping:
        _require(isinstance(value, dict), where, value, "an object")
        return {name: read(inner[1], item, f"{where}.{name}", closed=closed) for name, item in value.items()}
    if origin is Sequence:
        _require(isinstance(value, list), where, value, "an array")
        return [read(inner[0], item, f"{where}[{index}]", closed=closed) for index, item in enumerate(value)]
    if hint in _SCALARS:
        return _read_scalar(hint, value, where)
    choices = _choices(hint)
    _require(isinstance(value, str) and value in choices, where, value, f"one of {', '.join(choices)}")
    return value if origin is typing.Literal else hint(value)


def schema(hint: Any, records: dict[str, Any], *, closed: bool) -> dict[str, Any]:
    """JSON Schema (2020-12) of what ``read`` takes for ``hint``.

    Args:
        records: gets the schemas of the dataclasses met, by name, to be placed under ``#/components/schemas``.
        closed: whether records refuse fields that they do not have.
    """
    if dataclasses.is_dataclass(hint):
        name = hint.__name__
        if name not in records:
            records[name] = {}  # met; filled below
            records[name] = _record_schema(hint, records, closed)
        return {"$ref": f"#/components/schemas/{name}"}
    if hint == _TEXT_OR_BYTES:
        coded = {"properties": {_CODED: schema(bytes, records, closed=closed)}, "additionalProperties": False}
        return {"anyOf": [schema(str, records, closed=closed), {"type": "object", "required": [_CODED]} | coded]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return {"anyOf": [schema(_without_none(inner), records, closed=closed), {"type": "null"}]}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": schema(inner[1], records, closed=closed)}
    if origin is Sequence:
        return {"type": "array", "items": schema(inner[0], records, closed=closed)}
    if hint in _SCALARS:
        return dict(_SCALARS[hint][0])
    return {"type": "string", "enum": list(_choices(hint))}


def _record_schema(record: Any, records: dict[str, Any], closed: bool) -> dict[str, Any]:
    fields = dataclasses.fields(record)
    described = {
        "type": "object",
        "description": " ".join((record.__doc__ or "").split()),
        "properties": {
            field.name: schema(_hints(record)[field.name], records, closed=closed) | dict(field.metadata)
            for field in fields
        },
        "required": [field.name for field in fields if _needed(field)],
    }
    return described | ({"additionalProperties": False} if closed else {})


def _read_record(record: Any, value: Any, where: str, closed: bool) -> Any:
    _require(isinstance(value, dict), where, value, "an object")
    inside = f"{where}." if where else ""
    known = {field.name: field for field in dataclasses.fields(record)}
    unknown = next((name for name in value if name not in known), None)
    if closed and unknown is not None:
        raise Malformed(inside + unknown, value[unknown], f"left out: the fields are {', '.join(known)}")
    found = {}
    for name, field in known.items():
        if name in value:
            found[name] = read(_hints(record)[name], value[name], inside + name, closed=closed)
            _check_bounds(field.metadata, found[name], inside + name)
        elif _needed(field):
            raise Malformed(inside + name, None, "given")
    return record(**found)


def _check_bounds(keywords: Mapping[str, Any], value: Any, where: str) -> None:
    for keyword, (holds, words) in _BOUNDS.items():
        if keyword in keywords and value is not None and not holds(value, keywords[keyword]):
            raise Malformed(where, value, words.format(keywords[keyword]))


def _read_scalar(hint: type, value: Any, where: str) -> Any:
    expected = _SCALARS[hint][1]
    if hint in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(number and (hint is float or value == value // 1), where, value, expected)
        return int(value) if hint is int else value
    _require(isinstance(value, str if hint is bytes else hint), where, value, expected)
    if hint is not bytes:
        return value
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise Malformed(where, value, expected) from error


def _marked(value: str | bytes) -> Any:
    return {_CODED: value} if isinstance(value, bytes) else value


def _read_text_or_bytes(value: Any, where: str) -> str | bytes:
    if isinstance(value, str):
        return value
    _require(isinstance(value, dict) and list(value) == [_CODED], where, value, f'a string, or {{"{_CODED}": "..."}}')
    return _read_scalar(bytes, value[_CODED], f"{where}.{_CODED}")


def _require(holds: bool, where: str, value: Any, expected: str) -> None:
    if not holds:
        raise Malformed(where, value, expected)


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _without_none(parts: Sequence[Any]) -> Any:
    (part,) = (part for part in parts if part is not types.NoneType)
    return part


def _choices(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    assert issubclass(hint, enum.StrEnum)
    return tuple(member.value for member in hint)

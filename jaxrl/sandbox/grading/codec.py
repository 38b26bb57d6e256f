"""Values as JSON, between the jail that holds a program and the jail that holds its test.

Its text is run in both jails, so it imports nothing of jaxrl. Plain data alone crosses, and a subclass crosses as what
it is a subclass of: no object of a program, hence no ``__eq__`` or ``__bool__`` of its own, ever meets the test.
"""

import json

# The files in which things cross.
QUESTIONS = "questions"  # a line of JSON each: packed (arguments, keywords)
ANSWERS = (
    "answers"  # in the same order: ["value", packed], ["object", class, truth] or ["raised", class, packed arguments]
)
EXAM = "exam"  # the test
VERDICT = "verdict"  # a word, and on the next line what is to be said about it

_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
_SEQUENCES = (list, tuple)
_SETS = (set, frozenset)
_SHORT = 1 << 63  # longer integers are written in base 16: the decimal form is slow, and Python limits its length


class NotData(TypeError):
    """A value that is no plain data."""

    def __init__(self, value: object) -> None:
        super().__init__(f"a value of type {type(value).__module__}.{type(value).__name__} is no plain data")
        self.value = value


def line(packed: object) -> str:
    """What ``pack`` made, as one line of text."""
    return json.dumps(packed) + "\n"


def lines(text: bytes) -> list[object]:
    """The inverse of ``line`` for many; a line that does not end is left out.

    Raises:
        ValueError, RecursionError: a line is no JSON.
    """
    return [json.loads(whole) for whole in text.split(b"\n")[:-1]]


def pack(value: object) -> object:
    """The value as JSON knows it; all that JSON does not tell apart becomes a list that begins with a word.

    Raises:
        NotData: the value or a part of it is not None, a number, text, bytes, a list, tuple, set or dictionary of such,
            or the type of one of those.
        RecursionError: the value contains itself, or is nested too deeply.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if -_SHORT < value < _SHORT else ["int", hex(value)]
    for kind in _SEQUENCES:
        if isinstance(value, kind):
            return [kind.__name__, *map(pack, value)]
    for kind in _SETS:
        if isinstance(value, kind):  # in one order everywhere, so that equal sets are equal text
            return [kind.__name__, *sorted(map(pack, value), key=line)]
    if isinstance(value, dict):
        return ["dict", *([pack(key), pack(held)] for key, held in value.items())]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    return _pack_number(value)


def _pack_number(value: object) -> object:
    """Numbers of other libraries, which equal Python's own."""
    import numbers

    kind = f"{type(value).__module__}.{type(value).__name__}"
    if kind in ("numpy.bool", "numpy.bool_"):
        return bool(value)
    if kind in ("fractions.Fraction", "decimal.Decimal"):
        return [kind, str(value)]
    if isinstance(value, numbers.Integral):
        return pack(int(value))
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(value)
    raise NotData(value)


def unpack(packed: object) -> object:
    """What was packed, from JSON that anybody may have written.

    Raises:
        ValueError, LookupError, TypeError, RecursionError: ``pack`` has not made this.
    """
    if not isinstance(packed, list):
        return packed
    word, *parts = packed
    if word == "dict":
        return {unpack(key): unpack(held) for key, held in parts}
    if word == "int":
        return int(parts[0], 16)
    if word == "complex":
        return complex(*parts)
    if word == "bytes":
        return bytes.fromhex(parts[0])
    if word == "type":
        return _TYPES[parts[0]]
    if word == "fractions.Fraction":
        from fractions import Fraction

        return Fraction(parts[0])
    if word == "decimal.Decimal":
        from decimal import Decimal

        return Decimal(parts[0])
    return _TYPES[word](map(unpack, parts))

"""Integers as people write them, compared without a computer algebra system."""

import re

_GROUP = r"(?:,|\{,\}|\\,|\s)"
_INTEGER = re.compile(rf"([-+]?)(?:\\?\$)?([0-9]+|[1-9][0-9]{{0,2}}(?:{_GROUP}[0-9]{{3}})+)(?:\.0*)?")
_MATHS = re.compile(r"\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)


def read_integer(text: str) -> str | None:
    """The one integer a text consists of, in canonical digits, or None where the text is anything else.

    Read as integers: ``84``, ``+84``, ``084``, ``84.``, ``84.0``, ``$84`` (currency), ``$84$`` (maths), ``1,080``,
    ``1{,}080``, ``1\\,080``, ``1 080`` and ``−84``. Not read, because it is more or other than one integer: ``84 85``,
    ``8,4``, ``84.5``, ``84%``, ``84 apples``, ``8e1``. Digits are compared as text, so that length costs nothing.
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if maths := _MATHS.fullmatch(text):
        text = next(group for group in maths.groups() if group is not None).strip()
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = re.sub(r"[^0-9]", "", match.group(2)).lstrip("0") or "0"
    return "-" + digits if match.group(1) == "-" and digits != "0" else digits


def same_integer(answer: str, gold: str) -> bool | None:
    """Whether two texts are the same integer; None where one of them is no plain integer."""
    left, right = read_integer(answer), read_integer(gold)
    return None if left is None or right is None else left == right

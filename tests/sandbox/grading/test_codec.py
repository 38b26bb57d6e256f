"""Values survive the way between two jails, and nothing but plain data makes it."""

import enum
import math
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.sandbox.grading import codec

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 63)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.sampled_from([int, str, list, dict])
)
_HASHABLE = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)
_VALUES = st.recursive(
    _HASHABLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_HASHABLE, inner, max_size=4) | st.sets(_HASHABLE),
    max_leaves=8,
)


def crossed(value: object) -> Any:
    (packed,) = codec.lines(codec.line(codec.pack(value)).encode())
    return codec.unpack(packed)


@given(_VALUES)
def test_a_value_arrives_equal_and_of_the_same_types(value: object) -> None:
    assert crossed(value) == value
    assert _shape(crossed(value)) == _shape(value)


def _shape(value: object) -> object:
    if isinstance(value, list | tuple):
        return type(value), [_shape(part) for part in value]
    if isinstance(value, dict):
        return dict, [(_shape(key), _shape(held)) for key, held in value.items()]
    return type(value)


@given(st.permutations([0, 8, 16]))
def test_equal_sets_are_equal_text(members: list) -> None:
    """The order in which a set is gone through depends on how it came about, and with text on the process."""
    backwards = members[::-1]
    assert codec.line(codec.pack(set(members))) == codec.line(codec.pack(set(backwards)))


@pytest.mark.parametrize("text", ["\ud800", "\0", "a\nb", "\u2028"])
def test_any_text_arrives_on_one_line(text: str) -> None:
    assert crossed(text) == text
    assert codec.line(codec.pack(text)).count("\n") == 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [(np.int64(3), 3), (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.bool_(True), True), (np.str_("a"), "a")],
)
def test_numbers_of_numpy_arrive_as_pythons(value: object, plain: object) -> None:
    assert crossed(value) == plain
    assert type(crossed(value)) is type(plain)


def test_integers_too_long_for_decimal_digits_arrive() -> None:
    assert crossed(-(10**5000)) == -(10**5000)


def test_infinities_and_nan_arrive() -> None:
    assert crossed([math.inf, -math.inf]) == [math.inf, -math.inf]
    assert math.isnan(crossed(math.nan))


class _Yes(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def test_a_subclass_arrives_without_its_methods() -> None:
    assert _Yes(1) == 2
    assert type(crossed(_Yes(1))) is int
    assert crossed([_Yes(1)]) != [2]


class _Point(NamedTuple):
    x: int


class _Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [(_Point(1), (1,)), (Counter("aa"), {"a": 2}), ([_Point(1)], [(1,)]), (_Colour.RED, 1), (bytearray(b"a"), b"a")],
)
def test_a_subclass_arrives_as_what_it_extends(value: object, plain: object) -> None:
    assert crossed(value) == plain == value
    assert _shape(crossed(value)) == _shape(plain)


@pytest.mark.parametrize("value", [object(), lambda: 1, [object()], {"a": iter([])}, math, np.zeros(2), codec.NotData])
def test_other_objects_are_refused_by_type(value: object) -> None:
    with pytest.raises(codec.NotData, match="a value of type .* is no plain data"):
        codec.pack(value)


def test_a_value_in_itself_is_refused() -> None:
    knot: list = []
    knot.append(knot)
    with pytest.raises(RecursionError):
        codec.pack(knot)


@pytest.mark.parametrize(
    "packed",
    [["eval", "1"], ["type", "object"], ["type", "__import__"], [], [[]], ["dict", 1], ["int"], ["bytes", "x"]],
)
def test_what_nobody_packed_is_refused(packed: object) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        codec.unpack(packed)


def test_a_line_cut_short_is_left_out() -> None:
    assert codec.lines(b"1\n[2]\n[3") == [1, [2]]


def test_the_codec_needs_nothing_but_the_standard_library() -> None:
    """Its text runs where this package is not."""
    with open(codec.__file__, encoding="utf-8") as file:
        subprocess.run([sys.executable, "-I", "-S", "-c", file.read()], check=True)

"""When printed output counts as the expected one, and returned numbers as close."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.sandbox.grading import CallTest, StdioTest
from jaxrl.sandbox.grading.closeness import close
from jaxrl.sandbox.grading.codec import NotData


@pytest.mark.parametrize("printed", ["1 2\n3\n", "1 2\n3", "1 2 \n3\t\n\n\n", "1 2\r\n3\r\n"])
def test_white_space_at_ends_does_not_count(printed: str) -> None:
    assert StdioTest("", "1 2\n3\n").accepts(printed)


@pytest.mark.parametrize(
    "printed", ["", "1 2 3", "1  2\n3", "1 2\n\n3", " 1 2\n3", "\n1 2\n3", "1 2\n3\n4", "1 2\n3.0"]
)
def test_any_other_difference_counts(printed: str) -> None:
    assert not StdioTest("", "1 2\n3\n").accepts(printed)


@pytest.mark.parametrize(
    ("printed", "accepted"),
    [("0.333333 yes", True), (" 3.333e-1\nyes", True), ("0.34 yes", False), ("0.333333 no", False), ("0.3333", False)],
)
def test_numbers_may_be_off_by_the_tolerance(printed: str, accepted: bool) -> None:
    assert StdioTest("", "0.33333333 yes", tolerance=1e-3).accepts(printed) == accepted


def test_nan_is_the_printed_word_and_no_number() -> None:
    assert StdioTest("", "nan", tolerance=1.0).accepts("nan")
    assert not StdioTest("", "1.0", tolerance=1.0).accepts("nan")


@given(st.text(), st.floats(0, 1))
def test_an_output_is_its_own_expected_one(text: str, tolerance: float) -> None:
    assert StdioTest("", text, tolerance).accepts(text)


@pytest.mark.parametrize(
    ("got", "wanted", "agree"),
    [
        (1.0005, 1, True),
        (1.005, 1, False),
        (1e6 + 500, 1e6, True),
        ([1.0, (2.0004,)], [1, (2,)], True),
        ([1.0, 2.0], [1.0], False),
        ([1.0], (1.0,), False),
        ({"a": 1.0001}, {"a": 1}, True),
        ({"a": 1.0, "b": 1}, {"a": 1}, False),
        (1 + 1.0001j, 1 + 1j, True),
        (float("nan"), 1.0, False),
        (float("inf"), float("inf"), True),
        ("1.0001", 1, False),
        (None, None, True),
    ],
)
def test_close(got: object, wanted: object, agree: bool) -> None:
    assert close(got, wanted, 1e-3) == agree


@pytest.mark.parametrize("field", [{"arguments": [object()]}, {"expected": object()}, {"keywords": {"a": object()}}])
def test_a_call_with_what_is_no_data_is_refused_when_it_is_written(field: dict) -> None:
    with pytest.raises(NotData, match="builtins.object is no plain data"):
        CallTest(**{"function": "f", "arguments": [], "expected": 1} | field)

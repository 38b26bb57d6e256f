import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rewards.integers import read_integer, same_integer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("84", "84"), (" 84 ", "84"), ("84.0", "84"), ("84.", "84"), ("+84", "84"), ("084", "84"), ("-84", "-84"),
        ("−84", "-84"), ("-0", "0"), ("000", "0"), ("$84", "84"), ("\\$84", "84"), ("$84$", "84"), ("\\(84\\)", "84"),
        ("1,080", "1080"), ("1{,}080", "1080"), ("1\\,080", "1080"), ("1 080", "1080"), ("12,345,678.00", "12345678"),
    ],
)  # fmt: skip
def test_forms_of_one_integer(text, value):
    assert read_integer(text) == value


@pytest.mark.parametrize(
    "text",
    ["84 85", "84,85", "8,4", "1,08", "1,0800", "0,084", "84.5", "84%", "84 apples", "8e1", "1/2", "", "x", "--84",
     "8 4", "84\n85", "４２", "1,080 1,080", "$84$85$"],
)  # fmt: skip
def test_anything_else_is_no_integer(text):
    assert read_integer(text) is None


@settings(deadline=None)
@given(st.integers(), st.integers())
def test_agrees_with_python(left, right):
    for form in (str, "{:,}".format, "{}.0".format):
        assert same_integer(form(left), str(right)) is (left == right)
        assert same_integer(form(left), form(left)) is True


def test_length_costs_nothing_and_raises_nothing():
    assert same_integer("1" * 100_000, "1" * 100_000) is True
    assert same_integer("1" * 100_000, "1" * 99_999) is False


def test_undecided_where_one_is_no_integer():
    assert same_integer("84", "x") is None
    assert same_integer("x", "84") is None

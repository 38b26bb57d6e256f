"""The interpreter says what Python says, and runs nothing but arithmetic."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.arithmetic import UnsupportedProgram, run

NUMBERS = st.one_of(st.integers(0, 999).map(str), st.sampled_from(["0.5", ".25", "3.0", "1e2"]))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_values_are_those_of_python(expression):
    try:
        expected = repr(eval(expression))
    except ZeroDivisionError as error:
        assert run(expression).text == f"ZeroDivisionError: {error}"
        assert run(expression).failed
    else:
        assert run(expression).text == expected
        assert run(expression).value == eval(expression)


def test_programs_with_names():
    assert run("a = 48/2\nb = c = 48+a\nb+c-72").text == "72.0"
    assert run("2**10").value == 1024


def test_a_program_without_a_last_expression_shows_nothing():
    assert run("a = 1").text == ""
    assert run("5\na = 1").value is None
    assert run("").text == ""


def test_failures_are_worded_as_python_words_them():
    for code in ("12*x", "12*7)", "(12*7", "12*7+", "1//0", "1/0", "5x", "a = 1\nb"):
        theirs = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        output = run(code)
        assert output.failed
        assert output.value is None
        assert output.text == theirs.stderr.splitlines()[-1], code


@pytest.mark.parametrize(
    "code",
    [
        "print(1)", "__import__('os')", "'a'*9", "[1]", "True+1", "1j", "x.y", "import os", "a, b = 1, 2", "a += 1",
        "(lambda: 1)()", "1 if 1 else 2", "9**9**9", "2**1000", "10**15*10", "1e308*10", "~5", "def f(): pass",
        "a[0] = 1", "None", "...", "-" * 100_000 + "1",
    ],
)  # fmt: skip
def test_anything_else_is_refused(code):
    with pytest.raises(UnsupportedProgram):
        run(code)

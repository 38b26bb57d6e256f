"""What of a test runs beside the program is read off the test, and never holds an expected answer."""

import json

import pytest

from jaxrl.sandbox.grading import CallTest, CodeTest, NotHidden
from jaxrl.sandbox.grading.plan import divide

ANSWER = "31415926"


@pytest.mark.parametrize(
    ("code", "function", "modules"),
    [
        ("assert double(3) == 6", "double", []),
        ("assert set(double(3)) == set(range(6))", "double", []),
        ("import math\nassert math.isclose(double(3), 6.0)", "double", []),
        ("assert double((1, 2)) == sys.getsizeof((1, 2))", "double", ["sys"]),
        ("assert sum(1, 2) == 3", "sum", []),
        ("def check(f):\n    for n in range(3):\n        assert f(n) == 2 * n\ncheck(double)", "double", []),
        ("class T:\n    def t(self):\n        assert double(1) == 2\nT().t()", "double", []),
    ],
)
def test_the_function_and_the_modules_of_a_test_are_found(code: str, function: str, modules: list[str]) -> None:
    named = function if "check" in code else ""
    plan = divide(CodeTest(code, named))
    assert (plan.function, json.loads(plan.exam)["modules"], plan.obstacle) == (function, modules, "")


@pytest.mark.parametrize(
    ("code", "obstacle"),
    [
        ("assert double(1) == triple(1)", "it is not said which of ['double', 'triple'] the test is of"),
        ("assert len(sum([1])) == 1", "it is not said which of ['len', 'sum'] the test is of"),
        ("p = Pair(1)\nassert first(p).x == 1", "it is not said which of ['Pair', 'first'] the test is of"),
        ("pass", "it is not said which of [] the test is of"),
    ],
)
def test_what_cannot_be_divided_says_why(code: str, obstacle: str) -> None:
    assert divide(CodeTest(code)).obstacle == obstacle


def test_a_test_that_needs_more_of_the_program_says_what() -> None:
    plan = divide(CodeTest("p = Pair(1)\nassert first(p).x == 1", "first"))
    assert plan.obstacle == "the test needs ['Pair'] of the program besides 'first'"


@pytest.mark.parametrize(
    ("code", "alone"),
    [
        ("assert double(3) == 6", None),
        ("import re\nx = [1]\nassert double(x) == 6\ny = 1", ("", "import re\nx = [1]")),
        ("assert sum(1, 2) == 3", None),
        ("x = math.pi\nassert double(x) == 6", None),
        ("def check(f):\n    assert f(1) == 2\ncheck(double)", ("", "def check(f):\n    assert f(1) == 2")),
        ("from program import double\nassert double(1) == 2", None),
    ],
)
def test_what_runs_before_a_test_needs_its_program(code: str, alone: tuple[str, str] | None) -> None:
    assert divide(CodeTest(code)).alone == alone
    assert divide(CallTest("double", [1], 2).as_code()).alone is None
    assert divide(CallTest("a.double", [1], 2, tolerance=0.1).as_code()).alone is None


def test_helpers_in_the_prelude_are_no_strangers() -> None:
    test = CodeTest("assert decode(encode('x')) == 'x'", "", "def encode(text):\n    return text[::-1]")
    assert divide(test).function == "decode"


@pytest.mark.parametrize(
    "test",
    [
        CodeTest(f"assert f(1) == {ANSWER}"),
        CodeTest(f"def check(c):\n    assert c(1) == {ANSWER}\ncheck(f)", "f"),
        CodeTest(f"a = Pair(1)\nassert f(a) == {ANSWER}"),
        CallTest("f", [1], int(ANSWER)).as_code(),
        CallTest("f", [1], float(ANSWER), tolerance=0.1).as_code(),
    ],
)
def test_the_programs_side_holds_no_answer(test: CodeTest) -> None:
    plan = divide(test)
    assert not plan.obstacle
    assert ANSWER in plan.exam.decode()
    assert ANSWER not in plan.beside and ANSWER.encode() not in plan.questions


@pytest.mark.parametrize(
    "code",
    [
        f"a = Pair({ANSWER})\nassert a.x == {ANSWER}\nassert f(a) == 1",
        f"a = Pair(1)\nassert (f(a) == {ANSWER}) == True",
        f"a, wanted = Pair(1), {ANSWER}\nassert f(a) == wanted",
        f"a = Pair(1)\nassert f(a) - {ANSWER} == 0",
    ],
)
def test_set_up_that_may_hold_an_answer_is_not_put_beside_the_program(code: str) -> None:
    plan = divide(CodeTest(code, "f"))
    assert plan.obstacle and not plan.beside


def test_only_a_plain_assert_is_foreseen() -> None:
    assert divide(CodeTest("import math\nassert f(1, k=[2]) == {'a': (1.5, None)}")).right_answers == (
        b'["value", ["dict", ["a", ["tuple", 1.5, null]]]]\n'
    )
    for code in (
        "assert f(1) == f(1)",
        "assert f(1) == 2 == 3",
        "assert f(1) != 2",
        "assert f(1) is True",
        "assert f(f(1)) == 2",
        "assert f(**{'a': 1}) == 2",
        "assert f(1) == 2\nassert f(2) == 3",
        "x = 1\nassert f(1) == 2",
    ):
        plan = divide(CodeTest(code, "f"))
        assert (plan.questions, plan.right_answers, plan.obstacle) == (b"", None, ""), code


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(NotHidden, ValueError)

"""Programs are graded as their test would grade them if it ran beside them."""

import dataclasses

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, SandboxUnavailable
from jaxrl.sandbox.grading import CallTest, CodeTest, Grade, Grader, NotHidden, StdioTest, Test
from tests.sandbox.driver import LIMITS, Driver

DOUBLE = "def double(x):\n    return 2 * x"


def grade(sandbox: Driver, program: str, test: Test, hidden_only: bool = True) -> Grade:
    return sandbox.wait(Grader(sandbox.pool, LIMITS, hidden_only=hidden_only).grade(program, test))


@pytest.mark.parametrize(
    ("test", "passed"),
    [
        (CallTest("double", [3], 6), True),
        (CallTest("double", [3], 6.0), True),
        (CallTest("double", [3], 7), False),
        (CallTest("double", [], 6, {"x": 3}), True),
        (CallTest("double", [[1, (2,)]], [1, (2,)] * 2), True),
        (CallTest("double", [[1]], (1, 1)), False),
        (CallTest("double", [0.15], 0.30001, tolerance=1e-3), True),
        (CallTest("double", [0.15], 0.30001), False),
        (CallTest("double", [float("inf")], float("inf")), True),
        (CodeTest("assert double(3) == 6"), True),
        (CodeTest("assert double(3) == 7"), False),
        (CodeTest("assert double(3)"), True),
        (CodeTest("assert not double(3)"), False),
        (CodeTest("assert double('A').lower() == 'aa'"), True),
        (CodeTest("assert str(double(float('nan'))) == 'nan'", "double"), True),
        (CodeTest("assert len(double([{'a', 'b', 'c', 'd', 'e'}])) == 2", "double"), True),
        (CodeTest("assert triple(1) == 3", "triple", "", "def triple(x): return double(x) + x"), True),
        (CodeTest("for n in range(50):\n    assert not double(n) - n - n"), True),  # a failing assert hides no question
        (CodeTest("assert {6} == set([double(3)])", "double"), True),
        (CodeTest("assert double('a') == 'aa' and double(1) == 2"), True),
        (CodeTest("assert double(1) == 2\nassert double(2) == 5\nassert double(3) == 6"), False),
        (CodeTest("for n in range(50):\n    assert double(n) == n + n"), True),
        (CodeTest("import random\nfor _ in range(9):\n    n = random.random()\n    assert double(n) == n * 2"), True),
        (CodeTest("assert math.isclose(double(0.15), 0.3)"), True),
        (CodeTest("try:\n    double(None)\nexcept TypeError:\n    pass\nelse:\n    assert False", "double"), True),
        (CodeTest("try:\n    double(1)\nexcept TypeError:\n    pass\nelse:\n    assert False", "double"), False),
        (CodeTest("x = double(1)\nassert double(double(x) + x) == 12"), True),
        (CodeTest("x = int(double(3))\nassert double(x) == 12"), True),
        (CodeTest("x = int(double(3))\nassert double(x) == 2"), False),
        (CodeTest("n = 1\nwhile n < 100:\n    n = double(n)\nassert n == 128"), True),
        (CodeTest("n = 0\nwhile double(n) < 100:\n    n += 1\nassert n == 50"), True),
    ],
)
def test_a_test_passes_or_not(sandbox: Driver, test: Test, passed: bool) -> None:
    found = grade(sandbox, DOUBLE, test)
    assert (found.passed, found.status, found.hidden) == (passed, ToolStatus.OK, True), found
    assert bool(found.detail) != passed
    assert found.cpu_seconds > 0 and found.wall_seconds > 0


def test_a_test_may_not_ask_for_ever(sandbox: Driver) -> None:
    found = grade(sandbox, DOUBLE, CodeTest("n = 1\nwhile n < 1 << 40:\n    n = double(n)"))
    assert not found.passed
    assert found.detail == "after 32 rounds the test still had questions"


def test_a_question_that_the_test_would_not_ask_does_no_harm(sandbox: Driver) -> None:
    """Blindly the loop asks a thousand times; every question after the fifth takes for ever."""
    program = "def slow(n):\n    while n > 5: pass\n    return n"
    found = grade(sandbox, program, CodeTest("n = 0\nwhile slow(n) < 5:\n    n += 1\nassert n == 5"))
    assert found.passed, found
    found = grade(sandbox, program, CodeTest("n = 0\nwhile slow(n) < 6:\n    n += 1\nassert n == 6"))
    assert (found.passed, found.status) == (False, ToolStatus.TIMEOUT), found


@pytest.mark.parametrize(("expected", "passed"), [(("a", 2), True), (("a", 3), False)])
def test_methods_are_called_where_their_object_is(sandbox: Driver, expected: tuple, passed: bool) -> None:
    program = "class Solution:\n    def __init__(self): self.a = 'a'\n    def solve(self, n): return self.a, n"
    assert grade(sandbox, program, CallTest("Solution().solve", [2], expected)).passed == passed
    assert grade(sandbox, program, CallTest("Solution().solve", [2], expected, tolerance=0.1)).passed == passed
    assert grade(sandbox, program, CodeTest(f"assert Solution().solve(2) == {expected}")).passed == passed
    assert (
        grade(sandbox, program, CodeTest(f"s = Solution()\nassert s.solve(2) == {expected}", "Solution")).passed
        == passed
    )


@pytest.mark.parametrize("raised", ["KeyError('a')", "OSError(2, 'gone')", "UnicodeDecodeError('a', b'b', 0, 1, 'c')"])
def test_an_exception_arrives_with_its_arguments(sandbox: Driver, raised: str) -> None:
    compared = f"assert (type(error), error.args) == (type({raised}), {raised}.args)"
    code = f"try:\n    f(1)\nexcept Exception as error:\n    {compared}\nelse:\n    assert False"
    assert grade(sandbox, f"def f(x): raise {raised}", CodeTest(code, "f")).passed
    child = "class Own(ValueError): pass\ndef f(x): raise Own(1, object())"
    assert grade(sandbox, child, CodeTest("try:\n    f(1)\nexcept ValueError:\n    pass", "f")).passed


def test_all_questions_of_a_test_go_to_one_process(sandbox: Driver) -> None:
    program = "seen = []\ndef count():\n    seen.append(1)\n    return len(seen)"
    assert grade(sandbox, program, CodeTest("assert [count() for _ in range(3)] == [1, 2, 3]", "count")).passed
    assert grade(sandbox, program, CallTest("count", [], 1)).passed


def test_arguments_are_passed_by_value(sandbox: Driver) -> None:
    test = CodeTest("x = [1, 2]\nassert grow(x) == [1, 2, 0]\nassert x == [1, 2]")
    assert grade(sandbox, "def grow(x):\n    x.append(0)\n    return x", test).passed


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("def f(x): return 1 / 0", ToolStatus.ERROR),
        ("def g(x): return x", ToolStatus.ERROR),
        ("def f(x", ToolStatus.ERROR),
        ("import nowhere", ToolStatus.ERROR),
        ("def f():\n    return 1", ToolStatus.ERROR),
        ("def f(x):\n    while True: pass", ToolStatus.TIMEOUT),
        ("def f(x): return [0] * 10**9", ToolStatus.OUT_OF_MEMORY),
        ("def f(x):\n    while True: print('x' * 4096)", ToolStatus.OUTPUT_LIMIT),
        ("def f(x): import os; os.kill(os.getpid(), 9) or os.abort()", ToolStatus.ERROR),
        ("import os\ndef f(x): os._exit(0)", ToolStatus.ERROR),
        ("def f(x): raise SystemExit", ToolStatus.ERROR),
        ("def f(x): return x + 1", ToolStatus.OK),
    ],
)
def test_a_failure_has_the_status_of_the_programs_call(sandbox: Driver, program: str, status: ToolStatus) -> None:
    for test in (CodeTest("assert f(1) == 1"), CodeTest("def check(f):\n    assert f(1) == 1\ncheck(f)", "f")):
        found = grade(sandbox, program, test)
        assert (found.passed, found.status) == (False, status), found
        assert found.cpu_seconds > 0


def test_a_test_that_never_asks_is_given_up(sandbox: Driver) -> None:
    """It may be the machine that was busy, so this is no reason to run it beside the program."""
    for hidden_only in (True, False):
        found = grade(sandbox, DOUBLE, CodeTest("while True:\n    pass\ndouble(1)"), hidden_only)
        assert found.is_infra and not found.passed
        assert found.detail.startswith("the test ran into timeout before it asked anything"), found


@pytest.mark.parametrize("mebibytes", [7, 8, 12])
def test_a_long_answer_is_no_fault_of_ours(sandbox: Driver, mebibytes: int) -> None:
    """As large as the working directory of its test's call, which it must not keep from being set up."""
    assert LIMITS.disk_mib == 8
    program = f"def f(x): return 'x' * ({mebibytes} * 2**20 - 20)"
    found = grade(sandbox, program, CodeTest("assert len(f(1)) == 1", "f"))
    assert (found.passed, found.status) in ((False, ToolStatus.OK), (False, ToolStatus.ERROR)), found


@pytest.mark.parametrize(("length", "true"), [(0, False), (1, True)])
def test_an_object_of_the_program_is_as_true_as_it_was_there(sandbox: Driver, length: int, true: bool) -> None:
    program = f"class Found:\n    def __len__(self): return {length}\ndef f(x): return Found()"
    assert grade(sandbox, program, CodeTest("assert f(1)")).passed == true
    assert grade(sandbox, program, CodeTest("assert not f(1)")).passed != true
    assert grade(sandbox, program, CodeTest("assert f(1) is not None")).passed
    assert not grade(sandbox, program, CodeTest("assert f(1) == f(1)")).passed


def test_main_blocks_run_in_whole_programs_only(sandbox: Driver) -> None:
    program = "def f(x): return x\nif __name__ == '__main__':\n    print(f(input()))"
    assert grade(sandbox, program, CallTest("f", [1], 1)).passed
    assert grade(sandbox, program, StdioTest("7", "7")).passed


def test_a_program_may_change_its_folder_and_define_classes(sandbox: Driver) -> None:
    program = """
import dataclasses, os, pickle
@dataclasses.dataclass
class Point:
    x: int
os.mkdir("deep"); os.chdir("deep")
def f(x):
    return pickle.loads(pickle.dumps(Point(x))).x
"""
    assert grade(sandbox, program, CallTest("f", [1], 1)).passed


def test_output_longer_than_the_pools_cap_is_compared_whole(sandbox: Driver) -> None:
    expected = "\n".join(map(str, range(20_000)))
    assert len(expected) > LIMITS.output_kib * 1024
    assert grade(sandbox, "print(*range(20_000), sep='\\n')", StdioTest("", expected)).passed
    found = grade(sandbox, "print(*range(20_001), sep='\\n')", StdioTest("", expected))
    assert (found.passed, found.status) == (False, ToolStatus.OK)
    found = grade(sandbox, "print('1'); print('\\n' * 2_000_000)", StdioTest("", "1"))
    assert (found.passed, found.status) == (False, ToolStatus.OK), "what was cut out may have been anything"


def test_modules_that_a_program_mentions_are_there_loaded(sandbox: Driver) -> None:
    program = (
        "import sys\nloaded = 'numpy' in sys.modules\nimport numpy\ndef f(n): return numpy.int64(n) if loaded else -1"
    )
    assert grade(sandbox, program, CallTest("f", [5], 5)).passed


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("assert f(lambda: 1) == 1", "a question of the test cannot leave its process: .* builtins.function"),
        ("assert f.__name__ == 'f'\nf(1)", "the test failed before it asked anything: AssertionError:  at: assert f._"),
        ("def check(f): assert f(1) == 1", "the test passed before it asked anything: "),
        ("c = Box()\nassert f(c).x == 1", "the test needs \\['Box'\\] of the program besides 'f'"),
    ],
)
def test_what_cannot_be_hidden_is_refused_or_said(sandbox: Driver, code: str, said: str) -> None:
    program = "class Box: x = 1\ndef f(x): return x if isinstance(x, Box) else 1"
    test = CodeTest(code, "f")
    with pytest.raises(NotHidden, match=f"hidden_only=True but {said}"):
        grade(sandbox, program, test)
    found = grade(sandbox, program, test, hidden_only=False)
    assert not found.hidden
    assert found.passed, found


@pytest.mark.parametrize(
    ("code", "prelude", "reason"),
    [
        ("import nothere\nassert f(1) == 2", "", "No module named 'nothere'"),
        ("assert f(1) == 2", "import nothere", "No module named 'nothere'"),
        ("from math import nothere\nassert f(1) == 2", "", "cannot import name 'nothere'"),
        ("import nothere\nassert C().f(1) == 2", "", "No module named 'nothere'"),
        ("import nothere\nc = C()\nassert f(c).x == 1", "", "No module named 'nothere'"),
        ("x = 1 / 0\nassert f(x) == 2\nassert f(1) == 2", "", "division by zero"),
        ("assert 1 == 2\nassert f(1)", "", "AssertionError"),
        ("raise SystemExit\nassert f(1) == 2", "", "it ends the process"),
    ],
)
def test_what_no_program_can_pass_is_no_failure_of_the_programs(
    sandbox: Driver, code: str, prelude: str, reason: str
) -> None:
    program = "class C:\n    x = 1\n    def f(self, n): return n + 1\ndef f(x): return x if isinstance(x, C) else x + 1"
    for hidden_only in (True, False):
        found = grade(sandbox, program, CodeTest(code, "f", prelude), hidden_only)
        assert found.is_infra and not found.passed, found
        assert found.detail.startswith("the test cannot be run, whatever the program is: ") and reason in found.detail


@pytest.mark.parametrize(
    "code", ["from program import f\nassert f(1) == 2", "import program\nassert program.f(1) == 2"]
)
def test_a_test_that_imports_its_program_is_not_broken(sandbox: Driver, code: str) -> None:
    assert grade(sandbox, "def f(x): return x + 1", CodeTest(code), hidden_only=False).passed


def test_objects_of_the_program_in_arguments_need_not_show_the_answer(sandbox: Driver) -> None:
    test = CodeTest("root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2")
    program = """
class Node:
    def __init__(self, key): self.key, self.left = key, None
def depth(node): return 1 + depth(node.left) if node else 0
"""
    assert grade(sandbox, program, test).passed
    assert not grade(sandbox, program.replace("1 +", "2 +"), test).passed


def test_without_a_jail_nothing_counts_as_hidden() -> None:
    with Driver(workers=1, slots=1, preload=(), unsafe=True) as driver:
        found = grade(driver, DOUBLE, CallTest("double", [1], 2), hidden_only=False)
        assert (found.passed, found.hidden) == (True, False)
        with pytest.raises(ValueError, match="hidden_only=True but the pool's isolation is 'unsafe: none'"):
            Grader(driver.pool, LIMITS, hidden_only=True)


def test_the_limits_are_those_of_the_grader(sandbox: Driver) -> None:
    limits = Limits(cpu_seconds=0.3, wall_seconds=9.0, memory_mib=256)
    program = "import time\ndef f(x):\n    while time.process_time() < 0.45: pass\n    return x"
    test = CallTest("f", [1], 1)
    assert sandbox.wait(Grader(sandbox.pool, limits).grade(program, test)).status == ToolStatus.TIMEOUT
    limits = dataclasses.replace(limits, cpu_seconds=3.0)
    assert sandbox.wait(Grader(sandbox.pool, limits).grade(program, test)).passed


@pytest.mark.parametrize(
    ("language", "program"),
    [
        ("bash", "read n; echo $((2 * n))"),
        ("c++", "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << 2 * n << std::endl; }"),
    ],
)
def test_programs_in_other_languages_are_graded_by_what_they_print(
    sandbox: Driver, language: str, program: str
) -> None:
    tests = [StdioTest("21", "42", language=language), StdioTest("1", "3", language=language)]
    grader = Grader(sandbox.pool, LIMITS)
    try:
        matrix = sandbox.wait(grader.matrix([program, "what is this?"], tests))
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert matrix.passed.tolist() == [[True, False], [False, False]]
    assert matrix.status.tolist() == [["ok", "ok"], ["error", "error"]]

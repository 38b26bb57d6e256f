"""Programs x tests: each cell once, kept by content; faults of ours are no grades."""

import asyncio
import dataclasses
import pathlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Result, wire
from jaxrl.sandbox.grading import CallTest, CodeTest, Grade, Grader, NotHidden, StdioTest, Test, scripts
from jaxrl.sandbox.grading.cache import Cache
from tests.sandbox.driver import LIMITS, Driver, wait_until

PROGRAMS = ["def f(x): return x", "def f(x): return 2 * x", "def f(x): return 1 / x", "print(input())\nf = 1"]
TESTS: list[Test] = [
    CallTest("f", [1], 1),
    CallTest("f", [0], 0),
    CodeTest("for n in range(1, 4):\n    assert f(n) == 2 * n"),
    StdioTest("a", "a"),
]
OVERLOAD = ToolStatus.TIMEOUT
PASSED = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
STATUS = [["ok"] * 4, ["ok"] * 4, ["ok", "error", "ok", "ok"], ["error", "error", "error", "ok"]]


class Watched:
    """A pool that counts its calls, loses some, and ends the first examinations as ``ending`` says."""

    def __init__(self, driver: Driver, lost: float = 0.0, overloaded: int = 0, ending: ToolStatus = OVERLOAD) -> None:
        self.isolation, self.limits, self.most = driver.pool.isolation, driver.pool.limits, driver.pool.most
        self.overloaded, self.ending = overloaded, ending
        self.examined: list[Limits] = []
        self.beside = 0
        self.calls = 0
        self._driver = driver
        self._lost = lost
        self._draws = random.Random(1)

    async def run(self, code: str, **options: Any) -> Result:
        self.calls += 1
        result = await self._driver.pool.run(code, **options)
        self.beside += ").stand_beside(" in code
        if code == scripts.EXAMINE:
            self.examined.append(options["limits"])
            if len(self.examined) <= self.overloaded:
                return dataclasses.replace(result, status=self.ending, files={})
        if self._draws.random() < self._lost:
            return dataclasses.replace(result, status=ToolStatus.INFRA_ERROR, files={})
        return result


def test_each_cell_says_how_its_program_did_on_its_test(sandbox: Driver) -> None:
    matrix = sandbox.wait(Grader(sandbox.pool, LIMITS).matrix(PROGRAMS, TESTS))
    np.testing.assert_array_equal(matrix.passed, np.array(PASSED, bool))
    np.testing.assert_array_equal(matrix.status, np.array(STATUS))
    assert matrix.hidden.all() and not matrix.infra.any()
    assert (matrix.cpu_seconds > 0).all() and (matrix.wall_seconds > 0).all()
    assert matrix.cpu_seconds.dtype == np.float64 and matrix.passed.dtype == np.bool_
    assert (matrix.status == ToolStatus.ERROR).sum() == 4


@pytest.mark.parametrize(("programs", "tests"), [(0, 2), (2, 0), (0, 0)])
def test_an_empty_matrix_keeps_its_shape(sandbox: Driver, programs: int, tests: int) -> None:
    matrix = sandbox.wait(Grader(sandbox.pool, LIMITS).matrix(PROGRAMS[:programs], TESTS[:tests]))
    assert matrix.passed.shape == matrix.status.shape == matrix.cpu_seconds.shape == (programs, tests)


def test_a_program_is_run_once_however_often_it_is_given(sandbox: Driver) -> None:
    pool = Watched(sandbox)
    grader = Grader(pool, LIMITS)
    matrix = sandbox.wait(grader.matrix([PROGRAMS[0]] * 5, TESTS[:2]))
    assert pool.calls == 2
    assert matrix.passed.shape == (5, 2) and matrix.passed.all()
    again = sandbox.wait(grader.matrix(PROGRAMS[:1], TESTS[:2]))
    assert pool.calls == 2
    np.testing.assert_array_equal(again.cpu_seconds, matrix.cpu_seconds[:1])


def test_what_a_test_asks_is_found_once_for_all_programs(sandbox: Driver) -> None:
    pool = Watched(sandbox)
    programs = [f"def f(n): return n + n + 0 * {k}" for k in range(6)]
    matrix = sandbox.wait(Grader(pool, LIMITS).matrix(programs, [TESTS[2]]))
    assert matrix.passed.all()
    assert pool.calls == 1 + 2 * 6


def test_grades_are_kept_by_content(sandbox: Driver, tmp_path: pathlib.Path) -> None:
    pool = Watched(sandbox)
    folder = tmp_path / "grades"
    first = sandbox.wait(Grader(pool, LIMITS, cache_folder=folder).matrix(PROGRAMS, TESTS))
    calls = pool.calls
    again = sandbox.wait(Grader(pool, LIMITS, cache_folder=folder).matrix(PROGRAMS, TESTS))
    assert pool.calls == calls, "another grader finds them in the folder"
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))

    def calls_for(program: str, test: Test, limits: Limits = LIMITS, isolation: str = pool.isolation) -> int:
        before, pool.isolation = pool.calls, isolation
        sandbox.wait(Grader(pool, limits, cache_folder=folder).grade(program, test))
        return pool.calls - before

    test = CallTest("f", [1], 1)
    assert calls_for(PROGRAMS[0], test) == 0
    assert calls_for(PROGRAMS[0] + " ", test) == 1
    assert calls_for(PROGRAMS[0], dataclasses.replace(test, arguments=[True])) > 0
    assert calls_for(PROGRAMS[0], dataclasses.replace(test, tolerance=0.1)) > 0
    assert calls_for(PROGRAMS[0], test, dataclasses.replace(LIMITS, cpu_seconds=0.5)) == 1
    assert calls_for(PROGRAMS[0], test, isolation="another") == 1


def test_a_grade_that_was_not_hidden_is_no_grade_where_it_has_to_be(sandbox: Driver, tmp_path: pathlib.Path) -> None:
    test = CodeTest("b = Box()\nassert f(b) == 1 != b", "f")
    program = "Box = list\ndef f(x): return 1"
    assert sandbox.wait(Grader(sandbox.pool, LIMITS, cache_folder=tmp_path).grade(program, test)).passed
    with pytest.raises(NotHidden):
        sandbox.wait(Grader(sandbox.pool, LIMITS, cache_folder=tmp_path, hidden_only=True).grade(program, test))


def test_promise_5_faults_of_ours_are_masked_and_never_kept(sandbox: Driver, tmp_path: pathlib.Path) -> None:
    for lost in (0.1, 0.5, 1.0):
        folder = tmp_path / str(lost)
        matrix = sandbox.wait(Grader(Watched(sandbox, lost), LIMITS, cache_folder=folder).matrix(PROGRAMS, TESTS))
        assert matrix.infra.any() and (lost < 1 or matrix.infra.all())
        assert not matrix.passed[matrix.infra].any()
        np.testing.assert_array_equal(matrix.status == ToolStatus.INFRA_ERROR, matrix.infra)
        seen = ~matrix.infra
        np.testing.assert_array_equal(matrix.passed[seen], np.array(PASSED, bool)[seen])
        np.testing.assert_array_equal(matrix.status[seen], np.array(STATUS)[seen])
        assert len(list(folder.rglob("*.json"))) == seen.sum()
        calm = sandbox.wait(Grader(Watched(sandbox), LIMITS, cache_folder=folder).matrix(PROGRAMS, TESTS))
        np.testing.assert_array_equal(calm.passed, np.array(PASSED, bool))


def test_a_fault_of_ours_while_a_test_is_read_is_not_remembered(sandbox: Driver) -> None:
    pool = Watched(sandbox, lost=1.0)
    grader = Grader(pool, LIMITS)
    assert sandbox.wait(grader.grade(PROGRAMS[1], TESTS[2])).is_infra
    pool._lost = 0.0
    found = sandbox.wait(grader.grade(PROGRAMS[1], TESTS[2]))
    assert found.passed and found.hidden


SECRET = CodeTest("def check(f):\n    assert f(1) == 'SECRET'\ncheck(f)", "f")
THIEF = """
import sys
def f(x):
    return next(constant for constant in sys._getframe(1).f_code.co_consts if isinstance(constant, str))
"""


@pytest.mark.parametrize("ending", [ToolStatus.TIMEOUT, ToolStatus.OUT_OF_MEMORY, ToolStatus.OK])
def test_a_busy_machine_brings_no_test_within_the_programs_reach(
    sandbox: Driver, tmp_path: pathlib.Path, ending: ToolStatus
) -> None:
    once = Watched(sandbox, overloaded=1, ending=ending)
    found = sandbox.wait(Grader(once, LIMITS).grade(THIEF, SECRET))
    assert not found.passed and found.hidden and not found.is_infra, found
    assert once.examined[1].wall_seconds == 4 * once.examined[0].wall_seconds

    pool = Watched(sandbox, overloaded=2, ending=ending)
    grader = Grader(pool, LIMITS, cache_folder=tmp_path)
    found = sandbox.wait(grader.grade(THIEF, SECRET))
    assert not found.passed and found.is_infra and "before it asked anything" in found.detail, found
    assert len(pool.examined) == 2 and not list(tmp_path.rglob("*.json"))
    right = "def f(x): return 'SECRET'"
    matrix = sandbox.wait(grader.matrix([THIEF, right], [SECRET]))
    assert matrix.passed.tolist() == [[False], [True]] and matrix.hidden.all() and not matrix.infra.any()
    assert once.beside == pool.beside == 0
    assert sandbox.wait(Grader(pool, LIMITS).grade(THIEF, CodeTest("check = f", "f"))).passed and pool.beside == 1


def test_programs_that_wait_for_a_test_share_the_fault_of_reading_it(sandbox: Driver) -> None:
    pool = Watched(sandbox, overloaded=2)
    matrix = sandbox.wait(Grader(pool, LIMITS).matrix([f"def f(n): return {k}" for k in range(6)], [TESTS[2]]))
    assert matrix.infra.all() and pool.calls == 2


class Capped:
    """A pool that gives no call more than its own limits, as a server does."""

    def __init__(self, driver: Driver, refused_bytes: int = 1 << 40, **limits: float) -> None:
        self.limits = self.most = dataclasses.replace(LIMITS, **limits)
        self.isolation = driver.pool.isolation
        self._driver, self._refused_bytes = driver, refused_bytes

    async def run(self, code: str, limits: Limits, files: Mapping[str, bytes] | None = None, **options: Any) -> Result:
        if (size := len(code) + sum(map(len, (files or {}).values()))) > self._refused_bytes:
            raise ValueError(f"the request is too large; limit: {self._refused_bytes} bytes, not {size}")
        return await self._driver.pool.run(code, limits=wire.capped(limits, self.most), files=files, **options)


def test_a_correct_program_is_not_blamed_for_what_the_pool_cuts_out(sandbox: Driver) -> None:
    grader = Grader(Capped(sandbox))
    expected = "\n".join(map(str, range(20_000)))
    found = sandbox.wait(grader.grade("print(*range(20_000), sep='\\n')", StdioTest("", expected)))
    assert found.is_infra and "raise the pool's output_kib" in found.detail, found
    found = sandbox.wait(grader.grade("print('ä' * 100_000)", StdioTest("", "ä" * 99_999)))
    assert found.is_infra, found
    for test in (StdioTest("", "1"), StdioTest("", expected)):
        found = sandbox.wait(grader.grade("print(1)", test))
        assert found.passed == (test.expected == "1") and found.status == ToolStatus.OK, found
    found = sandbox.wait(grader.grade("print('x' * 100_000)", StdioTest("", "x" * 6000)))
    assert (found.passed, found.status) == (False, ToolStatus.OK), "longer than expected in any case"


def test_an_answer_that_fills_the_folder_of_its_test_is_ours_to_mend(sandbox: Driver) -> None:
    test = CodeTest("assert len(f(1)) == 2046 * 4096 - 20", "f")
    program = "def f(x): return 'x' * (2046 * 4096 - 20)"
    assert sandbox.wait(Grader(sandbox.pool, LIMITS).grade(program, test)).passed
    found = sandbox.wait(Grader(Capped(sandbox)).grade(program, test))
    assert found.is_infra and "disk_mib=8; raise it" in found.detail, found


def test_an_answer_that_the_pool_refuses_ends_no_matrix(sandbox: Driver) -> None:
    grader = Grader(Capped(sandbox, refused_bytes=1 << 20))
    programs = ["def f(x): return 'x' * 2**20", "def f(x): return 'x'"]
    matrix = sandbox.wait(grader.matrix(programs, [CodeTest("assert len(f(1)) == 1", "f")]))
    assert matrix.infra.tolist() == [[True], [False]] and matrix.passed.tolist() == [[False], [True]]


def test_limits_that_the_pool_would_cut_are_refused(sandbox: Driver) -> None:
    Grader(Capped(sandbox), LIMITS)
    for name in ("cpu_seconds", "output_kib", "disk_mib"):
        least = dataclasses.replace(LIMITS, **{name: 2 * getattr(LIMITS, name)})
        with pytest.raises(ValueError, match=f"Limits.{name}=.* but the pool gives no call more than .*; lower it"):
            Grader(Capped(sandbox), least)
        Grader(sandbox.pool, least)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"code": "assert f("}, "CodeTest.code is no Python"),
        ({"code": "assert f(1)", "prelude": "x = ("}, "CodeTest.prelude is no Python"),
        ({"code": "assert f(1)", "function": "g-h"}, "CodeTest.function='g-h' is no name"),
    ],
)
def test_a_test_that_cannot_be_run_is_refused_before_it_is_among_others(fields: dict[str, str], refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        CodeTest(**fields)


def test_a_cancelled_matrix_leaves_nothing_running(sandbox: Driver) -> None:
    before = sandbox.resting()

    async def give_up() -> None:
        programs = [f"def f(x):\n    while x != {k}: pass" for k in range(8)]
        async with asyncio.timeout(0.3):
            await Grader(sandbox.pool, LIMITS).matrix(programs, [CallTest("f", [-1], 1)])

    with pytest.raises(TimeoutError):
        sandbox.wait(give_up())
    wait_until(lambda: sandbox.resting() == before)


GRADE = Grade(True, ToolStatus.OK, True, 0.5, 1.0, "said")


def test_memory_keeps_what_was_used_last() -> None:
    cache = Cache(2, None)
    for key in ("aa", "bb"):
        cache.put(key, GRADE)
    assert cache.get("aa") == GRADE
    cache.put("cc", GRADE)
    assert (cache.get("aa"), cache.get("bb"), cache.get("cc")) == (GRADE, None, GRADE)


def test_the_folder_outlives_memory_and_damage(tmp_path: pathlib.Path) -> None:
    cache = Cache(1, tmp_path)
    for key in ("aa11", "bb22"):
        cache.put(key, GRADE)
    assert cache.get("aa11") == GRADE
    for content in ("", "{", "[]", '{"passed": true}', '{"status": "no such"}'):
        (tmp_path / "bb" / "22.json").write_text(content)
        assert Cache(1, tmp_path).get("bb22") is None, content
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_a_folder_that_cannot_be_written_costs_no_grade(sandbox: Driver, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "aa" / "11.json").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path):
        cache = Cache(1, folder)
        cache.put("aa11", GRADE)
        assert cache.get("aa11") == GRADE
    assert list((tmp_path / "aa").iterdir()) == [tmp_path / "aa" / "11.json"], "nothing half made is left"
    grader = Grader(sandbox.pool, LIMITS, cache_folder=tmp_path / "file")
    assert sandbox.wait(grader.grade(PROGRAMS[0], TESTS[0])).passed

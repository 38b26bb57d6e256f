"""Every row of four public problem sets: references pass, buggy programs fail, and no test runs beside its program."""

import asyncio
import json
import pathlib
from collections import Counter
from collections.abc import Callable

import pytest

from jaxrl.sandbox import Limits
from jaxrl.sandbox.grading import CodeTest, Grade, Grader
from tests.sandbox.driver import Driver

ROOMY = Limits(cpu_seconds=3.0, wall_seconds=20.0)


def humaneval(row: dict) -> tuple[list[str], list[CodeTest]]:
    code = f"{row['test']}\ncheck({row['entry_point']})"
    return [row["prompt"] + row["canonical_solution"]], [CodeTest(code, row["entry_point"], row["prompt"])]


def humanevalfix(row: dict) -> tuple[list[str], list[CodeTest]]:
    prelude = row["declaration"] + "    pass\n"
    return [row["fixed"], row["buggy"]], [CodeTest(row["test"], row["entry_point"], prelude)]


def mbpp(row: dict) -> tuple[list[str], list[CodeTest]]:
    set_up = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", "")])
    return [row["code"]], [CodeTest(f"{set_up}\n{test}") for test in row["test_list"]]


SETS: dict[str, tuple[Callable[[dict], tuple[list[str], list[CodeTest]]], int]] = {
    "humaneval": (humaneval, 164),
    "humanevalfix_python": (humanevalfix, 164),
    "mbpp": (mbpp, 974),
    "mbpp_sanitized": (mbpp, 427),
}


def grade_rows(sandbox: Driver, shared: pathlib.Path, name: str, step: int) -> list[list[list[Grade]]]:
    """Grades by row, program and test."""
    with open(shared / "data" / "code" / f"{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    convert, count = SETS[name]
    assert len(rows) == count
    grader = Grader(sandbox.pool, ROOMY)

    async def together() -> list[list[list[Grade]]]:
        async def of_row(row: dict) -> list[list[Grade]]:
            programs, tests = convert(row)
            return [await asyncio.gather(*(grader.grade(program, test) for test in tests)) for program in programs]

        return await asyncio.gather(*map(of_row, rows[1::step] if step > 1 else rows))

    return sandbox.wait(together(), seconds=840)


def check_rows(found: list[list[list[Grade]]]) -> None:
    """The first program of a row is right, the others are wrong."""
    assert Counter(grade.hidden for row in found for grades in row for grade in grades).keys() == {True}
    outcomes = [[all(grade.passed for grade in grades) for grades in row] for row in found]
    wrong = [number for number, (right, *buggy) in enumerate(outcomes) if not right or any(buggy)]
    assert not wrong, [found[number] for number in wrong[:3]]


@pytest.mark.parametrize("name", SETS)
def test_some_rows_are_graded_right_and_hidden(sandbox: Driver, shared: pathlib.Path, name: str) -> None:
    check_rows(grade_rows(sandbox, shared, name, SETS[name][1] // 12))


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a busy machine several times as long as on a quiet one
@pytest.mark.parametrize("name", SETS)
def test_all_rows_are_graded_right_and_hidden(sandbox: Driver, shared: pathlib.Path, name: str) -> None:
    check_rows(grade_rows(sandbox, shared, name, 1))

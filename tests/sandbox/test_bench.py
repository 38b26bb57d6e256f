"""The bench verb: its rows, what it judges and what it leaves open, and how it fails."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from jaxrl.cli import BAD_USAGE, main
from jaxrl.sandbox.bench import load, rows, table
from jaxrl.sandbox.bench.accounting import SLOTS, Effort, cpu_of, run_many
from jaxrl.sandbox.bench.processes import busy_seconds, family
from jaxrl.sandbox.pool import Pool
from tests.sandbox import own_network, ray_nodes

KEYS = {"figure", "what", "value", "unit", "demand", "holds", "note", "load_average"}
COUNTED = {"not answered exactly once", "faults", "misclassified", "lost"}  # true or false at any scale


def bench(capsys: pytest.CaptureFixture[str], figures: str) -> tuple[int, list[dict]]:
    code = main(["sandbox", "bench", "--figures", figures, "--rounds", "1", "--scale", "0.01", "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check(found: list[dict], figures: str) -> None:
    """Every figure is there, counts hold, and a hundredth of the calls settles no measurement."""
    assert {row["figure"] for row in found} - {"cost"} == set(figures.split(","))
    for row in found:
        assert set(row) == KEYS
        if any(words in row["what"] for words in COUNTED):
            assert row["holds"] is True, row
        elif row["figure"] not in ("S13", "S15"):
            assert row["holds"] is None, row
        if row["value"] is None:
            assert row["note"], "what is missing is named"


def test_rows_of_a_quick_look(capsys: pytest.CaptureFixture[str]) -> None:
    figures = "S6,S7,S8,S13"
    code, found = bench(capsys, figures)
    check(found, figures)
    assert code == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "jaxrl[ray]"')
def test_rows_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster of its own, whichever one the surroundings name."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    options = ("--figures", "S14", "--rounds", "1", "--scale", "0.01", "--json")
    with ray_nodes.temporary_folder():
        command = own_network.command("benchmarks/sandbox.py", *options)
        ran = subprocess.run(command, cwd=ray_nodes.REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    check(found, "S14")
    assert [row["unit"] for row in found] == ["1/s", "ratio"]
    assert all(row["value"] > 0 for row in found)


@pytest.mark.slow
def test_rows_of_the_other_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """S15 among them, because it counts files and cgroups of the whole machine, where fast tests run side by side."""
    figures = "S1,S2,S3,S4,S5,S9,S10,S11,S12,S15"
    _, found = bench(capsys, figures)
    check(found, figures)
    costs = {row["what"].removeprefix("CPU per call: "): row["value"] for row in found if row["figure"] == "cost"}
    assert costs["fresh import"] > 10 * costs["import"], "a warm interpreter is what the design is about"
    assert 0 < costs["fork"] < costs["fresh"]


def test_a_figure_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sandbox", "bench", "--figures", "S1,S16"]) == BAD_USAGE
    assert "'S16' is none of S1, S2" in capsys.readouterr().err
    assert main(["sandbox", "bench", "--figures", ""]) == BAD_USAGE
    assert "'' is none of S1, S2" in capsys.readouterr().err
    assert table.chosen("s1, S14") == ("S1", "S14")
    assert table.chosen(None) == table.FIGURES
    assert main(["sandbox", "bench", "--scale", "2"]) == BAD_USAGE


@pytest.mark.parametrize(
    ("value", "demand", "holds"),
    [(3.0, ">= 3", True), (2.99, ">= 3", False), (0.5, "<= 0.5", True), (1, "<= 0", False)],
)
def test_verdicts(value: float, demand: str, holds: bool) -> None:
    assert rows.judged("S1", "", value, "ratio", demand).holds is holds
    assert rows.judged("S1", "", value, "ratio", demand, tells=False).holds is None


@pytest.mark.parametrize(
    ("rounds", "value", "holds"),
    [
        ([(1.9, 0.01), (1.2, 0.4), (1.95, 0.02), (2.0, 0.0)], 1.95, True),  # the disturbed one does not count
        ([(1.5, 0.01), (1.9, 0.4)], 1.5, False),
        ([(1.9, 0.2), (1.9, 0.06)], 1.9, None),
    ],
)
def test_two_cores_are_judged_by_rounds_that_nobody_disturbed(
    rounds: list[tuple[float, float]], value: float, holds: bool | None
) -> None:
    row = load.cores_row(rounds, tells=True)
    assert (row.value, row.holds) == (value, holds)
    assert load.cores_row(rounds, tells=False).holds is None


def test_others_on_a_core_are_seen_and_its_own_pool_is_not_among_them() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    hog = "import os; os.sched_setaffinity(0, {" + str(allowed[0]) + "})\nwhile True: pass"
    try:
        with subprocess.Popen([sys.executable, "-c", hog]) as other:
            try:
                _, share = asyncio.run(load.stretch(allowed[:1], 30))
            finally:
                other.kill()  # it does not end by itself, and the block would wait for it
        os.sched_setaffinity(0, allowed[:1])
        before, began = busy_seconds(allowed[:1]), time.process_time()
        while time.process_time() < began + 0.3:
            pass
        assert busy_seconds(allowed[:1]) - before > 0.25
    finally:
        os.sched_setaffinity(0, allowed)
    assert 0.2 < share < 0.99


def test_what_breaks_down_fails_its_own_figures(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    async def broken(effort: Effort) -> list[rows.Row]:
        raise RuntimeError("no such luck")

    async def fine(effort: Effort) -> list[rows.Row]:
        return [rows.judged("B", "", 1.0, "ratio", ">= 1")]

    monkeypatch.setattr(table, "_MEASURES", {("A",): broken, ("B",): fine})
    assert table.main(("A", "B"), Effort(), as_json=True) == 1
    failed, held = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (failed["figure"], failed["holds"], held["holds"]) == ("A", False, True)
    assert "no such luck" in failed["what"]


def test_looking_at_the_helpers_costs_nothing() -> None:
    looks = []

    def look() -> list[int]:
        looks.append(time.process_time())
        while time.process_time() < looks[-1] + 0.2:
            pass
        return []

    assert asyncio.run(cpu_of(lambda: asyncio.sleep(0), look)) < 0.1
    assert len(looks) == 2


def test_cpu_of_children_of_templates_is_counted() -> None:
    """What a child burns must be in the cost of its call, or every ratio would flatter us."""

    async def burn() -> float:
        async with Pool(slots=SLOTS, workers=1, preload=()) as pool:
            code = "import time\nwhile time.process_time() < 0.3: pass"
            return await cpu_of(lambda: run_many(pool, [code] * 4, 4), lambda: family(pool.warden_pid))

    assert 1.1 < asyncio.run(burn()) < 3.0

"""The table of what kernels must reach: on a CPU all of it with tiny shapes, where what needs a rival says so."""

import json
import pathlib

import pytest

from jaxrl import commands
from jaxrl.cli import BAD_USAGE, main
from jaxrl_kernels import bars
from jaxrl_kernels.bars import rows

TINY = bars.Sizes(
    lengths=(64,),
    query_heads=4,
    kv_heads=2,
    width=16,
    segments=4,
    prompt=32,
    response=8,
    group=4,
    slots=8,
    context=32,
    page=8,
    shared=16,
    own=16,
    scored=64,
    hidden=32,
    vocabulary=128,
    chunk=32,
    square=64,
    copied=4096,
    rounds=2,
    dtype="float32",
)


@pytest.mark.slow
def test_the_whole_table_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    commands.print_bars(bars.table(TINY))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    table = {(row["figure"], row["what"]): row for row in printed}
    assert len(table) == len(printed)
    assert {row["device"] for row in printed} == {"cpu"}
    assert {figure for figure, _ in table} == {"run", "K1", "K2", "K3", "K4"}
    reasons = {what: row["note"] for (_, what), row in table.items() if row["value"] is None}
    assert {what.split(":")[0] for what in reasons if "everything" in what} == {"cudnn", "tpu", "mosaic_gpu"}
    assert all("needs a" in reasons[what] for what in reasons if "everything" in what)
    rivals = [what for what in reasons if "over ours" in what]
    assert len(rivals) == 3 and all("no cuDNN or splash here" in reasons[what] for what in rivals)
    assert all(row["holds"] is None for row in printed if row["value"] is None)
    measured = [row["what"] for row in printed if row["value"] is not None and row["demand"]]
    wanted = (
        "bytes of keys",
        "K3 over K2",
        "K2 over K3",
        "K2 over K3",
        "its products",
        "memory",
        "as one seg",
        "blocks",
    )
    assert all(part in what for part, what in zip(wanted, measured, strict=True))
    assert all(row["value"] > 0 for row in printed if isinstance(row["value"], float))


@pytest.mark.parametrize(
    ("value", "demand", "holds"),
    [
        (0.6, ">= 0.6", True),
        (0.59, ">= 0.6", False),
        (1.25, "<= 1.25", True),
        (1.26, "<= 1.25", False),
        (9.0, "", None),
    ],
)
def test_what_a_row_holds(value: float, demand: str, holds: bool | None) -> None:
    assert rows.row("K1", "x", value, "ratio", demand)["holds"] is holds
    assert rows.row("K1", "x", None, "ratio", demand, note="why")["holds"] is None


def test_a_demand_that_does_not_hold_fails_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (rows.row("K1", "x", value, "ratio", ">= 1") for value in (1.0, 0.9))
    unknown = rows.row("K1", "x", None, "ratio", ">= 1", note="no rival")
    assert commands.print_bars([good, unknown])
    assert not commands.print_bars([good, bad, unknown])
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_only_a_gpu_has_a_description_to_write(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--dump-target", str(tmp_path / "gpu.txt")]) == BAD_USAGE
    assert "only GPUs have a description" in capsys.readouterr().err
    assert not (tmp_path / "gpu.txt").exists()

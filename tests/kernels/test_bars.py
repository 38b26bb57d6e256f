"""The table of what kernels must reach: on a CPU all of it with tiny shapes, where what needs a rival says so."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxrl import commands
from jaxrl.cli import BAD_USAGE, main
from jaxrl_kernels import bars
from jaxrl_kernels.bars import attention, decoding, rivals, rows, scoring
from jaxrl_kernels.interval_attention import backends as interval

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


def right(q: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
    return interval.BACKENDS["xla"].attend(q, *others)


def one_tenth_more(q: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
    return right(1.1 * q, *others)


def no_gradient_of_queries(q: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
    return right(q + jnp.sqrt(0 * q), *others)  # whose gradient is infinite times nothing


@pytest.mark.parametrize(
    ("attend", "value", "holds"),
    [(right, 0.0, True), (one_tenth_more, 0.05, False), (no_gradient_of_queries, "nan", False)],
)
def test_no_time_is_believed_of_what_computes_something_else(
    attend: Callable[..., Any], value: float | str, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(interval.BACKENDS, "other", dataclasses.replace(interval.BACKENDS["xla"], attend=attend))
    (row,) = attention._agreement(dataclasses.replace(TINY, lengths=(16,)), "other")
    assert row["holds"] is holds and (row["value"] == value or row["value"] > value)
    json.loads(json.dumps(row), parse_constant=pytest.fail)  # JSON has no NaN


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("INTERNAL: no\nmore"), ValueError("no"), NotImplementedError("no"), RuntimeError()],
    ids=lambda error: type(error).__name__,
)
def test_what_a_kernel_raises_fails_its_rows_and_no_others(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(*arguments: object) -> Iterator[dict]:
        yield rows.row("K1", f"{arguments[1:]}", 1.0, "ratio", ">= 1")
        raise error

    for module in (attention, decoding, scoring):
        monkeypatch.setattr(module, "measured", raising)
    assert not commands.print_bars(bars.table(TINY))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = {row["what"]: row for row in printed if row["holds"] is False}
    names = [
        "decoding",
        "log-probabilities",
        "xla",
        *(n for n, row in interval.BACKENDS.items() if row.devices != ("",)),
    ]
    assert sorted(failed) == sorted(f"{name}: the rest" for name in names)
    assert all(row["note"].startswith(type(error).__name__) and row["value"] is None for row in failed.values())
    assert sum(row["holds"] is True for row in printed) == len(names)


@pytest.mark.parametrize(("kind", "there"), [("NVIDIA A100-SXM4-40GB", False), ("NVIDIA H200", True)])
def test_the_rival_for_packed_rows_is_one_where_it_runs(kind: str, there: bool) -> None:
    shape = interval.Shape(1, 64, 64, 2, 128, "bfloat16")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), abstract_device=jax.sharding.AbstractDevice(kind, 1, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        name, rival = rivals.packed(shape)
    assert name == "cuDNN's packed offsets" and (rival is not None) == there


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

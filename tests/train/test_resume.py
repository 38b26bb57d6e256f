"""Promise 8: killed anywhere, a run resumes to the same curve, to the last bit."""

import pathlib
import subprocess
import sys

import pytest

from jaxrl.observe.traces import read_episodes, to_json
from jaxrl.observe.writers import read_metrics

TIMED = ("seconds/", "engine/", "tokens_per_second", "tool_seconds")
KILLED = -9


def run(folder: pathlib.Path, overrides: tuple[str, ...], *before: str) -> int:
    settings = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, *(before or ("-m", "jaxrl.cli")), "train", "smoke", "--run", str(folder), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, KILLED), done.stdout + done.stderr
    return done.returncode


def curve(folder: pathlib.Path) -> list[dict]:
    """Every row of metrics without what a clock measured."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in read_metrics(folder)]


def episodes(folder: pathlib.Path) -> list[dict]:
    rows = [to_json(t) for file in sorted((folder / "episodes").glob("*.jsonl")) for t in read_episodes(file)]
    for row in rows:
        row["seconds"] = row["tool_seconds"] = 0.0
        for turn in row["turns"]:
            for call in turn["calls"]:
                call["seconds"] = call["queue_seconds"] = 0.0
    return rows


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: tuple[str, ...]) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(folder, tiny_overrides) == 0
    return folder


def test_the_run_learns_from_something(unbroken: pathlib.Path) -> None:
    rows = read_metrics(unbroken, "rl")
    assert len(rows) == 4
    assert any(row["grad_norm"] > 1e-3 for row in rows)
    assert any(0 < row["pass_rate"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("point", "count"),
    [("episodes", 36), ("update", 64), ("checkpoint", 3)],
    ids=["during episodes", "during an update", "during a checkpoint write"],
)
def test_promise_8_killed_and_resumed_gives_the_same_bits(
    unbroken: pathlib.Path, tmp_path: pathlib.Path, tiny_overrides: tuple[str, ...], point: str, count: int
) -> None:
    folder = tmp_path / "run"
    script = str(pathlib.Path(__file__).with_name("killed_run.py"))
    assert run(folder, tiny_overrides, script, point, str(count)) == KILLED
    assert not (folder / "summary.json").exists()
    assert run(folder, tiny_overrides) == 0
    assert curve(folder) == curve(unbroken)
    assert episodes(folder) == episodes(unbroken)
    weights = [(f / "export" / "model.safetensors").read_bytes() for f in (folder, unbroken)]
    assert weights[0] == weights[1]

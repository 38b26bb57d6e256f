"""Promise 8: killed anywhere, a run resumes to the same curve, to the last bit."""

import pathlib
import subprocess
from collections.abc import Callable

import pytest

from jaxrl.observe.traces import read_episodes, to_json
from jaxrl.observe.writers import read_metrics

TIMED = ("seconds/", "engine/", "trainer/idle_share", "tokens_per_second", "tool_seconds")
KILLED = -9


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


def test_the_run_learns_from_something(tiny_run: pathlib.Path) -> None:
    rows = read_metrics(tiny_run, "rl")
    assert len(rows) == 4
    assert any(row["grad_norm"] > 1e-3 for row in rows)
    assert any(0 < row["pass_rate"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("point", "count"),
    [("episodes", 110), ("update", 65), ("checkpoint", 9)],
    ids=["during episodes", "during an update", "during a checkpoint write"],
)
def test_promise_8_killed_and_resumed_gives_the_same_bits(
    tiny_run: pathlib.Path,
    tmp_path: pathlib.Path,
    run_tiny: Callable[..., subprocess.CompletedProcess[str]],
    point: str,
    count: int,
) -> None:
    folder = tmp_path / "run"
    script = str(pathlib.Path(__file__).with_name("killed_run.py"))
    assert run_tiny(folder, script, point, str(count)).returncode == KILLED
    assert not (folder / "summary.json").exists()
    resumed = run_tiny(folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "reinforcement: 4 steps, from step" in resumed.stdout  # it went on, and did not begin again
    assert curve(folder) == curve(tiny_run)
    assert episodes(folder) == episodes(tiny_run)
    weights = [(f / "export" / "model.safetensors").read_bytes() for f in (folder, tiny_run)]
    assert weights[0] == weights[1]

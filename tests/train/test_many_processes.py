"""A whole run in several processes: killed in two, interrupted in four, finished in one, it is the run in one."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from tests import several

STEPS = 6
MORE = (
    *("MeshConfig.data=2", "MeshConfig.fsdp=2", "SftConfig.steps=40", "EvalConfig.samples=1", "EvalConfig.k=(1,)"),
    *(f"TrainConfig.steps={STEPS}", "TrainConfig.samples=4", "TrainConfig.eval_every=0"),
    *("AlgorithmConfig.reject_equal=False", "CheckpointConfig.keep=3"),
)
CURVE = ("loss", "grad_norm", "entropy", "ratio", "kl_to_reference", "pass_rate", "response_tokens", "calls")
Run = Callable[[int], contextlib.AbstractContextManager[subprocess.Popen[str]]]


def training(folder: pathlib.Path, overrides: tuple[str, ...]) -> Run:
    """Starts a run in ``folder`` in so many processes, which have four devices together."""

    def run(processes: int) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        settings = [argument for override in (*overrides, *MORE) for argument in ("--set", override)]
        launcher = str(several.REPOSITORY / "launch" / "local.py")
        command = [sys.executable, launcher, str(processes), "--", "train", "smoke", "--run", str(folder), *settings]
        return several.started(command, 4 // processes)

    return run


def steps_done(folder: pathlib.Path) -> int:
    return len(read_metrics(folder, "rl"))


def wait_for_step(folder: pathlib.Path, step: int, process: subprocess.Popen[str]) -> None:
    while steps_done(folder) < step:
        assert process.poll() is None, "".join(process.communicate())
        time.sleep(0.02)


def process_id(launcher: subprocess.Popen[str], process: int) -> int:
    """Of one of the processes that the launcher started."""
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    commands = {child: pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
    (found,) = (child for child, command in commands.items() if command[-2] == str(process).encode())
    return int(found)


def stopped_by(number: int, pid: int, launcher: subprocess.Popen[str]) -> str:
    """Signals a process; returns what all of them complained of until they ended, which they must do soon."""
    os.kill(pid, number)
    return launcher.communicate(timeout=60)[1]


def rows(folder: pathlib.Path) -> list[dict]:
    return read_metrics(folder, "rl")


def ids(folder: pathlib.Path) -> dict[tuple[int, int], list[int]]:
    episodes = [t for file in (folder / "episodes").glob("rl_*.jsonl") for t in read_episodes(file)]
    found = {(t.draw, t.sample): t.ids.tolist() for t in episodes}
    assert len(found) == len(episodes)  # each was played by one process
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_interrupted_and_resumed_in_other_layouts(tmp_path: pathlib.Path, tiny_overrides: tuple) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    with training(one, tiny_overrides)(1) as process:
        said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    run = training(many, tiny_overrides)

    with run(2) as launcher:
        wait_for_step(many, 1, launcher)
        said = stopped_by(signal.SIGKILL, process_id(launcher, 1), launcher)
        assert "process 0 stops: process 1 is gone (no sign of life for 10 s); start all processes again" in said
        assert launcher.returncode == 1
    reached = steps_done(many)
    assert reached < STEPS

    with run(4) as launcher:
        wait_for_step(many, reached + 1, launcher)
        said = stopped_by(signal.SIGINT, launcher.pid, launcher)
        assert re.search("goe?s? on from the last checkpoint", said)
        assert launcher.returncode == 130
    assert steps_done(many) < STEPS

    with run(1) as process:
        shown, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert f"reinforcement: {STEPS} steps, from step" in shown

    assert ids(many) == ids(one)
    assert [row["step"] for row in rows(many)] == [row["step"] for row in rows(one)]
    for row, expected in zip(rows(many), rows(one), strict=True):
        for name in CURVE:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (row["step"], name)
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (one, many)]
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, rtol=1e-2, atol=1e-4, err_msg=name)

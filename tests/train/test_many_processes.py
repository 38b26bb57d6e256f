"""Whole runs in several processes: killed in two, interrupted in four, finished in one, one is the run in one."""

import contextlib
import json
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
    "AlgorithmConfig.advantage=gigpo",  # compares what was written
)
OWN_DEVICES = ("MeshConfig.data=1", "MeshConfig.rollout_devices=2")
READS_TOKENS = (
    *("ModelConfig.family=qwen3_moe", "ModelConfig.experts=4", "ModelConfig.expert_width=32"),
    *("EngineConfig.record_experts=True", "CriticConfig.enabled=True", "CriticConfig.learning_rate=1e-3"),
    *("AlgorithmConfig.advantage=gae", "AlgorithmConfig.kl_placement=reward", "AlgorithmConfig.kl_estimator=k1"),
    *("AlgorithmConfig.proximal=recomputed", "TrainConfig.updates_per_step=2", "TrainConfig.steps=2"),
    "SftConfig.steps=10",
)
"""What the trainer makes of tokens besides gradients."""
CURVE = ("loss", "grad_norm", "entropy", "ratio", "kl_to_reference", "pass_rate", "response_tokens", "calls")
Run = Callable[[int], contextlib.AbstractContextManager[subprocess.Popen[str]]]


def training(folder: pathlib.Path, overrides: tuple[str, ...]) -> Run:
    """Starts a run in ``folder`` in so many processes, which have four devices together."""

    def run(processes: int) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        settings = [argument for override in overrides for argument in ("--set", override)]
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


def check_curve(folder: pathlib.Path, expected: pathlib.Path, names: tuple[str, ...]) -> None:
    for row, wanted in zip(rows(folder), rows(expected), strict=True):
        for name in ("step", *names):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), (row["step"], name)


def whole_run(run: Run, processes: int) -> str:
    """What is shown of a run to its end."""
    with run(processes) as process:
        shown, said = process.communicate(timeout=600)
        assert process.returncode == 0, shown + said
    return shown


def ids(folder: pathlib.Path) -> dict[tuple[int, int], list[int]]:
    episodes = [t for file in (folder / "episodes").glob("rl_*.jsonl") for t in read_episodes(file)]
    found = {(t.draw, t.sample): t.ids.tolist() for t in episodes}
    assert len(found) == len(episodes)  # each was played by one process
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_interrupted_and_resumed_in_other_layouts(tmp_path: pathlib.Path, tiny_overrides: tuple) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    overrides = (*tiny_overrides, *MORE)
    whole_run(training(one, overrides), 1)
    run = training(many, overrides)

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

    shown = whole_run(run, 1)
    assert f"reinforcement: {STEPS} steps, from step" in shown

    assert ids(many) == ids(one)
    check_curve(many, one, CURVE)
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (one, many)]
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, rtol=1e-2, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_recorded_experts_a_critic_and_scores_with_devices_of_their_own(
    tmp_path: pathlib.Path, tiny_overrides: tuple
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, processes in ((one, 1), (two, 2)):
        whole_run(training(folder, (*tiny_overrides, *MORE, *OWN_DEVICES, *READS_TOKENS)), processes)
    assert ids(two) == ids(one)
    shown = ("critic/value", "critic/value_loss", "critic/grad_norm", "critic/explained_variance")
    check_curve(two, one, (*CURVE, *shown))
    assert rows(two)[0]["ratio"] == pytest.approx(1, abs=1e-4)
    assert all(row["kl_to_reference"] != 0 for row in rows(two)[1:])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_while_groups_are_played_ahead_it_trains_on_every_draw_once(
    tmp_path: pathlib.Path, tiny_overrides: tuple
) -> None:
    """Of what is played ahead each process knows something else: the checkpoint has what those wrote who played it."""
    staleness = ("TrainConfig.prefetch_groups=0", "TrainConfig.max_staleness=2", "TrainConfig.steps=5")
    run = training(tmp_path, (*tiny_overrides, *MORE, *OWN_DEVICES, *staleness))
    with run(2) as launcher:
        wait_for_step(tmp_path, 2, launcher)
        stopped_by(signal.SIGKILL, process_id(launcher, 1), launcher)
    written = [file for file in tmp_path.glob("checkpoints/*/played/*.jsonl") if file.stat().st_size]
    assert {file.name for file in written} == {"0.jsonl", "1.jsonl"}
    for file in written:
        draws = {trajectory["draw"] for line in file.read_text().splitlines() for trajectory in json.loads(line)}
        assert {draw % 2 for draw in draws} == {int(file.stem)}
    assert "reinforcement: 5 steps, from step" in whole_run(run, 2)
    played = ids(tmp_path)
    assert {draw for draw, _ in played} == set(range(len(played) // 4))
    assert len(rows(tmp_path)) == 5
    assert max(row["staleness/max"] for row in rows(tmp_path)) > 0, "it did play ahead"
    assert all(row["staleness/max"] <= 2 and row["too_old"] == 0 for row in rows(tmp_path))
    assert all(row["logprob_gap"] < 0.1 for row in rows(tmp_path)), "all processes train on the same groups"

"""Asynchronous training: with no staleness it is the synchronous loop to the last bit, with some it can be killed."""

import contextlib
import dataclasses
import io
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import Config, ConfigError
from jaxrl.episodes import play_groups
from jaxrl.observe.progress import Progress
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Trajectory
from jaxrl.rl.selection import chooser
from jaxrl.train import experiment
from jaxrl.train.pack import pack
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session, open_player
from jaxrl.train.state import TrainState
from jaxrl.train.update import Updater, policy_gradient_loss

KILLED = -9


async def plain_loop(
    session: Session, recorder: Recorder, progress: RunProgress, state: TrainState, reference: Any, critic: None
) -> TrainState:
    """The steps one after the other: nothing is played while anything else is done."""
    assert critic is None
    config = session.config
    loss = policy_gradient_loss(session.model, config.algorithm, config.engine.temperature)
    updater = Updater(loss, session.rl_optimizer, session.mesh)
    updater.compile(state, config.train.rows, config.train.row_tokens, reference)
    stream = session.problem_stream(progress)
    async with open_player(session, session.rollout_weights(state.params), 0) as player:
        for step in range(config.train.steps):
            draws = [stream.next() for _ in range(config.train.problems)]
            async with contextlib.aclosing(play_groups(player, draws, config.train.samples)) as groups:
                played = [group async for group in groups]
            rules, seed = chooser(config.algorithm), config.train.seed
            chosen = [rules.choose(g.trajectories, np.random.default_rng((seed, g.draw))) for g in played]
            recorder.begin_step(player.engine.stats())
            for batches in pack(config, tuple(one for one in chosen if one.kept), {}):
                state, _ = updater.step(state, batches, reference)
            await session.hand_over(state.params, player.engine, step + 1)
            progress.step += 1
            trajectories = [trajectory for group in played for trajectory in group.trajectories]
            recorder.rl_step(progress, trajectories, chosen, {}, player.engine.stats())
    return state


def tokens(folder: pathlib.Path) -> list[tuple]:
    """All that was sampled in training: where, by which weights, with which log-probabilities."""
    files = sorted((folder / "episodes").glob("rl_*.jsonl"))
    return [
        (t.draw, t.sample, t.ids.tolist(), t.versions.tolist(), t.logprobs.tobytes())
        for file in files
        for t in read_episodes(file)
    ]


@pytest.mark.slow
def test_without_staleness_the_run_is_that_of_a_plain_loop_to_the_last_bit(
    tiny_config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = dataclasses.replace(
        tiny_config.train, steps=3, eval_every=0, prefetch_groups=0, max_draws=1, max_staleness=0
    )
    config = dataclasses.replace(tiny_config, train=train)
    for name in ("queued", "plain"):
        if name == "plain":
            monkeypatch.setattr(experiment, "reinforce", plain_loop)
        with Progress("tiny", file=io.StringIO(), live=False) as view:
            experiment.train(config, tmp_path / name, view)
    queued, plain = tmp_path / "queued", tmp_path / "plain"
    assert len(tokens(queued)) == 3 * train.problems * train.samples and tokens(queued) == tokens(plain)
    weights = [(folder / "export" / "model.safetensors").read_bytes() for folder in (queued, plain)]
    assert weights[0] == weights[1]
    assert [row["staleness/max"] for row in read_metrics(queued, "rl")] == [0, 0, 0]


@pytest.mark.slow
def test_a_killed_run_goes_on_within_the_staleness_and_trains_on_every_draw_once(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    folder, killer = tmp_path / "run", str(pathlib.Path(__file__).with_name("killed_run.py"))
    more = ("--set", "TrainConfig.prefetch_groups=0", "--set", "TrainConfig.max_staleness=2")
    more += ("--set", "TrainConfig.steps=5")
    assert run_tiny(folder, killer, "update", "65", more=more).returncode == KILLED
    resumed = run_tiny(folder, more=more)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "reinforcement: 5 steps, from step" in resumed.stdout
    rows = read_metrics(folder, "rl")
    assert len(rows) == 5
    assert max(row["staleness/max"] for row in rows) > 0, "it did play ahead"
    assert all(row["staleness/max"] <= 2 and row["too_old"] == 0 for row in rows)
    assert all("trainer/idle_share" in row and "engine/idle_share" in row for row in rows)
    names = [name[:2] for name in tokens(folder)]
    assert len(set(names)) == len(names) and {draw for draw, _ in names} == set(range(len(names) // 6))
    for step, file in enumerate(sorted((folder / "episodes").glob("rl_*.jsonl"))):
        assert all(_between(t, step - 2, step) for t in read_episodes(file))


def _between(trajectory: Trajectory, first: int, last: int) -> bool:
    versions = trajectory.versions[trajectory.mask > 0]
    return bool(((versions >= first) & (versions <= last)).all())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TrainConfig.max_staleness=-1"], "max_staleness=-1 must not be negative"),
        (
            ["TrainConfig.max_staleness=1", "TrainConfig.prefetch_groups=1"],
            "max_staleness=1 plays ahead already; set TrainConfig.prefetch_groups=0, which is 1",
        ),
        (["TrainConfig.next_groups=finished"], "'finished' needs groups to choose from; set TrainConfig.max_staleness"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.load("", overrides)

"""Whole tiny runs in which everything moves: corrections, KL paid by rewards, adapting weights, a moving reference."""

import dataclasses
import io
import pathlib
import subprocess
from collections.abc import Callable

import jax
import pytest

from jaxrl.config import Config
from jaxrl.observe.progress import Progress
from jaxrl.observe.writers import read_metrics
from jaxrl.train import experiment, recorder
from tests.train.test_resume import KILLED, curve

STEERED = {
    "kl_placement": "reward",
    "kl_estimator": "k1",
    "kl_coefficient": 0.01,
    "kl_target": 0.01,
    "kl_horizon": 20,
    "reference_every": 2,
    "entropy_target": 5.0,
    "entropy_limit": 0.01,
    "proximal": "recomputed",
    "mismatch": "icepop",
    "rejection": "divergence",
    "top_entropy": 0.9,
    "loss": "gspo",
}


@pytest.mark.slow
def test_nothing_is_compiled_once_the_steps_run_and_what_moves_is_shown(
    tiny_config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    begun: list[int] = []
    saved_at: list[int] = []
    begin, save = recorder.Recorder.begin_step, recorder.Recorder.save

    def counted(*arguments: object) -> None:
        begun.append(len(compiled))
        begin(*arguments)

    def saved(*arguments: object) -> None:
        saved_at.append(len(compiled))
        save(*arguments)

    monkeypatch.setattr(recorder.Recorder, "begin_step", counted)
    monkeypatch.setattr(recorder.Recorder, "save", saved)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    config = dataclasses.replace(
        tiny_config,
        algorithm=dataclasses.replace(tiny_config.algorithm, **STEERED),
        train=dataclasses.replace(tiny_config.train, steps=3, eval_every=0, updates_per_step=2),
    )
    said = io.StringIO()
    with Progress("tiny", file=said, live=False) as view:
        experiment.train(config, tmp_path / "run", view)
    assert "top_entropy=0.9 compares the tokens of a micro-batch" in said.getvalue()
    jax.monitoring.clear_event_listeners()
    assert len(begun) == 3 and begun[0] > 0
    assert saved_at[-1] == begun[0]
    rows = read_metrics(tmp_path / "run", "rl")
    assert len(rows) == 3
    assert len({row["kl_coefficient"] for row in rows}) == 3
    assert [row["entropy_coefficient"] for row in rows] == pytest.approx([0.0, 0.005, 0.01])
    assert all(0 < row["mismatch_kept"] <= 1 and row["kl_to_reference"] != 0 for row in rows[1:])


@pytest.mark.slow
def test_promise_8_coefficients_and_reference_survive_a_kill(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    settings = {f"AlgorithmConfig.{name}": value for name, value in STEERED.items()} | {
        "TrainConfig.updates_per_step": 2,
        "TrainConfig.eval_every": 0,
    }
    more = tuple(argument for key, value in settings.items() for argument in ("--set", f"{key}={value}"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_tiny(whole, more=more).returncode == 0
    script = str(pathlib.Path(__file__).with_name("killed_run.py"))
    assert run_tiny(broken, script, "update", "65", more=more).returncode == KILLED
    resumed = run_tiny(broken, more=more)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert curve(broken) == curve(whole)
    weights = [(folder / "export" / "model.safetensors").read_bytes() for folder in (broken, whole)]
    assert weights[0] == weights[1]

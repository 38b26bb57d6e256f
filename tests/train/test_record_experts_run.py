"""A whole run that replays recorded experts: resumed after a step it has the curve of one that nothing interrupted."""

import pathlib
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics

EXPERTS = (
    *("ModelConfig.family=qwen3_moe", "ModelConfig.experts=4", "ModelConfig.expert_width=32"),
    *("EngineConfig.record_experts=True", "AlgorithmConfig.reject_equal=False", "SftConfig.steps=20"),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_groups_played_ahead_keep_their_experts(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    def run(folder: pathlib.Path, steps: int) -> None:
        settings = [part for override in (*EXPERTS, f"TrainConfig.steps={steps}") for part in ("--set", override)]
        done = run_tiny(folder, more=tuple(settings))
        assert done.returncode == 0, done.stdout + done.stderr

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole, 2)
    run(halves, 1)
    run(halves, 2)
    for one, two in zip(*(sorted((folder / "episodes").glob("rl_*")) for folder in (whole, halves)), strict=True):
        for left, right in zip(read_episodes(one), read_episodes(two), strict=True):
            assert left.experts.shape == (len(left.prompt_ids) + len(left.ids), 1, 2)
            np.testing.assert_array_equal(left.experts, right.experts)
    for left, right in zip(read_metrics(whole, "rl"), read_metrics(halves, "rl"), strict=True):
        assert all(left[name] == right[name] for name in ("loss", "grad_norm", "ratio", "entropy"))
    assert read_metrics(whole, "rl")[0]["ratio"] == pytest.approx(1, abs=1e-4)

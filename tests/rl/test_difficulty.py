"""How many trajectories a hard problem gets on top, against the release of DARS and the table of its paper."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.rl import algorithm
from jaxrl.rl.advantages.group import grpo
from jaxrl.rl.outcomes import Outcomes, Recorded
from jaxrl.rl.selection.difficulty import dars_equal, dars_hard, extra_samples

ELSEWHERE = {"adv": 6, "loss": 12}
"""Cases of that file that are an advantage (test_advantages_golden.py) or a loss (test_golden_remaining.py)."""


def test_dars(golden: Callable[[str], list[dict[str, Any]]]) -> None:
    counted: collections.Counter[str] = collections.Counter()
    for case in golden("dars/allocation"):
        kind = case["id"].split("/")[0]
        counted[kind] += 1
        inputs, settings = case["inputs"], case.get("settings", {})
        if kind.startswith("schedule"):
            first, most, std = settings["N"], settings["N_max"], settings["std"]
            got = [extra_samples(acc, first, most, std=std, hard=kind.endswith("HW")) for acc in inputs["acc"]]
            assert got == case["outputs"]["extra_rollouts"], case["id"]
        elif kind == "id2mean":
            scores, groups = inputs["token_level_rewards"].sum(axis=1), np.asarray(inputs["index"])
            masks = [np.ones(1)] * len(scores)
            less_mean = grpo(Outcomes(rewards=scores, groups=groups, masks=masks), scale="none", alone="zero")
            for group, mean in case["outputs"].items():
                of_group = groups == group
                np.testing.assert_allclose(less_mean[of_group], scores[of_group] - mean, rtol=1e-5, atol=1e-6)
    assert counted == {"schedule_ET": 10, "schedule_HW": 10, "id2mean": 3, **ELSEWHERE}


@pytest.mark.parametrize(
    ("right", "equal", "hard"), [(0, 24, 56), (1, 11, 24), (2, 3, 8), (3, 1, 3), (4, 0, 0), (8, 0, 0)]
)
def test_table_for_eight_first_trajectories(right: int, equal: int, hard: int) -> None:
    correct = np.arange(8) < right
    assert (dars_equal(correct, most=32), dars_hard(correct, most=64)) == (equal, hard)


def test_what_is_added_is_at_most_the_limit_and_nothing_where_nothing_could_be_graded() -> None:
    assert extra_samples(0.0, 8, 1000, std=False, hard=False) == 27
    assert dars_equal(np.zeros(8, bool), most=4) == 0
    assert dars_equal(np.zeros(0, bool)) == 0


def test_settings() -> None:
    config = AlgorithmConfig(extra_samples="dars_hard", extra_samples_settings={"most": 12})
    assert algorithm.extra_samples(config)(np.zeros(8, bool)) == 4
    assert algorithm.extra_samples(AlgorithmConfig()) is None
    with pytest.raises(ConfigError, match="did you mean dars_hard"):
        algorithm.check(AlgorithmConfig(extra_samples="dars_hart"), Recorded())

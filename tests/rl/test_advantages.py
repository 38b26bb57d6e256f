"""Advantages against verl, TRL and worked numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.advantages.group import dr_grpo, grpo
from jaxrl.rl.outcomes import Outcomes

Golden = Callable[[str], list[dict[str, Any]]]


def outcomes(rewards: np.ndarray, groups: np.ndarray | None = None) -> Outcomes:
    """One group unless said otherwise, of trajectories of a single token."""
    rewards = np.asarray(rewards, np.float64)
    groups = np.zeros(len(rewards), int) if groups is None else groups
    return Outcomes(rewards=rewards, groups=groups, masks=[np.ones(1)] * len(rewards))


@pytest.mark.parametrize(
    ("positives", "expected"),
    [
        (1, (3.75, -0.25)),
        (2, (2.5617, -0.3660)),
        (4, (1.6771, -0.5590)),
        (8, (0.9682, -0.9682)),
        (14, (0.3660, -2.5617)),
    ],
)
def test_grpo_of_sixteen(positives: int, expected: tuple[float, float]) -> None:
    got = grpo(outcomes(np.arange(16) < positives))
    np.testing.assert_allclose([got[0], got[-1]], expected, atol=1e-4)


def test_worked_group_of_eight() -> None:
    rewards = np.array([1, 0, 0, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(grpo(outcomes(rewards))[:2], [1.2076, -0.7246], atol=1e-4)
    np.testing.assert_allclose(dr_grpo(outcomes(rewards))[:2], [0.625, -0.375])


def test_equal_rewards_have_no_advantage_and_one_trajectory_keeps_its_reward() -> None:
    for estimator in ("grpo", "dr_grpo"):
        np.testing.assert_array_equal(ADVANTAGES[estimator](outcomes(np.full(5, 0.1))), np.zeros(5))
        np.testing.assert_allclose(ADVANTAGES[estimator](outcomes(np.array([2.0]))), [2.0], rtol=2e-6)
        assert ADVANTAGES[estimator](outcomes(np.array([1.0, 0.0]))).dtype == np.float32


def test_verl(golden: Golden) -> None:
    checked = 0
    for case in golden("verl/advantages"):
        if case["estimator"] not in ("grpo", "grpo_vectorized"):
            continue
        inputs = case["inputs"]
        scores, groups = inputs["token_level_rewards"].sum(axis=1), inputs["index"]
        estimator = "grpo" if case["settings"]["norm_adv_by_std_in_grpo"] else "dr_grpo"
        expected = case["outputs"]["advantages"]
        got = ADVANTAGES[estimator](outcomes(scores, np.asarray(groups)))[:, None] * inputs["response_mask"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=case["id"])
        checked += 1
    assert checked == 32


def test_trl(golden: Golden) -> None:
    checked = 0
    for case in golden("trl/advantages"):
        settings = case["settings"]
        if case["estimator"] != "grpo" or settings["multi_objective_aggregation"] != "sum_then_normalize":
            continue
        if settings["scale_rewards"] == "batch":
            continue
        by_function = np.array(case["inputs"]["rewards_per_func"], np.float64)  # "NaN" reads as nan
        scored = ~np.isnan(by_function).all(axis=1)
        rewards = np.nansum(by_function * np.array(case["inputs"]["reward_weights"]), axis=1)
        got = np.zeros(len(rewards))
        for start in range(0, len(rewards), settings["num_generations"]):
            rows = np.arange(start, start + settings["num_generations"])
            rows = rows[scored[rows]]  # a trajectory without a reward leaves the group, as an untrainable one does
            if settings["scale_rewards"] == "group":
                got[rows] = grpo(outcomes(rewards[rows]), epsilon=1e-4)
            else:
                got[rows] = dr_grpo(outcomes(rewards[rows]))
        np.testing.assert_allclose(got, case["outputs"]["advantages"], rtol=1e-5, atol=1e-6, err_msg=case["id"])
        checked += 1
    assert checked == 16

"""The methods that docs/algorithms.md shows how to write."""

import asyncio
import pathlib
import re

import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, RewardConfig
from jaxrl.rewards.scorer import scorer
from jaxrl.rl import algorithm, selection
from jaxrl.rl.example import example
from jaxrl.rl.outcomes import Outcomes, Recorded

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "algorithms.md"


@pytest.fixture
def mine(tmp_path: pathlib.Path) -> str:
    (block,) = [
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def middle" in text
    ]
    (tmp_path / "mine.py").write_text(block)
    return f"{tmp_path}/mine.py"


def test_they_do_what_they_say(mine: str) -> None:
    config = AlgorithmConfig(
        advantage=f"{mine}:middle",
        advantage_settings={"shift": 0.5},
        selection=f"{mine}:shortest",
        keep=1,
        reject_equal=False,
        leave_out=(f"{mine}:silent",),
    )
    algorithm.check(config, Recorded())
    outcomes = Outcomes(np.array([0.0, 1.0, 5.0]), np.zeros(3, int), [np.ones(1)] * 3)
    assert algorithm.advantage(config, Recorded())(outcomes).values.tolist() == [-1.5, -0.5, 3.5]
    kept = selection.chooser(config).choose([example(1), example(0)], np.random.default_rng(0)).kept
    assert [trajectory.sample for trajectory in kept] == [0]
    rewards = RewardConfig(
        components={"correct": 1.0, "flawed_positive": 1.0, f"{mine}:brief": 1.0}, judge=f"{mine}:flaws"
    )
    scored = asyncio.run(scorer(rewards).score(example(0), 8))
    assert scored.components == {"correct": 1.0, "flawed_positive": 0.0, "brief": -0.003, "judge_failed": 0.0}

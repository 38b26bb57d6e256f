"""The methods that docs/algorithms.md shows how to write."""

import asyncio
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, RewardConfig
from jaxrl.rewards.scorer import scorer
from jaxrl.rl import algorithm, selection
from jaxrl.rl.correction import correction
from jaxrl.rl.example import example
from jaxrl.rl.outcomes import Outcomes, Recorded
from jaxrl.rl.supervised import supervised_loss
from jaxrl.rl.tokens import Tokens

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "algorithms.md"


@pytest.fixture
def mine(tmp_path: pathlib.Path) -> str:
    (block,) = [
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def middle" in text
    ]
    (tmp_path / "mine.py").write_text(block)
    return f"{tmp_path}/mine.py"


def test_losses_do_what_they_say(mine: str) -> None:
    config = AlgorithmConfig(loss=f"{mine}:gentle", loss_settings={"limit": 1.5}, rejection=f"{mine}:likely")
    algorithm.check(config, Recorded())
    one, behaviour = jnp.ones((1, 2)), jnp.array([[-1.0, -10.0]])
    tokens = Tokens(jnp.log(jnp.array([[1.0, 2.0]])), 0 * one, behaviour, 2 * one, one, one.astype(int), one, one)
    result = algorithm.policy_loss(config)(tokens)
    np.testing.assert_allclose(result.loss, [[-2.0, -3.0]])
    assert result.metrics["limited"].tolist() == [[False, True]]
    assert correction(config)(tokens).tokens.mask.tolist() == [[1.0, 0.0]]
    focal = supervised_loss("SftConfig.loss", f"{mine}:focal", {})
    np.testing.assert_allclose(focal(jnp.log(jnp.array([[0.5]]))), [[0.5 * np.log(2)]], rtol=1e-6)


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

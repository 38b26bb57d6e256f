"""What a step of reinforcement writes down of its rewards."""

import asyncio
import dataclasses
import pathlib

from jaxrl.config import RewardConfig
from jaxrl.records import StopReason
from jaxrl.rewards.scorer import component_names, scorer
from jaxrl.rl.example import example
from jaxrl.train.recorder import reward_pairs

OWN = """
def broken(graded):
    return float("nan")

def shy(graded):
    return None
"""


def test_what_a_component_gave_nothing_for_is_counted(tmp_path: pathlib.Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own = {f"{tmp_path}/own.py:{name}": 1.0 for name in ("broken", "shy")}
    config = RewardConfig(components={"correct": 1.0} | own)
    spoiled = dataclasses.replace(example(2), stop_reason=StopReason.INFRA_ERROR)
    played = [asyncio.run(scorer(config).score(one, 8)) for one in (example(0), example(1), spoiled)]
    pairs = reward_pairs(played, component_names(config))
    assert pairs["reward"] == pairs["reward/correct"] == (1.0, 2.0)
    assert pairs["reward/correct_missing"] == (0.0, 2.0)
    assert pairs["reward/broken_missing"] == pairs["reward/shy_missing"] == (2.0, 2.0)

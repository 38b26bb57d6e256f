"""Components and weights make a reward; a judge may be asked and may fail; verifiers by name."""

import asyncio
import dataclasses
import pathlib

import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, ConfigError, RewardConfig
from jaxrl.records import Problem, RewardStatus, StopReason
from jaxrl.rewards.comparing import Pair, comparison
from jaxrl.rewards.scorer import CORRECTNESS, scorer
from jaxrl.rewards.verifier import open_verifier
from jaxrl.rl import algorithm
from jaxrl.rl.example import example
from jaxrl.rl.outcomes import Recorded

MINE = """
import asyncio
import json
import time
import numpy as np

def tokens(graded, *, price: float = 0.5):
    return -price * len(graded.trajectory.ids)

def shy(graded):
    return None

async def slow(graded):
    await asyncio.sleep(0)
    return 2.0

def broken(graded):
    return float("nan")

def correct(graded):
    return 5.0

def wide(graded):
    return np.zeros(7)

def worded(graded):
    return "good"

def worded_when_wrong(graded):
    return 1.0 if graded.trajectory.correct else "bad"

def ragged(graded):
    return [[1.0], [2.0, 3.0]]

async def worded_late(graded):
    return "good"

def of_objects(graded):
    return json.loads(graded.trajectory.problem.answer)["points"]

async def finds_a_flaw(trajectory):
    assert trajectory.correct
    return "step \\\\boxed{1}"

def fails(trajectory):
    raise ConnectionError("no judge")

async def late(trajectory):
    await asyncio.sleep(60)

def slow_to_speak(trajectory):
    time.sleep(0.5)
    return "step \\\\boxed{1}"

def same_length(pair):
    return len(pair.answer) == len(pair.gold)
"""


@pytest.fixture
def mine(tmp_path: pathlib.Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


def score(config: RewardConfig, sample: int = 0, **changes):
    return asyncio.run(scorer(config).score(dataclasses.replace(example(sample), **changes), 8))


def test_a_reward_is_the_weighted_sum_of_its_components(mine: str) -> None:
    config = RewardConfig(
        components={"correct": 2.0, "tool_use": 0.5, f"{mine}:tokens": 1.0, f"{mine}:shy": 9.0, f"{mine}:slow": 0.1},
        component_settings={"correct.right": 3.0, "tokens.price": 0.25},
    )
    scored = score(config)
    assert scored.components == {"correct": 3.0, "tool_use": 1.0, "tokens": -0.75, "slow": 2.0}
    assert scored.reward == pytest.approx(2 * 3 + 0.5 - 0.75 + 0.2)
    assert [turn.reward for turn in scored.turns] == [0.0, 0.0, 0.0]
    assert scorer(config).weights == {"correct": 2.0, "tool_use": 0.5, "tokens": 1.0, "shy": 9.0, "slow": 0.1}


def test_what_turns_earn_stands_on_the_turns_and_not_in_the_reward_of_the_whole() -> None:
    scored = score(RewardConfig(components={"correct": 1.0, "calls_of_turns": 0.5}))
    assert scored.reward == 1.0 and [turn.reward for turn in scored.turns] == [0.5, 0.0, 0.0]
    assert scored.components["calls_of_turns"] == 1.0
    turns = Recorded(turn_rewards=True)
    for advantage in ("gigpo", "step_and_episode", "turn_level"):
        algorithm.check(AlgorithmConfig(advantage=advantage), turns)
    with pytest.raises(ConfigError, match="'grpo' passes over what single turns earn"):
        algorithm.check(AlgorithmConfig(advantage="grpo"), turns)


def test_what_cannot_be_trained_on_has_no_reward() -> None:
    for change in ({"reward_status": RewardStatus.VERIFIER_CRASH}, {"stop_reason": StopReason.INFRA_ERROR}):
        scored = score(RewardConfig(), reward=0.0, **change)
        assert scored.reward == 0.0 and scored.components == {}


def test_a_judge_is_asked_about_correct_answers_and_fails_open(mine: str) -> None:
    config = RewardConfig(components={"correct": 1.0, "flawed_positive": 1.0}, judge=f"{mine}:finds_a_flaw")
    assert score(config).reward == 0.0
    assert score(config).components == {"correct": 1.0, "flawed_positive": -1.0, "judge_failed": 0.0}
    assert score(config, sample=1).components == {"correct": 0.0, "flawed_positive": 0.0}
    unjudged = asyncio.run(scorer(config).unjudged().score(example(0), 8))
    assert unjudged.reward == 1.0 and "judge_failed" not in unjudged.components
    for judge in ("fails", "late", "slow_to_speak"):
        broken = dataclasses.replace(config, judge=f"{mine}:{judge}", judge_seconds=0.05)
        assert score(broken).components == {"correct": 1.0, "flawed_positive": 0.0, "judge_failed": 1.0}


def test_a_plain_judge_keeps_nobody_waiting(mine: str) -> None:
    """Two are asked at once; each waits until the other was asked, too."""
    pathlib.Path(mine).write_text(
        "import threading\nboth = threading.Barrier(2)\n"
        "def judge(trajectory):\n    both.wait(20)\n    return r'\\boxed{1}'\n"
    )
    config = RewardConfig(components={"correct": 1.0, "flawed_positive": 1.0}, judge=f"{mine}:judge")
    asked = scorer(config)

    async def ask_both():
        return await asyncio.gather(*(asked.score(example(0), 8) for _ in range(2)))

    assert [scored.components["judge_failed"] for scored in asyncio.run(ask_both())] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"components": {"corect": 1.0}}, "did you mean correct"),
        ({"components": {"correct": 1.0}, "component_settings": {"correct.rihgt": 2}}, "did you mean right"),
        ({"components": {"correct": 1.0}, "component_settings": {"form.bad": 2}}, "unknown key 'form.bad'"),
        ({"components": {"flawed_positive": 1.0}}, "takes a judge"),
        ({"components": {"{mine}:wide": 1.0}}, "gave .* for a trajectory of 2 policy turns"),
        ({"components": {"{mine}:worded": 1.0}}, "components: worded gave 'good' for .* it must give a number or None"),
        ({"components": {"{mine}:worded_when_wrong": 1.0}}, "worded_when_wrong gave 'bad'"),
        ({"components": {"{mine}:ragged": 1.0}}, "ragged gave "),
        ({"judge": "{mine}:nobody"}, "has no function nobody"),
        ({"components": {"correct": 1.0, "{mine}:correct": 1.0}}, "two components of one name"),
        ({"judge": "gpt"}, "must be a function"),
        ({"components": {"reward_model": 1.0}, "component_settings": {"reward_model.folder": "no"}}, "'no' holds no"),
        ({"components": {"process_reward": 1.0}}, "'' holds no value_head.safetensors"),
    ],
)
def test_what_is_refused(mine: str, fields: dict, words: str) -> None:
    fields = {
        name: {key.replace("{mine}", mine): item for key, item in value.items()}
        if isinstance(value, dict)
        else value.replace("{mine}", mine)
        for name, value in fields.items()
    }
    with pytest.raises(ConfigError, match=words):
        scorer(RewardConfig(**fields))


def test_what_an_asynchronous_component_gives_is_refused_once_it_speaks(mine: str) -> None:
    with pytest.raises(ConfigError, match="components: worded_late gave 'good'"):
        score(RewardConfig(components={f"{mine}:worded_late": 1.0}))


def test_a_component_must_know_the_form_of_the_runs_problems_and_not_of_ours(mine: str) -> None:
    config = RewardConfig(components={f"{mine}:of_objects": 1.0})
    scorer(config)
    scorer(config, Problem("1", "?", '{"points": 3}'))
    with pytest.raises(ConfigError, match=r"components='.*:of_objects' raised KeyError: 'points' \(.*mine.py:\d+\)$"):
        scorer(config, Problem("1", "?", "{}"))


def test_the_default_is_one_for_a_correct_answer() -> None:
    default = scorer(RewardConfig())
    for sample in (0, 1):
        one, other = (asyncio.run(by.score(example(sample), 8)) for by in (default, CORRECTNESS))
        assert one.reward == other.reward == 1.0 - sample and one.components == other.components


def test_settings_survive_gin_text() -> None:
    text = [
        "RewardConfig.components={'correct': 1, 'overlong': 0.5}",
        "RewardConfig.component_settings={'overlong.buffer': 16}",
    ]
    config = configuration.load("", text)
    assert configuration.parse([configuration.dump(config)]) == config
    np.testing.assert_equal(scorer(config.reward).weights, {"correct": 1, "overlong": 0.5})


@pytest.mark.parametrize(
    ("name", "answer", "gold", "status"),
    [
        ("text", "a  b", "a b", RewardStatus.CORRECT),
        ("text", "ab", "a b", RewardStatus.WRONG),
        ("text", " ", "a", RewardStatus.NO_ANSWER),
        ("execution", '{"stdout": "3"}', "3\n", RewardStatus.CORRECT),
        ("error_location", "2", '{"first_error": 3, "steps": 4}', RewardStatus.CORRECT),
        ("error_location", "2", "?", RewardStatus.VERIFIER_CRASH),
        ("{mine}:same_length", "ab", "xy", RewardStatus.CORRECT),
    ],
)
def test_verifiers(mine: str, name: str, answer: str, gold: str, status: RewardStatus) -> None:
    async def grade() -> RewardStatus:
        async with open_verifier(RewardConfig(verifier=name.replace("{mine}", mine))) as verifier:
            return await verifier.grade(answer, gold)

    assert asyncio.run(grade()) is status


def test_an_unknown_verifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean math"):
        comparison("maths")
    assert comparison("text")(Pair("a", "a"))


def test_a_component_that_gives_nan_adds_nothing(mine: str) -> None:
    scored = score(RewardConfig(components={"correct": 1.0, f"{mine}:broken": 1.0}))
    assert scored.reward == 1.0 and scored.components == {"correct": 1.0}
